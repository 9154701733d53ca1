//! `top`: the VMs and flows of a network, live.
//!
//! ```text
//!  a thread asks the API every second ─► Model (rates, sort, filter) ─► ratatui
//!                                 keys ──►
//! ```

mod model;

use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use portway_api::control::{FlowInfo, LinkInfo};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Row, Table};
use ratatui::{DefaultTerminal, Frame};

use self::model::{Look, Model, Press, bytes};
use super::{Failure, Target, client};
use crate::control::client::Client;

/// The options of `top`.
#[derive(Debug, clap::Args)]
pub(super) struct TopArgs {
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=60))]
    interval: u64,
    /// Show only flows that contain this text, as `/` does
    #[arg(long, value_name = "TEXT", default_value = "")]
    filter: String,
    #[command(flatten)]
    at: Target,
}

/// Flows that are asked for; the rest of a larger network is not shown.
const FLOWS: usize = 2000;
/// How long a key may wait for its effect.
const KEYS: Duration = Duration::from_millis(50);

type Seen = (Instant, Result<Look, String>);

pub(super) fn top(args: &TopArgs) -> Result<ExitCode, Failure> {
    if !io::stdout().is_terminal() {
        return Err(Failure::usage("top needs a terminal; `portway flows --format json` is for programs"));
    }
    let network = client(&args.at)?;
    // A network that is not there is told on the terminal as it is, and not inside the view.
    let first = look(&network).map_err(Failure::failed)?;
    let (seen, looks) = mpsc::channel();
    let every = Duration::from_secs(args.interval);
    std::thread::spawn(move || {
        let mut next = Some(first);
        // Ends with the view, which is the other end.
        while seen.send((Instant::now(), next.take().map_or_else(|| look(&network), Ok))).is_ok() {
            std::thread::sleep(every);
        }
    });
    let mut model = Model::new();
    model.filter.clone_from(&args.filter);
    let mut terminal = ratatui::init();
    let done = show(&mut terminal, &mut model, &looks);
    ratatui::restore();
    done.map_err(|e| Failure::failed(format!("the terminal: {e}")))?;
    Ok(ExitCode::SUCCESS)
}

fn look(network: &Client) -> Result<Look, String> {
    let links: Vec<LinkInfo> = network.get("/v1/links").map_err(|e| e.to_string())?;
    let flows: Vec<FlowInfo> = network.get(&format!("/v1/flows?limit={FLOWS}")).map_err(|e| e.to_string())?;
    Ok(Look { links, flows })
}

fn show(terminal: &mut DefaultTerminal, model: &mut Model, looks: &mpsc::Receiver<Seen>) -> io::Result<()> {
    loop {
        while let Ok((at, look)) = looks.try_recv() {
            model.see(at, look);
        }
        terminal.draw(|frame| draw(frame, model))?;
        if event::poll(KEYS)?
            && let Event::Key(key) = event::read()?
            && key.kind != KeyEventKind::Release
        {
            let interrupt = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
            if interrupt || press(key).is_some_and(|p| model.press(p)) {
                return Ok(());
            }
        }
    }
}

const fn press(key: KeyEvent) -> Option<Press> {
    Some(match key.code {
        KeyCode::Char(c) => Press::Char(c),
        KeyCode::Backspace => Press::Backspace,
        KeyCode::Enter => Press::Enter,
        KeyCode::Esc => Press::Escape,
        KeyCode::Up => Press::Up,
        KeyCode::Down => Press::Down,
        KeyCode::PageUp => Press::PageUp,
        KeyCode::PageDown => Press::PageDown,
        _ => return None,
    })
}

/// Draws everything. There are no colours, only bold and reversed text: it reads the same on every terminal, and NO_COLOR has
/// nothing to switch off.
fn draw(frame: &mut Frame<'_>, model: &Model) {
    let (bold, reversed) =
        (Style::new().add_modifier(Modifier::BOLD), Style::new().add_modifier(Modifier::REVERSED));
    let vms = u16::try_from(model.links.len().min(8)).unwrap_or(8) + 1;
    let parts = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(vms),
        Constraint::Length(1),
        Constraint::Min(1),
        Constraint::Length(1),
    ]);
    let [head, links, _, flows, foot] = parts.areas(frame.area());

    let rows = model.rows();
    let state = if model.paused { "  PAUSED" } else { "" };
    let title = format!("portway top  {} flows, sorted by {}{state}", rows.len(), model.sort.name());
    frame.render_widget(Line::styled(title, bold), head);

    let link = |(l, r): &(LinkInfo, model::Rates)| {
        Row::new([
            l.name.clone(),
            l.kind.clone(),
            if l.up { "up" } else { "down" }.into(),
            l.ip.clone().unwrap_or_else(|| "-".into()),
            format!("{}/s", bytes(r.to_host)),
            format!("{}/s", bytes(r.to_guest)),
            bytes(l.bytes_from_guest),
            bytes(l.bytes_to_guest),
        ])
    };
    let widths = [
        Constraint::Length(16),
        Constraint::Length(10),
        Constraint::Length(5),
        Constraint::Fill(1),
        Constraint::Length(9),
        Constraint::Length(9),
        Constraint::Length(8),
        Constraint::Length(8),
    ];
    let names = ["VM", "LINK", "STATE", "ADDRESS", "TO HOST", "TO GUEST", "SENT", "GOT"];
    let table = Table::new(model.links.iter().map(link), widths).header(Row::new(names).style(reversed));
    frame.render_widget(table, links);

    // A narrow terminal shows what changes.
    let wide = frame.area().width >= 110;
    let flow = |(f, r): &&(FlowInfo, model::Rates)| {
        let arrow = if f.direction == "published" { "<-" } else { "->" };
        let rates = [format!("{}/s", bytes(r.to_host)), format!("{}/s", bytes(r.to_guest))];
        let mut cells = vec![f.vm.clone(), f.proto.to_string(), format!("{} {arrow} {}", f.guest, f.remote)];
        cells.extend(rates);
        if wide {
            cells.extend([
                f.state.clone(),
                bytes(f.bytes_to_host),
                bytes(f.bytes_to_guest),
                format!("{}s", f.age_s),
            ]);
        }
        Row::new(cells)
    };
    let mut columns = vec![
        ("VM", Constraint::Length(if wide { 14 } else { 8 })),
        ("PROTO", Constraint::Length(5)),
        ("FLOW", Constraint::Fill(1)),
        ("TO HOST", Constraint::Length(8)),
        ("TO GUEST", Constraint::Length(8)),
    ];
    if wide {
        columns.extend([
            ("STATE", Constraint::Length(7)),
            ("SENT", Constraint::Length(6)),
            ("GOT", Constraint::Length(6)),
            ("AGE", Constraint::Length(6)),
        ]);
    }
    let (names, widths): (Vec<_>, Vec<_>) = columns.into_iter().unzip();
    let shown = rows.iter().skip(model.offset).map(flow);
    frame.render_widget(Table::new(shown, widths).header(Row::new(names).style(reversed)), flows);

    let line = if model.editing {
        format!("filter: {}_  (Enter keeps it, Esc clears it)", model.filter)
    } else if let Some(trouble) = &model.trouble {
        format!("no news: {trouble}")
    } else {
        let filter =
            if model.filter.is_empty() { String::new() } else { format!("  filter: {}", model.filter) };
        format!("q quit  p pause  s sort  / filter  arrows scroll{filter}")
    };
    frame.render_widget(Line::styled(line, bold), foot);
}
