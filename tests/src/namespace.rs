//! A network namespace that plays the guest: the kernel's own stack behind a tap device.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns};

/// The namespace; gone with the value.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes one. `None`, said on standard error, where this process may not.
    ///
    /// # Errors
    /// When it may, and cannot.
    pub fn new() -> Result<Option<Self>> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: network namespaces need root");
            return Ok(None);
        }
        let name = format!("pwtest-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        ip(&["netns", "add", &name])?;
        let namespace = Self { name };
        ip(&["-n", &namespace.name, "link", "set", "lo", "up"])?;
        Ok(Some(namespace))
    }

    /// What `netns=` takes.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// Gives `device` an address, the gateway and an MTU, as a container's runtime does.
    ///
    /// # Errors
    /// When there is no such device.
    pub fn configure(&self, device: &str, address: IpAddr, gateway: IpAddr, mtu: u16) -> Result<()> {
        let n = self.name.as_str();
        ip(&["-n", n, "link", "set", device, "mtu", &mtu.to_string(), "up"])?;
        ip(&["-n", n, "address", "add", &format!("{address}/24"), "dev", device])?;
        ip(&["-n", n, "route", "add", "default", "via", &gateway.to_string()])
    }

    /// Takes `device` up and leaves the rest to the kernel: IPv6 by router advertisements.
    ///
    /// # Errors
    /// When there is no such device.
    pub fn up(&self, device: &str) -> Result<()> {
        ip(&["-n", &self.name, "link", "set", device, "up"])
    }

    /// Runs `ip` with `args` inside.
    ///
    /// # Errors
    /// When it fails.
    pub fn ip(&self, args: &[&str]) -> Result<()> {
        ip(&[&["-n", &self.name], args].concat())
    }

    /// A command that runs inside, with files of its own in `/sys` and `/proc/sys/net`.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]);
        command
    }

    /// What a command inside prints, both ways, and whether it was content.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn run(&self, words: &str) -> Result<(bool, String)> {
        let mut words = words.split_whitespace();
        let program = words.next().context("no command")?;
        let out = self
            .command(program)
            .args(words)
            .output()
            .with_context(|| format!("{program} in ip netns exec"))?;
        let text = [out.stdout, out.stderr].concat();
        Ok((out.status.success(), String::from_utf8_lossy(&text).into_owned()))
    }

    /// Sets a sysctl inside.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        self.inside(|| std::fs::write(&path, value).with_context(|| path.clone()))
    }

    /// A cable to `other`, with an address of each version and a prefix length at both ends.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn cable(
        &self,
        device: &str,
        mine: [&str; 2],
        other: &Self,
        theirs: [&str; 2],
        mtu: u16,
    ) -> Result<()> {
        let peer = format!("{device}p");
        ip(&["-n", &self.name, "link", "add", "name", device, "type", "veth", "peer", "name", &peer])?;
        ip(&["-n", &self.name, "link", "set", &peer, "netns", &other.name])?;
        for (end, name, addresses) in [(self, device, mine), (other, peer.as_str(), theirs)] {
            end.ip(&["link", "set", name, "mtu", &mtu.to_string(), "up"])?;
            for address in addresses {
                // Without duplicate address detection: a test does not wait for it.
                let nodad: &[&str] = if address.contains(':') { &["nodad"] } else { &[] };
                end.ip(&[&["address", "add", address, "dev", name], nodad].concat())?;
            }
        }
        Ok(())
    }

    /// Makes programs that [`Self::command`] runs ask `server`.
    ///
    /// # Errors
    /// When `/etc/netns` cannot be written.
    pub fn resolve_with(&self, server: IpAddr) -> Result<()> {
        let dir = PathBuf::from("/etc/netns").join(&self.name);
        std::fs::create_dir_all(&dir)?;
        Ok(std::fs::write(dir.join("resolv.conf"), format!("nameserver {server}\n"))?)
    }

    /// Connects this namespace and `other` by a cable with these addresses at its ends.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn connect(&self, other: &Self, here: IpAddr, there: IpAddr) -> Result<()> {
        ip(&[
            "-n",
            &self.name,
            "link",
            "add",
            "cable",
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            &other.name,
        ])?;
        for (namespace, address) in [(self, here), (other, there)] {
            namespace.ip(&["address", "add", &format!("{address}/24"), "dev", "cable"])?;
            namespace.up("cable")?;
        }
        Ok(())
    }

    /// Deletes a device.
    ///
    /// # Errors
    /// When there is none.
    pub fn delete(&self, device: &str) -> Result<()> {
        ip(&["-n", &self.name, "link", "delete", device])
    }

    /// Runs `work` on a thread inside; sockets it makes stay there.
    ///
    /// # Errors
    /// Those of `work`, and when the namespace cannot be entered.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        inside(&self.path(), work)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = ip(&["netns", "delete", &self.name]);
        let _ = std::fs::remove_dir_all(PathBuf::from("/etc/netns").join(&self.name));
    }
}

/// The namespaces of an unprivileged process, as `unshare -Urn` makes them: user and network. Gone with the value.
#[derive(Debug)]
pub struct Unprivileged {
    holder: std::process::Child,
}

impl Unprivileged {
    /// Makes them. `None`, said on standard error, where that is not allowed, or this process could not look inside.
    ///
    /// # Errors
    /// When there is no `unshare`.
    pub fn new() -> Result<Option<Self>> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: looking into the namespaces needs root");
            return Ok(None);
        }
        let mut command = Command::new("unshare");
        // Its standard input is a pipe of ours: it ends with us, whatever happens.
        command.args(["-Urn", "sh", "-c", "echo; exec cat"]).stdin(std::process::Stdio::piped());
        let mut holder =
            command.stdout(std::process::Stdio::piped()).spawn().context("unshare (package util-linux)")?;
        let mut made = [0; 1];
        let out = holder.stdout.as_mut().context("no standard output")?;
        if std::io::Read::read(out, &mut made)? == 0 {
            let _ = holder.wait();
            eprintln!("skipped: user namespaces are not allowed here");
            return Ok(None);
        }
        Ok(Some(Self { holder }))
    }

    /// The process that holds them.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.holder.id()
    }

    /// The path of one of them: `user` or `net`.
    #[must_use]
    pub fn path(&self, kind: &str) -> PathBuf {
        format!("/proc/{}/ns/{kind}", self.pid()).into()
    }

    /// Runs `work` on a thread inside the network namespace; sockets it makes stay there.
    ///
    /// # Errors
    /// Those of `work`, and when the namespace cannot be entered.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        inside(&self.path("net"), work)
    }

    /// What `ip` says inside.
    ///
    /// # Errors
    /// When it fails.
    pub fn ip(&self, args: &[&str]) -> Result<String> {
        let net = format!("--net={}", self.path("net").display());
        let out = Command::new("nsenter").arg(net).arg("ip").args(args).output()?;
        ensure!(
            out.status.success(),
            "ip {}: {}",
            args.join(" "),
            String::from_utf8_lossy(&out.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }
}

impl Drop for Unprivileged {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

fn inside<T: Send>(namespace: &std::path::Path, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let file = std::fs::File::open(namespace)?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            setns(&file, CloneFlags::CLONE_NEWNET)?;
            work()
        });
        thread.join().map_err(|_| anyhow::anyhow!("the thread in the namespace panicked"))?
    })
}

fn ip(args: &[&str]) -> Result<()> {
    let out = Command::new("ip").args(args).output().context("ip (package iproute2)")?;
    ensure!(out.status.success(), "ip {}: {}", args.join(" "), String::from_utf8_lossy(&out.stderr).trim());
    Ok(())
}
