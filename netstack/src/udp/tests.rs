use super::*;

const PORT: PortId = PortId(0);
const MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);

fn addr(s: &str) -> SocketAddr {
    s.parse().unwrap()
}

struct Table(Bindings, Instant);

impl Table {
    fn new(limit: usize) -> Self {
        Self(Bindings::new(limit, 42), Instant::ZERO)
    }
    fn sends(&mut self, guest: &str, to: &str) -> (BindingId, bool) {
        match self.0.to_host(
            self.1,
            Target { port: PORT, mac: MAC, guest: addr(guest) },
            addr(to),
            addr(to),
            10,
        ) {
            UdpPath::Binding { binding, new } => (binding, new),
            UdpPath::Client { .. } => panic!("not a client"),
        }
    }
    fn answers(&mut self, id: BindingId, from: &str) -> bool {
        self.0.from_host(id, addr(from), 10).is_ok()
    }
    fn after(&mut self, time: Duration) -> Vec<BindingId> {
        self.1 += time;
        self.0.handle_timeout(self.1);
        std::iter::from_fn(|| self.0.poll_closed()).collect()
    }
}

#[test]
fn rfc_4787_req_1_one_binding_serves_every_destination() {
    let mut t = Table::new(8);
    let (a, new) = t.sends("192.168.127.2:5000", "192.0.2.1:7");
    assert!(new);
    assert_eq!(t.sends("192.168.127.2:5000", "198.51.100.1:9"), (a, false));
    assert!(t.sends("192.168.127.2:5001", "192.0.2.1:7").1);
}

#[test]
fn any_port_of_an_address_the_guest_sent_to_may_answer_and_no_other() {
    let mut t = Table::new(8);
    let (a, _) = t.sends("192.168.127.2:5000", "192.0.2.1:7");
    assert!(t.answers(a, "192.0.2.1:7"));
    assert!(t.answers(a, "192.0.2.1:9999"));
    assert!(!t.answers(a, "192.0.2.2:7"));
}

#[test]
fn a_binding_ends_five_minutes_after_the_guests_last_datagram_whatever_the_host_sends() {
    let mut t = Table::new(8);
    let (a, _) = t.sends("192.168.127.2:5000", "192.0.2.1:7");
    assert!(t.after(Duration::from_secs(299)).is_empty());
    assert!(t.answers(a, "192.0.2.1:7"));
    assert_eq!(t.after(Duration::from_secs(1)), [a]);
    assert!(!t.answers(a, "192.0.2.1:7"));
    assert_eq!(t.0.len(), 0);
}

#[test]
fn a_binding_that_only_spoke_to_port_53_ends_after_30_seconds() {
    let mut t = Table::new(8);
    let (a, _) = t.sends("192.168.127.2:5000", "192.0.2.1:53");
    let (b, _) = t.sends("192.168.127.2:5001", "192.0.2.1:53");
    t.sends("192.168.127.2:5001", "192.0.2.1:54");
    assert_eq!(t.after(Duration::from_secs(31)), [a]);
    assert_eq!(t.after(Duration::from_secs(300)), [b]);
}

#[test]
fn at_the_limit_the_idlest_binding_goes() {
    let mut t = Table::new(2);
    let (a, _) = t.sends("192.168.127.2:1", "192.0.2.1:7");
    let (b, _) = t.sends("192.168.127.2:2", "192.0.2.1:7");
    t.sends("192.168.127.2:1", "192.0.2.1:7");
    let (c, _) = t.sends("192.168.127.2:3", "192.0.2.1:7");
    assert_eq!(t.after(Duration::ZERO), [b]);
    assert!(t.answers(a, "192.0.2.1:7") && t.answers(c, "192.0.2.1:7") && !t.answers(b, "192.0.2.1:7"));
}

#[test]
fn a_binding_remembers_the_last_sixteen_addresses() {
    let mut t = Table::new(2);
    let (a, _) = t.sends("192.168.127.2:1", "192.0.2.0:7");
    for n in 1..=PEERS {
        t.sends("192.168.127.2:1", &format!("192.0.2.{n}:7"));
    }
    assert!(!t.answers(a, "192.0.2.0:7"));
    assert!(t.answers(a, "192.0.2.1:7"));
}

#[test]
fn the_answer_to_a_published_ports_client_goes_back_to_that_client() {
    let mut t = Table::new(8);
    let target = Target { port: PORT, mac: MAC, guest: addr("192.168.127.2:9") };
    let (seen, client) = (addr("192.168.127.254:4000"), addr("127.0.0.1:4000"));
    t.0.from_client(t.1, target, seen, client, 3, 10);
    let path = t.0.to_host(t.1, target, seen, addr("127.0.0.1:4000"), 10);
    assert_eq!(path, UdpPath::Client { listener: 3, client });
    assert!(t.0.is_taken(target.guest, seen, addr("127.0.0.1:1"), 3));
    t.0.listener_closed(3);
    assert!(t.sends("192.168.127.2:9", "192.168.127.254:4000").1);
}
