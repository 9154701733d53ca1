//! What can be typed in the guest.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use portway_api::control::PortInfo;

use crate::args::{Arg, Args};
use crate::console::say;
use crate::dial::Host;
use crate::local::{Agent, Answer, Ask, default_socket};
use crate::run::{self, Options};

/// What is printed for `--help`.
pub(crate) const USAGE: &str = "\
usage: portway-agent COMMAND [OPTIONS]

  run                     serve the host: listeners, published ports, carried connections
      --host URL            vsock://CID:PORT or unix:PATH [default: vsock://2:7927]
      --socket PATH         where other programs of the guest ask
      --inport PORT:unix:PATH
                            a vsock port of ours that leads to a unix socket; repeatable
      --node-ports          publish Kubernetes' NodePorts too
      --no-redirections     do not look for ports that nftables or iptables send on
      --no-clock            leave the clock alone
  publish SPEC...         have ports published on the host: [BIND:]HOST:[ADDRESS:]GUEST[/tcp|udp]
  unpublish SPEC...       and not any more, as they were published
  ports [--json]          what is published for this guest
      --socket PATH         the agent to ask
  expose-port             stand in for docker's proxy: dockerd --userland-proxy-path
  tap --url URL           carry Ethernet frames to the host: vsock://2:1024/connect
  init                    what it does as pid 1
  --version

portway-agent expose-port --help and portway-agent tap --help say more.";

/// Bad usage: one line, and 2.
pub(crate) fn usage(fault: &str) -> ExitCode {
    say(&format!("{fault} (portway-agent --help)"));
    ExitCode::from(2)
}

/// One line to standard output. A reader that has gone away (`| head`) is no fault of ours.
pub(crate) fn print(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// `portway-agent run`.
pub(crate) fn serve(args: Args) -> ExitCode {
    match options(args) {
        Ok(options) => run::run(options),
        Err(fault) => usage(&fault),
    }
}

fn options(mut args: Args) -> Result<Options, String> {
    let mut options = Options {
        host: Host::default(),
        socket: default_socket(),
        clock: true,
        redirections: nix::unistd::geteuid().is_root(),
        node_ports: false,
        inports: Vec::new(),
    };
    while let Some(arg) = args.next()? {
        match arg {
            Arg::Option(o) => match o.as_str() {
                "host" => options.host = args.parsed(&o)?,
                "socket" => options.socket = PathBuf::from(args.value(&o)?),
                "inport" => options.inports.push(inport(&args.value(&o)?)?),
                "node-ports" => options.node_ports = args.switch(&o)?,
                "no-redirections" => options.redirections = !args.switch(&o)?,
                "no-clock" => options.clock = !args.switch(&o)?,
                _ => return Err(format!("-{o} is not an option of run")),
            },
            Arg::Word(word) => return Err(format!("{word:?} is not an option of run")),
        }
    }
    Ok(options)
}

/// vsudd's `PORT:unix:PATH`.
fn inport(text: &str) -> Result<(u32, PathBuf), String> {
    let parsed = text.split_once(":unix:").and_then(|(port, path)| Some((port.parse().ok()?, path)));
    let (port, path) = parsed.filter(|(_, path)| path.starts_with('/')).ok_or_else(|| {
        format!("{text:?} is not PORT:unix:PATH; an example: 2374:unix:/var/run/docker.sock")
    })?;
    Ok((port, path.into()))
}

/// `publish`, `unpublish` and `ports`.
pub(crate) fn ask(command: &str, mut args: Args) -> ExitCode {
    let (mut specs, mut socket, mut json) = (Vec::new(), None, false);
    let read = (|| -> Result<(), String> {
        while let Some(arg) = args.next()? {
            match arg {
                Arg::Option(o) if o == "socket" => socket = Some(PathBuf::from(args.value(&o)?)),
                Arg::Option(o) if o == "json" => json = args.switch(&o)?,
                Arg::Option(o) => return Err(format!("-{o} is not an option of {command}")),
                Arg::Word(word) if command == "ports" => return Err(format!("ports takes no {word:?}")),
                Arg::Word(word) => specs.push(word),
            }
        }
        Ok(())
    })();
    if let Err(fault) = read {
        return usage(&fault);
    }
    if specs.is_empty() && command != "ports" {
        return usage(&format!("{command} what? An example: portway-agent {command} 8080:80"));
    }
    let mut agent = match Agent::connect(socket.as_deref()) {
        Ok(agent) => agent,
        Err(error) => {
            say(&error.to_string());
            return ExitCode::FAILURE;
        }
    };
    let questions: Vec<Ask> = match command {
        "ports" => vec![Ask::Ports],
        "publish" => specs.into_iter().map(|spec| Ask::Publish { spec, hold: false }).collect(),
        _ => specs.into_iter().map(|spec| Ask::Unpublish { spec }).collect(),
    };
    let mut good = true;
    for question in &questions {
        match agent.ask(question) {
            Ok(Answer::Done { ports, errors }) => {
                ports.iter().for_each(|p| print(&format!("{command}ed {}", line(p))));
                errors.iter().for_each(|error| say(error));
                good &= errors.is_empty();
            }
            Ok(Answer::Ports { ports, .. }) if json => {
                print(&serde_json::to_string_pretty(&ports).unwrap_or_default());
            }
            Ok(Answer::Ports { ports, .. }) => ports.iter().for_each(|p| print(&line(p))),
            Ok(Answer::Failed { reason }) => {
                say(&reason);
                good = false;
            }
            Err(error) => {
                say(&error.to_string());
                good = false;
            }
        }
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn line(port: &PortInfo) -> String {
    let end = |address: &str, port: u16| match (port, address.contains(':')) {
        (0, _) => address.to_owned(),
        // It comes by the network, to whatever address this guest has.
        (port, _) if address.is_empty() => port.to_string(),
        (port, true) => format!("[{address}]:{port}"),
        (port, false) => format!("{address}:{port}"),
    };
    let host: Vec<String> = port.bind.iter().map(|b| end(b, port.host_port)).collect();
    format!("{} {} -> {} {}", port.proto, host.join(" "), end(&port.guest, port.guest_port), port.state)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Options, String> {
        options(Args::new(line.split_whitespace().map(str::to_owned)))
    }

    #[test]
    fn the_options_of_run_are_read() {
        let options =
            parsed("-host vsock://1 --inport 2374:unix:/var/run/docker.sock -no-clock --socket=/run/x")
                .expect("good options");
        assert_eq!(options.host, Host::Vsock { cid: 1, port: 7927 });
        assert_eq!(options.inports, [(2374, PathBuf::from("/var/run/docker.sock"))]);
        assert!(!options.clock);
        assert_eq!(options.socket, std::path::Path::new("/run/x"));
    }

    #[test]
    fn a_port_that_comes_by_the_network_is_shown_without_an_address() {
        let shown = |guest: &str| {
            let port = serde_json::json!({
                "proto": "tcp", "bind": ["127.0.0.1", "::1"], "host_port": 8080, "guest": guest, "guest_port": 80,
                "state": "listening", "accepted": 0,
            });
            line(&serde_json::from_value(port).expect("a port"))
        };
        assert_eq!(shown(""), "tcp 127.0.0.1:8080 [::1]:8080 -> 80 listening");
        assert_eq!(shown("::1"), "tcp 127.0.0.1:8080 [::1]:8080 -> [::1]:80 listening");
    }

    #[test]
    fn a_bad_option_is_named() {
        for (line, fault) in [
            ("--colour", "-colour is not an option"),
            ("here", "\"here\" is not an option"),
            ("--inport 2374:tcp:80", "is not PORT:unix:PATH"),
            ("--inport x:unix:/a", "is not PORT:unix:PATH"),
            ("--host", "-host needs a value"),
            ("--host nowhere", "is not vsock://CID:PORT"),
        ] {
            assert!(parsed(line).is_err_and(|e| e.contains(fault)), "{line}");
        }
    }
}
