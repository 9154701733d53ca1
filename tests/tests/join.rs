//! VMs that join and leave a running network: `portway serve --join`.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use portway_tests::sidecar::until;
use portway_tests::vm::portway;

/// VMs that may have joined at once (`forwarder/src/driver/join.rs`).
const JOINED: usize = 256;
const PATIENCE: Duration = Duration::from_secs(10);

/// A sidecar without a link; killed when dropped.
struct Network {
    dir: tempfile::TempDir,
    process: Child,
}

impl Network {
    fn start() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let unix = |name: &str| format!("unix:{}", dir.path().join(name).display());
        let process = Command::new(portway()?)
            .args(["serve", "--join", &unix("join"), "--api", &unix("api")])
            .stdin(Stdio::null())
            .stderr(fs::File::create(dir.path().join("log"))?)
            .spawn()?;
        let network = Self { dir, process };
        until(PATIENCE, || UnixStream::connect(network.path("api")).is_ok())
            .with_context(|| network.log())?;
        Ok(network)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    fn asks(&self, line: &str) -> Result<(UnixStream, serde_json::Value)> {
        let mut stream = UnixStream::connect(self.path("join"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(line.as_bytes())?;
        let mut answer = String::new();
        BufReader::new(&stream).read_line(&mut answer)?;
        Ok((stream, serde_json::from_str(&answer).with_context(|| answer.clone())?))
    }

    fn joins(&self, name: &str, publish: &[&str]) -> Result<(UnixStream, serde_json::Value)> {
        let link = format!("qemu:unix:{},name={name}", self.path(name).display());
        self.asks(&format!("{}\n", serde_json::json!({ "link": link, "publish": publish })))
    }

    fn list(&self, what: &str) -> Result<serde_json::Value> {
        let api = format!("unix:{}", self.path("api").display());
        let out = Command::new(portway()?).args([what, "--api", &api, "--format", "json"]).output()?;
        Ok(serde_json::from_slice(&out.stdout)?)
    }

    fn ends(mut self) -> Result<()> {
        let ended = until(2 * PATIENCE, || self.process.try_wait().is_ok_and(|status| status.is_some()));
        ended.with_context(|| self.log())?;
        let left: Vec<_> =
            fs::read_dir(self.dir.path())?.map(|e| e.map(|e| e.file_name())).collect::<Result<_, _>>()?;
        ensure!(left == ["log"], "left behind: {left:?}");
        Ok(())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn is_there(path: &Path) -> bool {
    path.exists()
}

#[test]
fn a_vms_link_and_ports_live_as_long_as_its_connection_and_the_network_as_the_last() -> Result<()> {
    let network = Network::start()?;
    let (one, answer) = network.joins("one", &["0:22"])?;
    ensure!(answer["ports"][0]["guest_port"] == 22 && answer["error"].is_null(), "{answer}");
    let (two, answer) = network.joins("two", &["0:80/tcp", "0:53/udp"])?;
    ensure!(answer["ports"].as_array().is_some_and(|ports| ports.len() == 2), "{answer}");
    let guests: Vec<String> =
        network.list("ports")?.as_array().into_iter().flatten().map(|p| p["guest"].to_string()).collect();
    ensure!(guests == ["\"one\"", "\"two\"", "\"two\""], "{guests:?}");

    drop(two);
    until(PATIENCE, || !is_there(&network.path("two")))?;
    until(PATIENCE, || network.list("ports").is_ok_and(|p| p.as_array().is_some_and(|p| p.len() == 1)))?;
    // Its place is taken again, by another name.
    let (three, _) = network.joins("three", &[])?;
    let stats = network.list("stats")?;
    let names: Vec<String> =
        stats["links"].as_array().into_iter().flatten().map(|l| l["name"].to_string()).collect();
    ensure!(names == ["\"one\"", "\"three\""], "{names:?}");
    drop((one, three));
    network.ends()
}

#[test]
fn what_cannot_join_is_told_why_and_leaves_nothing() -> Result<()> {
    let network = Network::start()?;
    let (_stays, _) = network.joins("stays", &["0:22"])?;
    let keeps = format!(
        "{{\"link\":\"qemu:unix:{},name=keeps,ip=192.168.127.77\"}}\n",
        network.path("keeps").display()
    );
    let (_keeps, answer) = network.asks(&keeps)?;
    ensure!(answer["error"].is_null(), "{answer}");
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let taken = format!("{}:22", taken.local_addr()?.port());
    let link = |rest: &str| format!("{{\"link\":\"qemu:unix:{}{rest}\"}}\n", network.path("x").display());
    let cases = [
        ("hello\n".to_owned(), "expected"),
        ("{\"link\":\"wire:unix:/x\"}\n".to_owned(), "not a kind of link"),
        (format!("{{\"link\":\"{}\"}}\n", "x".repeat(70_000)), "EOF"),
        (link(""), "needs name="),
        (link(",name=stays"), "\\\"stays\\\" is on this network already"),
        (link(",name=x,ip=10.0.0.1"), "not in the subnet"),
        (link(",name=x,ip=192.168.127.1"), "the network's own"),
        (link(",name=x,ip=192.168.127.77"), "192.168.127.77 is the address of keeps"),
        (link(",name=x,mac=52:54:00:00:00:01"), "--static-lease"),
    ];
    for (request, expected) in cases {
        let (_, answer) = network.asks(&request)?;
        ensure!(answer["error"].to_string().contains(expected), "{request:.80}: {answer}");
    }
    let (_, answer) = network.joins("x", &["0:80", &taken])?;
    ensure!(answer["error"].to_string().contains("cannot listen"), "{answer}");
    let (_, answer) = network.joins("x", &["nonsense"])?;
    ensure!(answer["error"].to_string().contains("nonsense"), "{answer}");
    until(PATIENCE, || !is_there(&network.path("x")))?;
    ensure!(network.list("ports")?.as_array().is_some_and(|ports| ports.len() == 1));
    Ok(())
}

#[test]
fn a_network_takes_so_many_vms_and_no_more_until_one_leaves() -> Result<()> {
    let network = Network::start()?;
    let mut vms = Vec::new();
    for n in 0..JOINED {
        let (vm, answer) = network.joins(&format!("vm{n}"), &[])?;
        ensure!(answer["error"].is_null(), "{n}: {answer}");
        vms.push(vm);
    }
    let (_, answer) = network.joins("late", &[])?;
    ensure!(answer["error"].to_string().contains("no more may join"), "{answer}");
    vms.pop();
    until(PATIENCE, || network.joins("late", &[]).is_ok_and(|(_, answer)| answer["error"].is_null()))?;
    drop(vms);
    network.ends()
}

#[test]
fn a_network_that_nobody_joins_ends() -> Result<()> {
    let network = Network::start()?;
    let start = Instant::now();
    network.ends()?;
    ensure!(start.elapsed() > PATIENCE / 2, "it ended before anybody could have come");
    Ok(())
}

#[test]
fn a_network_whose_only_vm_is_refused_ends_at_once() -> Result<()> {
    let network = Network::start()?;
    let (refused, answer) = network.joins("one", &["nonsense"])?;
    ensure!(answer["error"].is_string(), "{answer}");
    drop(refused);
    let start = Instant::now();
    network.ends()?;
    ensure!(start.elapsed() < PATIENCE / 2, "it waited {:?}", start.elapsed());
    Ok(())
}
