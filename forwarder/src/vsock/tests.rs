//! The handle over sockets that a test serves in the VMM's stead.

use std::io::ErrorKind;
use std::path::Path;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;

use super::*;

fn opened(spec: &str) -> Vsock {
    let vsock = Vsock::open(&spec.parse().unwrap(), None).unwrap();
    vsock.start().unwrap();
    vsock
}

async fn exchange(a: &mut UnixStream, b: &mut UnixStream) {
    for (from, to) in [(0, 1), (1, 0)] {
        let bytes = [b"hello", b"world"][from];
        let mut got = [0; 5];
        let (from, to) = if from < to { (&mut *a, &mut *b) } else { (&mut *b, &mut *a) };
        from.write_all(bytes).await.unwrap();
        to.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, bytes);
    }
    a.shutdown().await.unwrap();
    assert_eq!(b.read(&mut [0]).await.unwrap(), 0, "the end of one direction");
    b.write_all(b"after").await.unwrap();
    let mut got = [0; 5];
    a.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"after", "and not of the other");
}

/// A Firecracker whose guest listens on port 52 alone.
fn firecracker(path: &Path) -> tokio::sync::mpsc::Receiver<UnixStream> {
    let listener = UnixListener::bind(path).unwrap();
    let (streams, taken) = mpsc::channel(1);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let mut stream = BufReader::new(stream);
            let mut line = String::new();
            stream.read_line(&mut line).await.unwrap();
            let answer: &[u8] = match line.as_str() {
                "CONNECT 52\n" => b"OK 1073741824\n",
                "CONNECT 53\n" => b"OK that is a very long answer\n",
                "CONNECT 54\n" => b"NO\n",
                _ => continue,
            };
            let mut stream = stream.into_inner();
            stream.write_all(answer).await.unwrap();
            let _ = streams.send(stream).await;
        }
    });
    taken
}

#[tokio::test]
async fn firecrackers_guest_is_reached_by_the_ports_it_listens_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    let vsock = opened(&format!("firecracker:{}", path.display()));
    assert_eq!(vsock.connect(52).await.unwrap_err().kind(), ErrorKind::NotConnected, "no VMM yet");
    let mut guest = firecracker(&path);
    let mut ours = vsock.connect(52).await.unwrap();
    exchange(&mut ours, &mut guest.recv().await.unwrap()).await;
    assert_eq!(vsock.connect(1).await.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    for nonsense in [53, 54] {
        assert_eq!(vsock.connect(nonsense).await.unwrap_err().kind(), ErrorKind::InvalidData);
        guest.recv().await.unwrap();
    }
}

#[tokio::test]
async fn what_a_guest_opens_arrives_until_nobody_wants_it() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().display();
    for (spec, arrivals) in
        [(format!("firecracker:{base}/v"), "v_1024"), (format!("dir:{base}"), "00000002.00000400")]
    {
        let vsock = opened(&spec);
        let path = dir.path().join(arrivals);
        assert!(UnixStream::connect(&path).await.is_err(), "nobody listens");
        let mut streams = vsock.listen(1024);
        let mut guests = UnixStream::connect(&path).await.unwrap();
        exchange(&mut guests, &mut streams.recv().await.unwrap()).await;
        drop(streams);
        while path.exists() {
            tokio::task::yield_now().await;
        }
        assert!(UnixStream::connect(&path).await.is_err(), "nobody listens any more");
    }
}

#[tokio::test]
async fn a_directory_has_a_socket_for_each_port_or_one_to_ask() {
    let dir = tempfile::tempdir().unwrap();
    let vsock = opened(&format!("dir:{},cid=5", dir.path().display()));
    assert_eq!(vsock.connect(80).await.unwrap_err().kind(), ErrorKind::ConnectionRefused);

    let connect = UnixListener::bind(dir.path().join("connect")).unwrap();
    let mut ours = vsock.connect(80).await.unwrap();
    let (mut asked, _) = connect.accept().await.unwrap();
    let mut line = [0; 18];
    asked.read_exact(&mut line).await.unwrap();
    assert_eq!(&line, b"00000005.00000050\n");
    exchange(&mut ours, &mut asked).await;

    for name in ["00000005.00000050", "guest.00000050"] {
        let listener = UnixListener::bind(dir.path().join(name)).unwrap();
        let mut ours = vsock.connect(80).await.unwrap();
        exchange(&mut ours, &mut listener.accept().await.unwrap().0).await;
    }
}

#[tokio::test]
async fn a_port_has_a_socket_under_both_its_names() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, ports) = (dir.path().join("vm"), dir.path().join("ports"));
    std::fs::create_dir(&vm).unwrap();
    let guest = UnixListener::bind(vm.join("guest.00000946")).unwrap();
    let vsock = opened(&format!("dir:{}", vm.display()));
    let (sockets, names) = PortSockets::bind(&ports, vsock.cid(), &[2374, 62373], true).unwrap();
    tokio::spawn(sockets.serve(vsock));
    for name in ["guest.00000946", "00000003.00000946"] {
        let mut client = UnixStream::connect(ports.join(name)).await.unwrap();
        exchange(&mut client, &mut guest.accept().await.unwrap().0).await;
    }
    // Nobody listens on the other one in the guest: the client is told by the end.
    let mut client = UnixStream::connect(ports.join("guest.0000f3a5")).await.unwrap();
    assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
    assert!(PortSockets::bind(&ports, 3, &[2374], true).is_err(), "somebody has them");
    drop(names);
    assert_eq!(std::fs::read_dir(&ports).unwrap().count(), 0, "the names are gone");
}

#[test]
fn a_file_of_somebody_elses_stays() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("guest.00000001"), "x").unwrap();
    let error = PortSockets::bind(dir.path(), 3, &[1], true).unwrap_err().to_string();
    assert!(error.contains("guest.00000001"), "{error}");
    assert!(!dir.path().join("00000003.00000001").exists(), "nothing is left half-made");
    assert!(PortSockets::bind(dir.path(), 3, &[1], false).is_ok());
}
