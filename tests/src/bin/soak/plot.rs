//! The plot of a run: one panel per number, one above the other, as an SVG that needs nothing else.

use std::fmt::Write;

/// Pixels.
const WIDTH: f64 = 900.0;
const PANEL: f64 = 110.0;
const LEFT: f64 = 90.0;
const TOP: f64 = 40.0;
const GAP: f64 = 34.0;
/// Points of a line; more of them show no more.
const POINTS: usize = 600;

/// One number over time.
pub(super) struct Panel {
    pub(super) title: String,
    /// Seconds and value.
    pub(super) points: Vec<(f64, f64)>,
    /// What it was before the load.
    pub(super) baseline: f64,
}

/// The picture. `marks` are moments with a name, in seconds.
pub(super) fn svg(title: &str, panels: &[Panel], marks: &[(f64, &str)]) -> String {
    let height = TOP + (PANEL + GAP) * panels.len() as f64 + 20.0;
    let end = panels.iter().flat_map(|p| &p.points).map(|(t, _)| *t).fold(1.0, f64::max);
    let x = |t: f64| LEFT + t / end * (WIDTH - LEFT - 20.0);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n<text x=\"{LEFT}\" y=\"22\" font-size=\"15\">{title}</text>\n"
    );
    for (n, panel) in panels.iter().enumerate() {
        let top = TOP + (PANEL + GAP) * n as f64 + 14.0;
        let most = panel.points.iter().map(|(_, v)| *v).fold(panel.baseline, f64::max).max(1.0) * 1.05;
        let y = |v: f64| top + PANEL - v / most * PANEL;
        // Writing to a string does not fail.
        let _ = writeln!(out, "<text x=\"{LEFT}\" y=\"{}\">{}</text>", top - 4.0, panel.title);
        let _ = writeln!(
            out,
            "<rect x=\"{LEFT}\" y=\"{top}\" width=\"{}\" height=\"{PANEL}\" fill=\"none\" stroke=\"#999\"/>",
            WIDTH - LEFT - 20.0
        );
        for value in [0.0, most / 2.0, most] {
            let _ = writeln!(
                out,
                "<text x=\"{}\" y=\"{}\" text-anchor=\"end\" fill=\"#555\">{value:.0}</text>",
                LEFT - 6.0,
                y(value) + 4.0
            );
        }
        let base = y(panel.baseline);
        let _ = writeln!(
            out,
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{base:.1}\" y2=\"{base:.1}\" stroke=\"#2a2\" stroke-dasharray=\"4 3\"/>",
            WIDTH - 20.0
        );
        for (at, _) in marks {
            let at = x(*at);
            let _ = writeln!(
                out,
                "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{top}\" y2=\"{}\" stroke=\"#c60\" stroke-dasharray=\"2 2\"/>",
                top + PANEL
            );
        }
        let line = thinned(&panel.points)
            .iter()
            .map(|(t, v)| format!("{:.1},{:.1}", x(*t), y(*v)))
            .collect::<Vec<_>>();
        let _ = writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"#136\" stroke-width=\"1.3\"/>",
            line.join(" ")
        );
    }
    let foot = height - 8.0;
    for (at, name) in marks {
        let _ = writeln!(out, "<text x=\"{:.1}\" y=\"{foot}\" fill=\"#c60\">{name}</text>", x(*at) + 3.0);
    }
    let _ = writeln!(
        out,
        "<text x=\"{}\" y=\"{foot}\" text-anchor=\"end\" fill=\"#555\">{:.1} minutes; dashed green: before the load</text>\n</svg>",
        WIDTH - 20.0,
        end / 60.0
    );
    out
}

/// As many points as can be seen; of those that fall together the largest stays.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let each = points.len().div_ceil(POINTS).max(1);
    let largest = |some: &[(f64, f64)]| some.iter().copied().max_by(|a, b| a.1.total_cmp(&b.1));
    points.chunks(each).filter_map(largest).collect()
}
