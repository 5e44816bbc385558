//! The losses of the runs beside the loads of their experts, as an SVG.

use crate::Trained;
use std::fmt::{self, Write};

/// Of the runs.
const COLOURS: [&str; 2] = ["#d1495b", "#00798c"];
const INK: &str = "#30343b";
const FAINT: &str = "#d9dce1";
/// Of both panels.
const TOP: f64 = 64.0;
const BOTTOM: f64 = 300.0;

/// A panel's place, and what it shows there.
struct Panel {
    left: f64,
    right: f64,
    /// The lowest and the highest value.
    range: [f64; 2],
    /// Whether equal distances are equal ratios.
    logarithmic: bool,
}

impl Panel {
    fn x(&self, part: f64) -> f64 {
        self.left + part * (self.right - self.left)
    }

    fn y(&self, value: f64) -> f64 {
        let [least, most] = self.range;
        let part = if self.logarithmic {
            (value.clamp(least, most) / least).ln() / (most / least).ln()
        } else {
            (value - least) / (most - least)
        };
        BOTTOM - part * (BOTTOM - TOP)
    }

    /// Title, lines with their values, axis.
    fn frame(&self, out: &mut String, title: &str, ticks: &[(f64, String)], below: &str) -> fmt::Result {
        let Self { left, right, .. } = *self;
        writeln!(out, r#"<text x="{left}" y="40" font-size="15" font-weight="600">{title}</text>"#)?;
        for (value, label) in ticks {
            let y = self.y(*value);
            writeln!(out, r#"<path d="M{left} {y:.1}H{right}" stroke="{FAINT}"/>"#)?;
            let (x, y) = (left - 8.0, y + 4.0);
            writeln!(out, r#"<text x="{x}" y="{y:.1}" text-anchor="end">{label}</text>"#)?;
        }
        writeln!(out, r#"<path d="M{left} {BOTTOM}H{right}" stroke="{INK}"/>"#)?;
        let (x, y) = (self.x(0.5), BOTTOM + 38.0);
        writeln!(out, r#"<text x="{x}" y="{y}" text-anchor="middle">{below}</text>"#)
    }
}

/// The drawing.
pub(crate) fn svg(runs: &[Trained; 2]) -> Result<String, fmt::Error> {
    let mut out = String::new();
    writeln!(
        out,
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 390" font-family="system-ui, sans-serif" font-size="12" fill="{INK}" stroke-width="1">"#
    )?;
    writeln!(out, r#"<rect width="900" height="390" rx="8" fill="white"/>"#)?;
    losses(&mut out, runs)?;
    loads(&mut out, runs)?;
    for (i, (run, colour)) in runs.iter().zip(COLOURS).enumerate() {
        let x = 320.0 + 150.0 * i as f64;
        writeln!(out, r#"<rect x="{x}" y="360" width="12" height="12" rx="2" fill="{colour}"/>"#)?;
        writeln!(out, r#"<text x="{}" y="370">{}</text>"#, x + 18.0, run.name)?;
    }
    writeln!(out, "</svg>")?;
    Ok(out)
}

fn losses(out: &mut String, runs: &[Trained; 2]) -> fmt::Result {
    /// Points of a curve at most, each the mean of some steps.
    const POINTS: usize = 150;
    let steps = runs[0].losses.len();
    let panel = Panel { left: 52.0, right: 430.0, range: [0.1, 5.0], logarithmic: true };
    let ticks = [0.1, 0.2, 0.5, 1.0, 2.0, 5.0].map(|loss| (loss, loss.to_string()));
    panel.frame(out, "Loss: cross-entropy of the next letter", &ticks, "steps")?;
    for part in [0.0, 0.5, 1.0] {
        let (x, y, step) = (panel.x(part), BOTTOM + 18.0, (part * steps as f64).round());
        writeln!(out, r#"<text x="{x}" y="{y}" text-anchor="middle">{step}</text>"#)?;
    }
    // the first one broad, so that it is seen behind the other
    for ((run, colour), thickness) in runs.iter().zip(COLOURS).zip([4.5, 1.6]) {
        let width = steps.div_ceil(POINTS);
        let mut path = String::new();
        for (i, losses) in run.losses.chunks(width).enumerate() {
            let x = panel.x((i * width) as f64 / steps as f64);
            let y = panel.y(f64::from(crate::mean(losses)));
            write!(path, "{}{x:.1} {y:.1}", if i == 0 { "M" } else { "L" })?;
        }
        writeln!(
            out,
            r#"<path d="{path}" fill="none" stroke="{colour}" stroke-width="{thickness}" stroke-linejoin="round"/>"#
        )?;
    }
    Ok(())
}

fn loads(out: &mut String, runs: &[Trained; 2]) -> fmt::Result {
    let experts = runs[0].load.len();
    let share = 1.0 / experts as f64;
    let highest = runs.iter().flat_map(|run| &run.load).fold(share, |most, &part| most.max(part));
    let panel = Panel { left: 500.0, right: 880.0, range: [0.0, 1.1 * highest], logarithmic: false };
    let step = if highest > 0.25 { 0.1 } else { 0.05 };
    let ticks: Vec<_> = (0..).map(|i| f64::from(i) * step).take_while(|part| *part <= panel.range[1]).collect();
    let ticks: Vec<_> = ticks.into_iter().map(|part| (part, format!("{:.0} %", 100.0 * part))).collect();
    let below = "experts, the busiest first";
    panel.frame(out, "Load of the experts: part of all slots", &ticks, below)?;
    let pitch = (panel.right - panel.left) / experts as f64;
    let width = 0.4 * pitch;
    for (i, (run, colour)) in runs.iter().zip(COLOURS).enumerate() {
        for (e, &part) in run.load.iter().enumerate() {
            let x = panel.left + pitch * (e as f64 + 0.1 + 0.4 * i as f64);
            let (y, height) = (panel.y(part), BOTTOM - panel.y(part));
            writeln!(out, r#"<rect x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}" fill="{colour}"/>"#)?;
        }
    }
    let Panel { left, right, .. } = panel;
    let y = panel.y(share);
    writeln!(out, r#"<path d="M{left} {y:.1}H{right}" stroke="{INK}" stroke-dasharray="5 4"/>"#)?;
    writeln!(out, r#"<text x="{right}" y="{:.1}" text-anchor="end">an even share</text>"#, y - 6.0)
}
