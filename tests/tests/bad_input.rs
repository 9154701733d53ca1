//! What is wrong is told clearly and changes nothing: every route of the API with parameters, methods and bodies that are none, every
//! flag of `portway serve` and of `gvproxy` with values that are none. The routes are those of the document, the flags those of the help:
//! a new one is tried without being named here.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use portway_tests::program::named;
use portway_tests::sidecar::Sidecar;
use portway_tests::vm::portway;
use serde_json::Value;

/// Status, content type and body, as curl sees them.
fn curl(dir: &Path, args: &[&str]) -> Result<(u16, String, String)> {
    let mut command = Command::new("curl");
    command.args(["-sS", "--max-time", "20", "-w", "\n%{http_code} %{content_type}", "--unix-socket"]);
    let out = command.arg(dir.join("api")).args(args).output().context("curl")?;
    ensure!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8(out.stdout)?;
    let (body, end) = text.rsplit_once('\n').context("no status")?;
    let (status, kind) = end.split_once(' ').context("no type")?;
    Ok((status.parse()?, kind.to_owned(), body.to_owned()))
}

/// Everything a request could have changed.
fn state(dir: &Path) -> Result<Vec<String>> {
    let routes =
        ["v1/ports", "v1/dns", "v1/links", "v1/leases", "services/forwarder/all", "services/dns/all"];
    routes.iter().map(|r| Ok(curl(dir, &[&format!("http://portway/{r}")])?.2)).collect()
}

/// The problem `answer` is: status, and a code, title and detail that are there.
fn problem(answer: (u16, String, String), what: &str) -> Result<(u16, Value)> {
    let (status, kind, body) = answer;
    ensure!(kind == "application/problem+json", "{what}: {status} {kind} {body}");
    let problem: Value = serde_json::from_str(&body).with_context(|| what.to_owned())?;
    for key in ["code", "title", "detail"] {
        ensure!(problem[key].as_str().is_some_and(|t| !t.is_empty()), "{what}: no {key}: {body}");
    }
    ensure!(problem["status"] == status, "{what}: {body}");
    Ok((status, problem))
}

#[test]
fn every_route_of_the_document_refuses_what_is_none_and_nothing_changes() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut sidecar = Sidecar::start(dir.path(), &["--publish", "0:22", "--dns-host", "db.test=192.0.2.7"])?;
    let before = state(dir.path())?;
    let document: Value = serde_json::from_str(&curl(dir.path(), &["http://portway/v1/openapi.json"])?.2)?;
    let huge = dir.path().join("huge");
    std::fs::write(&huge, vec![b'['; 70_000])?;
    let huge = format!("@{}", huge.display());
    let mut tried = 0;
    for (path, methods) in document["paths"].as_object().context("paths")? {
        let url = format!("http://portway{}", path.replace("{name}", "web"));
        for (method, operation) in methods.as_object().context("methods")? {
            let method = method.to_uppercase();
            let with = |args: &[&str]| curl(dir.path(), &[&["-X", &method][..], args].concat());
            // A parameter that is none, and one that is there twice.
            let what = format!("{method} {path}?bogus=1");
            let (status, told) = problem(with(&[&format!("{url}?bogus=1")])?, &what)?;
            ensure!(
                status == 400 && told["code"] == "unknown_parameter" && told["field"] == "bogus",
                "{what}: {told}"
            );
            for parameter in
                operation["parameters"].as_array().into_iter().flatten().filter(|p| p["in"] == "query")
            {
                let name = parameter["name"].as_str().context("name")?;
                let what = format!("{method} {path}?{name} twice");
                let (status, told) = problem(with(&[&format!("{url}?{name}=1&{name}=1")])?, &what)?;
                ensure!(status == 400 && told["code"] == "duplicate_parameter", "{what}: {told}");
                // One whose value is none, where not every text is a value.
                let kind = &parameter["schema"]["type"];
                let text = kind == "string" || kind.as_array().is_some_and(|k| k.contains(&"string".into()));
                if !text || matches!(name, "proto" | "direction" | "state" | "host") {
                    let what = format!("{method} {path}?{name}=%00x");
                    let rest = if path == "/v1/explain" && name != "dest" { "&dest=a.test" } else { "" };
                    let (status, told) = problem(with(&[&format!("{url}?{name}=%00x{rest}")])?, &what)?;
                    ensure!(status == 400 && told["field"] == name, "{what}: {told}");
                }
                tried += 1;
            }
            if operation["requestBody"].is_object() {
                let key = if path.ends_with("ports") { "specs" } else { "records" };
                for body in [
                    String::new(),
                    "nonsense".into(),
                    "{".into(),
                    "[]".into(),
                    "null".into(),
                    "{}".into(),
                    format!("{{\"{key}\":null}}"),
                    format!("{{\"{key}\":\"8080:80\"}}"),
                    format!("{{\"{key}\":[]}}"),
                    format!("{{\"{key}\":[3]}}"),
                    format!("{{\"{key}\":[\"\"]}}"),
                    format!("{{\"{key}\":[\"=\"]}}"),
                    format!("{{\"{key}\":[\"0:22\"],\"{key}\":[\"0:23\"]}}"),
                    format!("{{\"{key}\":[\"0:22\"],\"bogus\":1}}"),
                    format!("{{\"{key}\":[\"0:22\"]}} {{}}"),
                    // An array of the fields in their order, which a decoder may take for them.
                    "[[\"0:22\"]]".into(),
                ] {
                    let what = format!("{method} {path} {body:?}");
                    let (status, _) = problem(with(&["--data-binary", &body, &url])?, &what)?;
                    ensure!(status == 400, "{what}: {status}");
                    tried += 1;
                }
                let what = format!("{method} {path} with 70000 bytes");
                let (status, told) = problem(with(&["--data-binary", &huge, &url])?, &what)?;
                ensure!(status == 413 && told["code"] == "too_large", "{what}: {told}");
            }
            tried += 1;
        }
        for method in ["PUT", "PATCH", "OPTIONS", "TRACE"] {
            let what = format!("{method} {path}");
            let (status, _) = problem(curl(dir.path(), &["-X", method, &url])?, &what)?;
            ensure!(status == 405, "{what}: {status}");
        }
    }
    ensure!(tried > 60, "{tried} is too few: is the document read?");
    let (status, _) = problem(curl(dir.path(), &["http://portway/v1/nothing"])?, "/v1/nothing")?;
    ensure!(status == 404);
    // Specs that are good and cannot be: what there is stays.
    let taken =
        before[0].split("\"host_port\":").nth(1).and_then(|t| t.split([',', '}']).next()).context("port")?;
    for (path, body, status, code) in [
        ("v1/ports", format!("{{\"specs\":[\"{taken}:22\"]}}"), 409, "already_published"),
        ("v1/ports", "{\"specs\":[\"0:nobody:22\"]}".into(), 409, "no_guest"),
        ("v1/ports", "{\"specs\":[\"0:10.9.9.9:22\"]}".into(), 409, "not_a_guest"),
        ("v1/ports", "{\"specs\":[\"0:192.168.127.1:22\"]}".into(), 409, "not_a_guest"),
    ] {
        let answer = curl(dir.path(), &["-d", &body, &format!("http://portway/{path}")])?;
        ensure!(answer.0 == status && answer.2.contains(code), "{path} {body}: {answer:?}");
    }
    ensure!(state(dir.path())? == before);
    ensure!(sidecar.is_alive()?);
    Ok(())
}

#[test]
fn gvproxys_routes_refuse_what_is_none_in_its_words_and_nothing_changes() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut sidecar = Sidecar::start(dir.path(), &["--publish", "127.0.0.1:0:22"])?;
    let before = state(dir.path())?;
    let (expose, unexpose, add) =
        ("services/forwarder/expose", "services/forwarder/unexpose", "services/dns/add");
    for route in [expose, unexpose, add] {
        for (body, status, text) in [
            ("", 400, "EOF\n"),
            ("{", 400, "unexpected EOF\n"),
            ("nonsense", 400, ""),
            ("[]", 400, "json: cannot unmarshal"),
            ("3", 400, "json: cannot unmarshal"),
        ] {
            let url = format!("http://unix/{route}");
            let (got, kind, said) = curl(dir.path(), &["-X", "POST", "--data-binary", body, &url])?;
            ensure!(
                got == status && said.contains(text) && said.ends_with('\n'),
                "{route} {body:?}: {got} {said:?}"
            );
            ensure!(kind == "text/plain; charset=utf-8", "{kind}");
        }
        let (status, _, said) = curl(dir.path(), &[&format!("http://unix/{route}")])?;
        ensure!((status, said.as_str()) == (400, "post only\n"), "{route}: {status} {said:?}");
    }
    let used = tempfile::NamedTempFile::new_in(dir.path())?;
    let unix = format!(
        r#"{{"local":"{}","remote":"tcp://192.168.127.2:22","protocol":"unix"}}"#,
        used.path().display()
    );
    for (route, body, status, text) in [
        (expose, r#"{"local":1}"#, 400, "json: cannot unmarshal"),
        (expose, r#"{"local":":0","remote":""}"#, 400, "missing port in address\n"),
        (expose, r#"{"local":":0","remote":"80"}"#, 400, "address 80: missing port in address\n"),
        (expose, r#"{"local":":0","remote":":80"}"#, 400, "address @: missing port in address\n"),
        (expose, r#"{"local":":0","remote":"fd00::1:80"}"#, 400, "too many colons in address\n"),
        (expose, r#"{"local":":0","remote":"a.name:80"}"#, 500, "invalid remote addr\n"),
        (expose, r#"{"local":":0","remote":"192.168.127.2:99999"}"#, 500, "strconv"),
        (expose, r#"{"local":":0","remote":"192.168.127.2:0"}"#, 500, "strconv"),
        (expose, r#"{"local":":x","remote":"192.168.127.2:80"}"#, 500, "invalid port"),
        (expose, r#"{"local":"no.such.name:1","remote":"192.168.127.2:80"}"#, 500, "no such host"),
        (
            expose,
            r#"{"local":"192.0.2.1:1","remote":"192.168.127.2:80"}"#,
            500,
            "listen tcp 192.0.2.1:1: bind: ",
        ),
        (
            expose,
            r#"{"local":":0","remote":"192.168.127.2:80","protocol":"sctp"}"#,
            500,
            "unknown protocol sctp\n",
        ),
        (
            expose,
            r#"{"local":":0","remote":"192.168.127.2:80","protocol":"npipe"}"#,
            500,
            "named pipes are not supported by this platform\n",
        ),
        (
            expose,
            r#"{"local":"/nx/y","remote":"udp://192.168.127.2:80","protocol":"unix"}"#,
            500,
            "not implemented: udp\n",
        ),
        (expose, &unix, 500, "is a file and not a socket"),
        (unexpose, "{}", 500, "proxy not found\n"),
        (unexpose, r#"{"local":"127.0.0.1:1","protocol":"tcp"}"#, 500, "proxy not found\n"),
        (unexpose, r#"{"local":"127.0.0.1:1","protocol":"sctp"}"#, 500, "proxy not found\n"),
        (add, "{}", 400, "is not a domain name"),
        (add, r#"{"Name":"a..b"}"#, 400, "is not a domain name"),
        (add, r#"{"Name":3}"#, 400, "json: cannot unmarshal"),
        (add, r#"{"Name":"a.test.","Records":[{"Name":"x","IP":"bad"}]}"#, 400, "invalid IP address: bad\n"),
        (add, r#"{"Name":"a.test.","DefaultIP":"bad"}"#, 400, "invalid IP address: bad\n"),
        (
            add,
            r#"{"Name":"a.test.","Records":[{"Regexp":"(","IP":"10.0.0.1"}]}"#,
            400,
            "error parsing regexp: ",
        ),
        (add, r#"{"Name":"a.test.","Records":{}}"#, 400, "json: cannot unmarshal"),
    ] {
        let (got, _, said) = curl(dir.path(), &["-X", "POST", "-d", body, &format!("http://unix/{route}")])?;
        ensure!(got == status && said.contains(text), "{route} {body}: {got} {said:?}");
    }
    ensure!(used.path().is_file());
    // The same twice: by the text of its local end.
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let body = format!(r#"{{"LOCAL":"{port}","Remote":"192.168.127.2:80","extra":1}}"#);
    let url = format!("http://unix/{expose}");
    let good = curl(dir.path(), &["-d", &body, &url])?;
    ensure!((good.0, good.2.as_str()) == (200, ""), "keys have no case, others are passed over: {good:?}");
    let (status, _, said) = curl(dir.path(), &["-d", &body, &url])?;
    ensure!((status, said) == (500, format!("proxy already running for tcp on {port}\n")));
    let gone =
        curl(dir.path(), &["-d", &format!(r#"{{"local":"{port}"}}"#), &format!("http://unix/{unexpose}")])?;
    ensure!(gone.0 == 200, "{gone:?}");
    ensure!(state(dir.path())? == before);
    ensure!(sidecar.is_alive()?);
    Ok(())
}

/// Options that take any text: a file that is not there is another matter.
const FREE: [&str; 9] =
    ["api", "config", "dns-ca", "network", "pid-file", "log-file", "pcap", "state-dir", "vsock-dir"];

#[test]
fn every_flag_of_serve_refuses_what_is_none_by_name_and_nothing_is_left() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let run = |args: &[&str]| -> Result<(Option<i32>, String)> {
        let mut command = Command::new(portway()?);
        command.args(["serve", "--check-config", "--link", "qemu:unix:/nx/vm"]).args(args);
        let out = command.env("XDG_RUNTIME_DIR", dir.path()).output()?;
        Ok((out.status.code(), String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned()))
    };
    let help = Command::new(portway()?).args(["serve", "--help"]).output()?;
    let help = String::from_utf8(help.stdout)?;
    let options = help.lines().filter_map(|line| {
        let words = line.trim_start().trim_start_matches("-p, ").strip_prefix("--")?;
        words.split_once([' ', '\n']).filter(|(_, value)| value.starts_with('<'))
    });
    let mut tried = 0;
    for (flag, _) in options {
        let option = format!("--{flag}");
        let (code, said) = run(&[&option])?;
        ensure!(code == Some(2) && said.contains(&option), "{option} without a value: {code:?} {said}");
        tried += 1;
        if FREE.contains(&flag) || matches!(flag, "resolv-conf" | "hosts-file") {
            continue;
        }
        let (code, said) = run(&[&option, "!no value!"])?;
        ensure!(code == Some(2) && said.contains(&option), "{option} with nonsense: {code:?} {said}");
        ensure!(said.contains("!no value!"), "{option}: what was wrong is not shown: {said}");
    }
    ensure!(tried > 30, "{tried} is too few: is the help read?");
    let (code, said) = run(&["--publsh", "1:1"])?;
    ensure!(code == Some(2) && said.contains("--publish"), "{said}");
    let (code, said) = run(&["--mtu", "1500", "--mtu", "1500"])?;
    ensure!(code == Some(2) && said.contains("--mtu"), "{said}");
    ensure!(std::fs::read_dir(dir.path())?.next().is_none(), "something was left");
    Ok(())
}

#[test]
fn every_flag_of_gvproxy_refuses_what_is_none_with_gos_codes() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let program = named(dir.path(), "gvproxy")?;
    let run = |args: &[&str]| -> Result<(Option<i32>, String)> {
        let out = Command::new(&program).args(args).current_dir(dir.path()).output()?;
        Ok((out.status.code(), String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned()))
    };
    let (code, help) = run(&["-help"])?;
    ensure!(code == Some(0), "{help}");
    let flags: Vec<(&str, &str)> = help
        .lines()
        .filter_map(|line| line.strip_prefix("  -"))
        .map(|line| line.split_once(' ').unwrap_or((line, "")))
        .collect();
    ensure!(flags.len() > 20, "{help}");
    for (flag, takes) in flags {
        let option = format!("-{flag}");
        let (args, text) = match takes {
            "" => (
                vec![format!("{option}=perhaps")],
                format!("invalid boolean value \"perhaps\" for flag {option}"),
            ),
            "int" => (vec![option.clone(), "x".into()], format!("invalid value \"x\" for flag {option}")),
            _ => (vec![option.clone()], format!("flag needs an argument: {option}")),
        };
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let (code, said) = run(&args)?;
        ensure!(
            code == Some(2) && said.contains(&text) && said.contains("Usage of"),
            "{option}: {code:?} {said}"
        );
    }
    let key = dir.path().join("key");
    std::fs::write(&key, "no key")?;
    let key = key.display().to_string();
    let forward = |sock: &str, identity: &str| {
        let words = ["-listen", "unix://api", "-ssh-port=-1", "-forward-dest", "/x", "-forward-user", "root"];
        let more = ["-forward-sock", sock, "-forward-identity", identity];
        words.iter().chain(&more).map(|w| (*w).to_owned()).collect::<Vec<String>>()
    };
    for (args, text) in [
        (forward("s", "/nx/key"), "/nx/key"),
        (forward("s", &key), "not a private key"),
        (forward("", &key), "must all be specified together"),
        (forward("tcp://127.0.0.1:1", &key), "is not unix://PATH"),
        (forward("npipe:////./pipe/x", &key), "named pipes"),
        (forward("s", &key)[..9].to_vec(), "must all be specified together"),
        (vec!["-listen".into(), "vsock://x:1".into()], "vsock://[CID]:PORT"),
        (vec!["-listen".into(), "vsock://:x".into()], "is not a port"),
    ] {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let (code, said) = run(&args)?;
        ensure!(code == Some(1) && said.contains(text), "{args:?}: {code:?} {said}");
        ensure!(said.trim_end().lines().count() == 1, "{said}");
    }
    let left: Vec<_> = std::fs::read_dir(dir.path())?.flatten().map(|f| f.file_name()).collect();
    ensure!(left.len() == 2, "something was left: {left:?}");
    Ok(())
}
