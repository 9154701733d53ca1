use super::*;
use crate::config::UdpFilter;

const PORT: PortId = PortId(0);
const MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);

fn addr(s: &str) -> SocketAddr {
    s.parse().unwrap()
}

struct Table(Bindings, Instant);

impl Table {
    fn new(limit: usize) -> Self {
        Self::with(limit, UdpConfig::default())
    }
    fn with(limit: usize, config: UdpConfig) -> Self {
        let limits = Limits { udp_bindings: limit, pings: limit, ..Limits::default() };
        Self(Bindings::new(&limits, config, 42), Instant::ZERO)
    }
    fn pings(&mut self, guest: &str, to: &str) -> BindingId {
        self.0.echo_to_host(self.1, Target { port: PORT, mac: MAC, guest: addr(guest) }, addr(to), 10)
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
fn a_binding_remembers_at_least_the_last_peers_and_at_most_twice_as_many() {
    let mut t = Table::new(2);
    let peer = |n: usize| format!("10.1.{}.{}:7", n / 250, n % 250);
    let (a, _) = t.sends("192.168.127.2:1", &peer(0));
    for n in 1..=2 * PEERS {
        t.sends("192.168.127.2:1", &peer(n));
    }
    assert!(!t.answers(a, &peer(0)));
    for n in PEERS + 1..=2 * PEERS {
        assert!(t.answers(a, &peer(n)), "{n}");
    }
}

#[test]
fn rfc_4787_5_the_filter_is_the_operators_choice() {
    for (filter, same, port, stranger) in [
        (UdpFilter::Address, true, true, false),
        (UdpFilter::Endpoint, true, false, false),
        (UdpFilter::Any, true, true, true),
    ] {
        let mut t = Table::with(8, UdpConfig { filter, ..UdpConfig::default() });
        let (a, _) = t.sends("192.168.127.2:5000", "192.0.2.1:7");
        let seen = ["192.0.2.1:7", "192.0.2.1:8", "192.0.2.2:7"].map(|from| t.answers(a, from));
        assert_eq!(seen, [same, port, stranger], "{filter:?}");
    }
}

#[test]
fn the_idle_time_is_the_operators_choice() {
    let mut t = Table::with(8, UdpConfig { idle: Duration::from_secs(120), ..UdpConfig::default() });
    let (a, _) = t.sends("192.168.127.2:5000", "192.0.2.1:7");
    assert!(t.after(Duration::from_secs(119)).is_empty());
    assert_eq!(t.after(Duration::from_secs(1)), [a]);
}

#[test]
fn rfc_5508_3_an_identifier_is_a_binding_of_its_own_and_lives_a_minute() {
    let mut t = Table::new(1);
    let (udp, _) = t.sends("192.168.127.2:7", "192.0.2.1:7");
    let a = t.pings("192.168.127.2:7", "192.0.2.1:0");
    assert!(a != udp && t.pings("192.168.127.2:7", "192.0.2.9:0") == a);
    assert!(t.answers(a, "192.0.2.1:0") && t.answers(a, "192.0.2.9:0") && !t.answers(a, "192.0.2.8:0"));
    assert_eq!(t.0.blamed(a, addr("192.0.2.1:0")).map(|(_, echo)| echo), Ok(true));
    // At the limit of its kind the idlest goes.
    let b = t.pings("192.168.127.2:8", "192.0.2.1:0");
    assert_eq!(t.after(Duration::from_secs(59)), [a]);
    assert_eq!(t.after(Duration::from_secs(1)), [b]);
    assert_eq!(t.0.len(), 1);
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
