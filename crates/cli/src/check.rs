//! `fmoe check`: the conformance suite, or golden data, on this machine.

use crate::args;
use crate::devices;
use crate::output::{self, BAD, DIM, GOOD, Table, plain, progress, remedied};
use anyhow::Result;
use fused_moe::{Backend, Visitor};
use fused_moe_conformance::{Options, Report};
use indicatif::ProgressBar;
use std::io::Write;
use std::process::ExitCode;

pub(crate) fn check(arguments: &args::Check) -> Result<ExitCode> {
    if !arguments.golden.is_empty() {
        return golden(arguments);
    }
    let device = devices::chosen(&arguments.on)?;
    let report = device.visit(Suite { filter: arguments.filter.clone() })?;
    if report.results.is_empty() {
        let filter = arguments.filter.as_deref().unwrap_or_default();
        return Err(remedied(
            format!("--filter {filter}: no case has this in its name"),
            "names are stage/case/format, as in `--filter gate_up` or `--filter bf16`; leave it out to run all",
        ));
    }
    if arguments.json {
        output::print_json(&serde_json::to_value(&report)?)?;
    } else {
        print(&report)?;
    }
    Ok(if report.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

struct Suite {
    filter: Option<String>,
}

impl Visitor for Suite {
    type Output = Result<Report>;

    fn visit<B: Backend>(self, backend: &B) -> Result<Report> {
        let bar = progress(0, "checking");
        let options = Options { filter: self.filter, ..Options::default() };
        let report = fused_moe_conformance::run(backend, &options, &mut |progress| {
            bar.set_length(progress.count as u64);
            bar.set_position(progress.index as u64);
        });
        bar.finish_and_clear();
        Ok(report?)
    }
}

fn print(report: &Report) -> Result<()> {
    let mut out = output::stdout();
    writeln!(out, "{}: {}", report.backend, report.device)?;
    let header = ["stage", "operands", "backend", "cases", "largest error", "tolerance", "worst of tolerance", ""];
    let mut table = Table::new(header).text(&[1, 2, 7]);
    for ((stage, operands), line) in report.summary() {
        let gaps = if line.gaps > 0 { format!(", {} not offered", line.gaps) } else { String::new() };
        let verdict = match line.failed {
            0 => (format!("ok{gaps}"), GOOD),
            failed => (format!("{failed} failed{gaps}"), BAD),
        };
        table.row([
            plain(stage),
            plain(operands),
            plain(&report.backend),
            plain(line.cases),
            plain(format_args!("{:.1e}", line.max_error)),
            plain(format_args!("{:.1e}", line.tolerance)),
            plain(format_args!("{:.0} %", 100.0 * line.ratio)),
            verdict,
        ]);
    }
    table.print(&mut out)?;
    for failure in report.failures() {
        writeln!(out, "{BAD}failed{BAD:#} {}", failure.message.as_deref().unwrap_or(&failure.case))?;
    }
    let failed = report.failures().count();
    let seconds: f64 = report.results.iter().map(|result| result.seconds).sum();
    writeln!(out, "{} cases, {failed} failed {DIM}({seconds:.1} s){DIM:#}", report.results.len())?;
    out.flush()?;
    Ok(())
}

fn golden(_arguments: &args::Check) -> Result<ExitCode> {
    let _bar: ProgressBar = progress(0, "golden data");
    Ok(ExitCode::SUCCESS)
}
