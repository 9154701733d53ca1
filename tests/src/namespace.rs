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

    /// A program inside; `ip netns exec` gives it the files of `/etc/netns/NAME` in the place of those in `/etc`.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]);
        command
    }

    /// Brings a device up that asks for its address itself.
    ///
    /// # Errors
    /// When there is no such device.
    pub fn up(&self, device: &str) -> Result<()> {
        ip(&["-n", &self.name, "link", "set", device, "up"])
    }

    /// Runs `ip` inside.
    ///
    /// # Errors
    /// When it fails.
    pub fn ip(&self, args: &[&str]) -> Result<()> {
        ip(&[&["-n", &self.name][..], args].concat())
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
        let file = std::fs::File::open(self.path())?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&file, CloneFlags::CLONE_NEWNET)?;
                work()
            });
            thread.join().map_err(|_| anyhow::anyhow!("the thread in the namespace panicked"))?
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = ip(&["netns", "delete", &self.name]);
        let _ = std::fs::remove_dir_all(PathBuf::from("/etc/netns").join(&self.name));
    }
}

fn ip(args: &[&str]) -> Result<()> {
    let out = Command::new("ip").args(args).output().context("ip (package iproute2)")?;
    ensure!(out.status.success(), "ip {}: {}", args.join(" "), String::from_utf8_lossy(&out.stderr).trim());
    Ok(())
}
