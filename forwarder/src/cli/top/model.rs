//! What `top` shows: rates from two looks at the counters, sorted and filtered.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use portway_api::control::{FlowInfo, LinkInfo, Protocol};

/// What one look at the network brought.
#[derive(Debug, Clone, Default)]
pub(super) struct Look {
    pub(super) links: Vec<LinkInfo>,
    pub(super) flows: Vec<FlowInfo>,
}

/// Bytes per second, each way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Rates {
    pub(super) to_host: u64,
    pub(super) to_guest: u64,
}

impl Rates {
    fn between(before: (u64, u64), now: (u64, u64), time: Duration) -> Self {
        let per_second = |bytes: u64| {
            let millis = u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1);
            bytes.saturating_mul(1000) / millis
        };
        // A counter that went back is another flow's, or another guest's.
        Self {
            to_host: per_second(now.0.saturating_sub(before.0)),
            to_guest: per_second(now.1.saturating_sub(before.1)),
        }
    }

    pub(super) const fn sum(self) -> u64 {
        self.to_host.saturating_add(self.to_guest)
    }
}

/// What the flows are sorted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sort {
    Rate,
    Total,
    Age,
    Vm,
}

impl Sort {
    const fn next(self) -> Self {
        match self {
            Self::Rate => Self::Total,
            Self::Total => Self::Age,
            Self::Age => Self::Vm,
            Self::Vm => Self::Rate,
        }
    }

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::Total => "total",
            Self::Age => "age",
            Self::Vm => "vm",
        }
    }
}

type Key = (Protocol, String, String, String);

fn key(f: &FlowInfo) -> Key {
    (f.proto, f.direction.clone(), f.guest.clone(), f.remote.clone())
}

/// The state of the view.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) links: Vec<(LinkInfo, Rates)>,
    flows: Vec<(FlowInfo, Rates)>,
    before: Option<(Instant, Look)>,
    pub(super) sort: Sort,
    pub(super) filter: String,
    /// Whether keys go to the filter.
    pub(super) editing: bool,
    pub(super) paused: bool,
    /// Rows above the first that is shown.
    pub(super) offset: usize,
    /// Why the last look failed.
    pub(super) trouble: Option<String>,
}

/// A key, as far as the view knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Press {
    Char(char),
    Backspace,
    Enter,
    Escape,
    Up,
    Down,
    PageUp,
    PageDown,
}

impl Model {
    pub(super) const fn new() -> Self {
        Self {
            links: Vec::new(),
            flows: Vec::new(),
            before: None,
            sort: Sort::Rate,
            filter: String::new(),
            editing: false,
            paused: false,
            offset: 0,
            trouble: None,
        }
    }

    /// Takes what was seen at `now`; while paused it is not shown.
    pub(super) fn see(&mut self, now: Instant, look: Result<Look, String>) {
        let look = match look {
            Ok(look) => look,
            Err(trouble) => {
                self.trouble = Some(trouble);
                return;
            }
        };
        self.trouble = None;
        if self.paused {
            return;
        }
        let (time, links, flows) = match &self.before {
            None => (Duration::ZERO, HashMap::new(), HashMap::new()),
            Some((at, before)) => (
                now.saturating_duration_since(*at),
                before.links.iter().map(|l| (&l.name, (l.bytes_from_guest, l.bytes_to_guest))).collect(),
                before.flows.iter().map(|f| (key(f), (f.bytes_to_host, f.bytes_to_guest))).collect(),
            ),
        };
        let first = self.before.is_none();
        let link = |l: &LinkInfo| {
            let bytes = (l.bytes_from_guest, l.bytes_to_guest);
            (l.clone(), Rates::between(links.get(&l.name).copied().unwrap_or(bytes), bytes, time))
        };
        let flow = |f: &FlowInfo| {
            let bytes = (f.bytes_to_host, f.bytes_to_guest);
            // A flow that was not there before moved all its bytes since then.
            let before = flows.get(&key(f)).copied().unwrap_or(if first { bytes } else { (0, 0) });
            (f.clone(), Rates::between(before, bytes, time))
        };
        self.links = look.links.iter().map(link).collect();
        self.flows = look.flows.iter().map(flow).collect();
        self.before = Some((now, look));
    }

    /// The flows as they are to be shown.
    pub(super) fn rows(&self) -> Vec<&(FlowInfo, Rates)> {
        let wanted = self.filter.to_ascii_lowercase();
        let texts = |f: &FlowInfo| {
            format!("{} {} {} {} {} {}", f.vm, f.proto, f.direction, f.guest, f.remote, f.state)
        };
        let mut rows: Vec<&(FlowInfo, Rates)> = self
            .flows
            .iter()
            .filter(|(f, _)| wanted.split(' ').all(|w| texts(f).to_ascii_lowercase().contains(w)))
            .collect();
        let total = |f: &FlowInfo| f.bytes_to_host.saturating_add(f.bytes_to_guest);
        rows.sort_by(|(a, ra), (b, rb)| {
            let order = match self.sort {
                Sort::Rate => rb.sum().cmp(&ra.sum()),
                Sort::Total => total(b).cmp(&total(a)),
                Sort::Age => b.age_s.cmp(&a.age_s),
                Sort::Vm => a.vm.cmp(&b.vm),
            };
            order.then_with(|| total(b).cmp(&total(a))).then_with(|| a.guest.cmp(&b.guest))
        });
        rows
    }

    /// A key. True: the user wants to leave.
    pub(super) fn press(&mut self, key: Press) -> bool {
        if self.editing {
            match key {
                Press::Char(c) => self.filter.push(c),
                Press::Backspace => drop(self.filter.pop()),
                Press::Enter => self.editing = false,
                Press::Escape => {
                    self.editing = false;
                    self.filter.clear();
                }
                _ => {}
            }
            self.offset = 0;
            return false;
        }
        match key {
            Press::Char('q') => return true,
            Press::Char('p' | ' ') => self.paused = !self.paused,
            Press::Char('s') => self.sort = self.sort.next(),
            Press::Char('/') => self.editing = true,
            Press::Escape => self.filter.clear(),
            Press::Up | Press::Char('k') => self.offset = self.offset.saturating_sub(1),
            Press::Down | Press::Char('j') => self.offset += 1,
            Press::PageUp => self.offset = self.offset.saturating_sub(10),
            Press::PageDown => self.offset += 10,
            _ => {}
        }
        self.offset = self.offset.min(self.rows().len().saturating_sub(1));
        false
    }
}

/// A number of bytes as people read it: at most four digits and a unit of 1024.
pub(super) fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["B", "K", "M", "G", "T", "P"];
    let (mut n, mut tenths, mut unit) = (n, 0, 0);
    while n >= 1024 && unit + 1 < UNITS.len() {
        tenths = n % 1024 * 10 / 1024;
        n /= 1024;
        unit += 1;
    }
    if unit > 0 && n < 10 { format!("{n}.{tenths}{}", UNITS[unit]) } else { format!("{n}{}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(guest: &str, to_host: u64) -> FlowInfo {
        FlowInfo {
            vm: "web".into(),
            proto: Protocol::Tcp,
            direction: "outbound".into(),
            guest: guest.into(),
            remote: "192.0.2.7:443".into(),
            state: "open".into(),
            bytes_to_host: to_host,
            bytes_to_guest: 0,
            age_s: 1,
            idle_s: 0,
        }
    }

    fn look(flows: &[FlowInfo]) -> Result<Look, String> {
        Ok(Look { links: Vec::new(), flows: flows.to_vec() })
    }

    #[test]
    fn rates_come_from_two_looks() {
        let (mut model, start) = (Model::new(), Instant::now());
        model.see(start, look(&[flow("a:1", 1000), flow("b:1", 500)]));
        assert_eq!(model.rows()[0].1, Rates::default(), "one look is no rate");
        model.see(
            start + Duration::from_secs(2),
            look(&[flow("a:1", 1000), flow("b:1", 2500), flow("c:1", 50)]),
        );
        let rows: Vec<(&str, u64)> =
            model.rows().iter().map(|(f, r)| (f.guest.as_str(), r.to_host)).collect();
        assert_eq!(rows, [("b:1", 1000), ("c:1", 25), ("a:1", 0)]);
    }

    #[test]
    fn keys_sort_filter_and_pause() {
        let (mut model, start) = (Model::new(), Instant::now());
        model.see(start, look(&[flow("a:1", 1), flow("b:1", 2)]));
        assert!(!model.press(Press::Char('s')));
        assert_eq!(model.sort, Sort::Total);
        for c in "/B:1".chars() {
            model.press(Press::Char(c));
        }
        assert!(model.editing);
        model.press(Press::Enter);
        assert_eq!(model.rows().len(), 1);
        model.press(Press::Char('p'));
        model.see(start + Duration::from_secs(1), look(&[]));
        assert_eq!(model.rows().len(), 1, "what is shown stays while paused");
        model.press(Press::Escape);
        assert_eq!(model.rows().len(), 2);
        model.press(Press::PageDown);
        assert_eq!(model.offset, 1, "not beyond the last");
        assert!(model.press(Press::Char('q')));
    }

    #[test]
    fn bytes_are_short() {
        for (n, text) in [
            (0, "0B"),
            (1023, "1023B"),
            (1024, "1.0K"),
            (1536, "1.5K"),
            (10 << 20, "10M"),
            (u64::MAX, "16383P"),
        ] {
            assert_eq!(bytes(n), text);
        }
    }
}
