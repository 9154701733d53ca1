//! The soak: a real sidecar under mixed load of many guests, and whether it is afterwards what it was before.
//!
//! ```text
//!  guests come ─► quiet: baseline ─► load for --minutes, with churn ─► all stop ─► quiet: back at the baseline?
//!                     every second: RSS, descriptors, flows, bindings, timers, DNS, clients ─► soak.json, soak.svg
//! ```
//! The load of each guest is a row of random steps: flows that are short, long, refused or cut off, datagrams from many ports,
//! names, connections to its published port, nonsense on its link, and leaving and coming again. Beside them a client of the
//! control API publishes, lists, follows events and captures. The exit code is 1 when something did not come back.
//!
//! `make soak MINUTES=60`; by hand: `PORTWAY_BIN=… soak --minutes 5 --guests 8 --out target/soak`.

mod load;
mod plot;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use portway_tests::resolver::Resolver;
use portway_tests::sidecar::Sidecar;

use self::load::Host;
use self::plot::Panel;

/// How long everything has to come back. The longest wait of the configuration below is TIME_WAIT and the reapers behind it.
const PATIENCE: Duration = Duration::from_secs(300);
/// By how much the heap may have grown: what an allocator keeps of what was needed once. DESIGN §6 allows 64 MiB.
const GROWTH: u64 = 16 << 20;
/// By how much the middle of the last fifth of the load may be above that of the second fifth, of numbers that the same load keeps at
/// the same height: a slow leak shows here long before it reaches [`GROWTH`]. Name, and how far.
const DRIFT: [(&str, u64); 2] = [("process_resident_memory_bytes", 4 << 20), ("portway_timers", 1024)];

/// What is sampled: name, and how far above its baseline it may end.
const NUMBERS: [(&str, &str, u64); 9] = [
    ("process_resident_memory_bytes", "resident memory, bytes", GROWTH),
    ("process_open_fds", "descriptors", 0),
    ("portway_tcp_flows", "TCP flows", 0),
    ("portway_tcp_dialing", "pending connects", 0),
    ("portway_udp_bindings", "UDP bindings", 0),
    // Up to 1024 that mean nothing any more are not worth a sweep: entries of flows that are gone, whose own time is far away. The
    // number is bounded whatever the load is; a timer that leaked for one flow in a hundred would be ten times that in an hour.
    ("portway_timers", "timers", 1024),
    ("portway_dns_in_flight", "DNS queries in flight", 0),
    ("portway_captures", "captures", 0),
    ("portway_api_clients", "API clients", 0),
];

/// One look at every number.
#[derive(Debug, Clone, Copy)]
struct Sample {
    at: f64,
    values: [u64; NUMBERS.len()],
}

struct Options {
    minutes: f64,
    guests: u8,
    out: PathBuf,
}

fn options() -> Result<Options> {
    let mut options = Options { minutes: 5.0, guests: 8, out: "target/soak".into() };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().with_context(|| format!("{word} needs a value"))?;
        match word.as_str() {
            "--minutes" => options.minutes = value.parse().context("--minutes")?,
            "--guests" => options.guests = value.parse().context("--guests")?,
            "--out" => options.out = value.into(),
            _ => bail!("{word}: --minutes, --guests or --out"),
        }
    }
    ensure!((1..=60).contains(&options.guests), "--guests: 1 to 60");
    Ok(options)
}

fn sample(sidecar: &Sidecar, began: Instant) -> Result<Sample> {
    let text = load::get(&sidecar.dir.join("api"), "/v1/metrics")?;
    let mut values = [0; NUMBERS.len()];
    for (value, (name, _, _)) in values.iter_mut().zip(NUMBERS) {
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
        *value = line.and_then(|v| v.parse().ok()).with_context(|| format!("no {name} in the metrics"))?;
    }
    Ok(Sample { at: began.elapsed().as_secs_f64(), values })
}

/// What is above where it may be, in words.
fn above(now: &Sample, baseline: &Sample) -> Vec<String> {
    let rows = NUMBERS.iter().zip(now.values).zip(baseline.values);
    rows.filter(|(((_, _, slack), now), before)| *now > before + slack)
        .map(|(((_, title, _), now), before)| format!("{title}: {before} before, {now} now"))
        .collect()
}

/// What rose slowly while the load stayed the same, in words. A short run has no parts to compare.
fn risen(samples: &[Sample], (begins, ends): (f64, f64)) -> Vec<String> {
    let fifth = (ends - begins) / 5.0;
    if fifth < 60.0 {
        return Vec::new();
    }
    let middle = |index: usize, part: f64| {
        let within = begins + part * fifth..begins + (part + 1.0) * fifth;
        let rows = samples.iter().filter(|s| within.contains(&s.at));
        let mut values: Vec<u64> = rows.filter_map(|s| s.values.get(index).copied()).collect();
        values.sort_unstable();
        values.get(values.len() / 2).copied().unwrap_or_default()
    };
    let named = |wanted| NUMBERS.iter().position(|(name, ..)| *name == wanted);
    DRIFT
        .iter()
        .filter_map(|(name, slack)| {
            let index = named(*name)?;
            let (early, late) = (middle(index, 1.0), middle(index, 4.0));
            (late > early + slack).then(|| format!("{name}: {early} early under load, {late} late"))
        })
        .collect()
}

fn main() -> Result<()> {
    let options = options()?;
    let dir = tempfile::tempdir()?;
    let resolver = Resolver::start("127.0.0.1:0".parse()?, [192, 0, 2, 80])?;
    let state = dir.path().join("state");
    let mut words: Vec<String> = Vec::new();
    for n in 1..options.guests {
        words.extend([
            "--link".into(),
            format!("qemu:unix:{},name=g{n}", dir.path().join(format!("vm{n}")).display()),
        ]);
    }
    for n in 0..options.guests {
        let name = if n == 0 { "web".to_owned() } else { format!("g{n}") };
        words.extend(["--publish".into(), format!("127.0.0.1:0:{name}:22")]);
    }
    words.extend(["--dns-upstream".into(), resolver.address.to_string()]);
    words.extend(["--state-dir".into(), state.display().to_string(), "--udp-idle".into(), "30".into()]);
    let sidecar = Sidecar::start(dir.path(), &words.iter().map(String::as_str).collect::<Vec<_>>())?;
    let ports = sidecar.json(&["ports"])?;
    let ports: Vec<u16> = ports
        .as_array()
        .context("ports")?
        .iter()
        .filter_map(|p| u16::try_from(p["host_port"].as_u64()?).ok())
        .collect();
    ensure!(ports.len() == usize::from(options.guests), "{ports:?}");

    let began = Instant::now();
    let host = Arc::new(Host::start()?);
    let (loading, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let done = Arc::new(AtomicU64::new(0));
    let mut threads = Vec::new();
    for n in 0..options.guests {
        let path = dir.path().join(if n == 0 { "vm".to_owned() } else { format!("vm{n}") });
        let port = *ports.get(usize::from(n)).context("port")?;
        let (host, loading, stop, done) =
            (Arc::clone(&host), Arc::clone(&loading), Arc::clone(&stop), Arc::clone(&done));
        threads.push(std::thread::spawn(move || load::guest(&path, n, port, &host, &loading, &stop, &done)));
    }
    let api = {
        let (path, loading, stop, done) =
            (dir.path().join("api"), Arc::clone(&loading), Arc::clone(&stop), Arc::clone(&done));
        std::thread::spawn(move || load::client(&path, &loading, &stop, &done))
    };

    // Quiet, with every guest there: what it is to come back to. A moment of everything first, so that what is made once is made.
    let mut samples = Vec::new();
    let look = |samples: &mut Vec<Sample>, seconds: f64| -> Result<()> {
        let until = Instant::now() + Duration::from_secs_f64(seconds);
        while Instant::now() < until {
            samples.push(sample(&sidecar, began)?);
            std::thread::sleep(Duration::from_secs(1));
        }
        Ok(())
    };
    look(&mut samples, 10.0)?;
    let baseline = *samples.last().context("no sample")?;
    let load_begins = began.elapsed().as_secs_f64();
    loading.store(true, Ordering::Relaxed);
    look(&mut samples, options.minutes * 60.0)?;
    loading.store(false, Ordering::Relaxed);
    let load_ends = began.elapsed().as_secs_f64();
    let steps = done.load(Ordering::Relaxed);

    let deadline = Instant::now() + PATIENCE;
    let left = loop {
        look(&mut samples, 2.0)?;
        let left = above(samples.last().context("no sample")?, &baseline);
        if left.is_empty() || Instant::now() > deadline {
            break left;
        }
    };
    stop.store(true, Ordering::Relaxed);
    let mut faults = Vec::new();
    for thread in threads.into_iter().chain([api]) {
        match thread.join() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => faults.push(format!("{error:#}")),
            Err(_) => faults.push("a thread of the load panicked".to_owned()),
        }
    }
    let stats = sidecar.json(&["stats"])?;
    write(&options, &samples, &baseline, (load_begins, load_ends), steps, &stats)?;
    let log = sidecar.log();
    ensure!(sidecar.stop()?.success(), "it did not end in order");
    ensure!(faults.is_empty(), "guests were not served: {}", faults.join("; "));
    ensure!(stats["sandbox"]["refused_calls"] == 0, "the sandbox refused calls: {log}");
    ensure!(!log.contains("panicked"), "{log}");
    let risen = risen(&samples, (load_begins, load_ends));
    ensure!(risen.is_empty(), "grew under a load that did not: {}", risen.join(", "));
    ensure!(left.is_empty(), "not back after {PATIENCE:?}: {}", left.join(", "));
    println_line(&format!("everything is back at its baseline; {steps} steps; {}", options.out.display()));
    Ok(())
}

/// Standard output is what this program is for.
fn println_line(line: &str) {
    use std::io::Write;
    // Nobody reading is no fault of the run.
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn write(
    options: &Options,
    samples: &[Sample],
    baseline: &Sample,
    (begins, ends): (f64, f64),
    steps: u64,
    stats: &serde_json::Value,
) -> Result<()> {
    std::fs::create_dir_all(&options.out)?;
    let rows: Vec<serde_json::Value> =
        samples.iter().map(|s| serde_json::json!({ "at_s": s.at, "values": s.values })).collect();
    let names: Vec<&str> = NUMBERS.iter().map(|(name, _, _)| *name).collect();
    let json = serde_json::json!({
        "minutes": options.minutes, "guests": options.guests, "steps": steps, "names": names,
        "baseline": baseline.values, "samples": rows, "stats": stats,
    });
    std::fs::write(options.out.join("soak.json"), serde_json::to_vec(&json)?)?;
    let panels: Vec<Panel> = NUMBERS
        .iter()
        .enumerate()
        .map(|(n, (_, title, _))| {
            let scale = if n == 0 { f64::from(1 << 20) } else { 1.0 };
            let value = |s: &Sample| s.values.get(n).copied().unwrap_or(0) as f64 / scale;
            Panel {
                title: title.replace(", bytes", ", MiB"),
                points: samples.iter().map(|s| (s.at, value(s))).collect(),
                baseline: value(baseline),
            }
        })
        .collect();
    let title = format!("{} guests, {} minutes of load, {steps} steps", options.guests, options.minutes);
    let picture = plot::svg(&title, &panels, &[(begins, "load"), (ends, "quiet")]);
    std::fs::write(options.out.join("soak.svg"), picture)?;
    Ok(())
}
