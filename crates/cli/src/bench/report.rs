//! What a person reads.

use super::backward::PassesTiming;
use super::machine::Ceilings;
use super::measure::{Timing, Verified};
use super::meter::{Meter, Pass};
use super::record::Setting;
use crate::output::{self, BOLD, DIM, GOOD, Table, WARN, bytes, counted, duration, plain, rounded};
use anyhow::Result;
use fused_moe::Backend;
use fused_moe::config::LayerConfig;
use std::io::Write;

/// What is measured, before it is; `enough` says whether the layers are so many that calls find none in the cache.
pub(crate) fn setting<M: Meter>(meter: &M, setting: &Setting<'_>, layer: u64, enough: bool) -> Result<()> {
    let mut out = output::stdout();
    let LayerConfig { hidden, intermediate, experts, top_k, .. } = *setting.config;
    let Setting { shape, dtype, routing, from, numerics, .. } = setting;
    writeln!(
        out,
        "{BOLD}{shape}{BOLD:#}: H {hidden}, I {intermediate}, E {experts}, K {top_k}; {dtype}; routing {routing}; from {from}; numerics {numerics}"
    )?;
    writeln!(out, "device   {}: {}", setting.backend, meter.backend().describe())?;
    writeln!(out, "timed    {}", meter.clock())?;
    let (layers, too_few) = match setting.layers {
        1 => (format!("one layer of {}", bytes(layer)), "so small that runs find some of it in the cache"),
        layers => {
            let turns = format!("{layers} layers of {} take turns", bytes(layer));
            (turns, "so few that runs find some of them in the cache")
        }
    };
    writeln!(out, "weights  {layers}; {}", meter.describe_cache())?;
    if !enough {
        writeln!(out, "         {WARN}{too_few}{WARN:#}")?;
    }
    out.flush()?;
    Ok(())
}

/// The times, beside what the machine allows.
pub(crate) fn timings(setting: &Setting<'_>, timings: &[Timing], machine: &[String; 2]) -> Result<()> {
    let ceilings = &setting.ceilings;
    let mut out = output::stdout();
    let by_size = timings.iter().any(|timing| timing.rate.is_some());
    let (unit, operations) = if by_size { (1e12, "TFLOP/s") } else { (1e9, "GFLOP/s") };
    let header = [
        "tokens",
        "median",
        "10 to 90 %",
        "runs",
        "experts",
        "GB/s",
        "of read",
        operations,
        if by_size { "of dense" } else { "of peak" },
        "byte floor",
        "FLOP floor",
        "x floor",
    ];
    let mut table = Table::new(header).text(&[2]).column(setting.beside.as_deref());
    for timing in timings {
        let [low, high] = timing.spread;
        let [read, arithmetic] = timing.floors(ceilings);
        let ratio = timing.median.as_secs_f64() / read.max(arithmetic).as_secs_f64();
        let style = if ratio < 1.5 { GOOD } else { WARN };
        let percent = |part: f64| plain(format_args!("{:.0} %", 100.0 * part));
        let cells = [
            plain(timing.tokens),
            plain(duration(timing.median)),
            plain(format_args!("{} to {}", duration(low), duration(high))),
            plain(timing.runs),
            plain(rounded(timing.touched)),
            plain(rounded(timing.bandwidth() / 1e9)),
            percent(timing.bandwidth() / ceilings.bandwidth),
            plain(rounded(timing.arithmetic() / unit)),
            percent(timing.arithmetic() / timing.rate(ceilings)),
            plain(duration(read)),
            plain(duration(arithmetic)),
            (rounded(ratio), style),
        ];
        table.row(cells.into_iter().chain(timing.beside.map(|time| plain(duration(time)))));
    }
    table.print(&mut out)?;
    footer(&mut out, timings.iter().map(|timing| &timing.verified), ceilings, machine)
}

/// The times of the passes of a training step, beside what the machine allows for the backward one.
pub(crate) fn passes(setting: &Setting<'_>, timings: &[PassesTiming], machine: &[String; 2]) -> Result<()> {
    let ceilings = &setting.ceilings;
    let mut out = output::stdout();
    let header = [
        "tokens",
        "forward",
        "saving",
        "backward",
        "10 to 90 %",
        "runs",
        "of forward",
        "of saving",
        "kept a token",
        "GFLOP/s",
        "byte floor",
        "FLOP floor",
        "x floor",
    ];
    let mut table = Table::new(header).text(&[4]);
    for timing in timings {
        let PassesTiming { backward, passes: [forward, saving, _], kept } = timing;
        let ([low, high], [read, arithmetic]) = (backward.spread, backward.floors(ceilings));
        let times = |ratio: f64| plain(format_args!("{ratio:.2} x"));
        table.row([
            plain(backward.tokens),
            plain(duration(forward.median)),
            plain(duration(saving.median)),
            plain(duration(backward.median)),
            plain(format_args!("{} to {}", duration(low), duration(high))),
            plain(backward.runs),
            times(timing.over(Pass::Forward)),
            times(timing.over(Pass::Saving)),
            plain(bytes(*kept as u64)),
            plain(rounded(backward.arithmetic() / 1e9)),
            plain(duration(read)),
            plain(duration(arithmetic)),
            plain(rounded(backward.median.as_secs_f64() / read.max(arithmetic).as_secs_f64())),
        ]);
    }
    table.print(&mut out)?;
    footer(&mut out, timings.iter().map(|timing| &timing.backward.verified), ceilings, machine)
}

/// What the machine can do, and what was checked.
fn footer<'a>(
    out: &mut impl Write,
    verified: impl Iterator<Item = &'a Verified> + Clone,
    ceilings: &Ceilings,
    [read, arithmetic]: &[String; 2],
) -> Result<()> {
    writeln!(out, "machine  {read}\n         {arithmetic}")?;
    if ceilings.vary() {
        let [slowest, best] = [ceilings.slowest, ceilings.bandwidth].map(|rate| rounded(rate / 1e9));
        writeln!(
            out,
            "         {WARN}of the read bandwidths before and after, one is {best} GB/s and one {slowest}, as where other work is done or clocks change: times and floors may be too long{WARN:#}"
        )?;
    }
    let rows: usize = verified.clone().map(|verified| verified.rows).sum();
    let error = verified.clone().map(|verified| verified.error).fold(0.0, f64::max);
    let allowed = verified.map(|verified| verified.tolerance).fold(0.0, f64::max);
    writeln!(
        out,
        "{DIM}checked: {} of what the timed calls left, against f64: largest error {error:.1e} of the largest value, {allowed:.1e} allowed{DIM:#}",
        counted(rows, "row")
    )?;
    out.flush()?;
    Ok(())
}
