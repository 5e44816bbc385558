//! `fmoe check`: the conformance suite, or golden data, on this machine.

mod golden;

use crate::args;
use crate::devices;
use crate::output::{self, BAD, DIM, GOOD, Table, plain, progress, remedied};
use anstyle::Style;
use anyhow::Result;
use fused_moe::{Backend, Visitor, cuda};
use fused_moe_conformance::{Options, Report};
use golden::Verdict;
use serde_json::json;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

pub(crate) fn check(arguments: &args::Check) -> Result<ExitCode> {
    if !arguments.golden.is_empty() {
        return folders(arguments);
    }
    if let Some(architectures) = &arguments.compile_only {
        return compile(architectures);
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

/// Every kernel of every plan, as NVRTC makes them.
fn compile(architectures: &[String]) -> Result<ExitCode> {
    let help =
        "NVRTC comes with the CUDA toolkit and with the Python package nvidia-cuda-nvrtc; FMOE_NVRTC may name it";
    let failed = |error: cuda::Error| remedied(error.to_string(), help);
    let (name, (major, minor)) = cuda::compiler().map_err(failed)?;
    let mut out = output::stdout();
    writeln!(out, "compiler {name}, NVRTC {major}.{minor}")?;
    for architecture in architectures {
        let bar = progress(0, &format!("kernels for {architecture}"));
        let start = Instant::now();
        let count = cuda::compile_all(architecture).map_err(failed);
        bar.finish_and_clear();
        writeln!(out, "{} kernels for {architecture} in {:.1} s", count?, start.elapsed().as_secs_f64())?;
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
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

/// Every folder on a line of its own.
fn folders(arguments: &args::Check) -> Result<ExitCode> {
    let device = devices::chosen(&arguments.on)?;
    // a glob over folders brings what lies beside them
    let (files, folders): (Vec<_>, Vec<_>) = arguments.golden.iter().partition(|path| path.is_file());
    if let ([first, ..], []) = (files.as_slice(), folders.as_slice()) {
        return Err(remedied(format!("{}: is a file", first.display()), "give folders with config.json in them"));
    }
    let bar = progress(folders.len() as u64, "golden data");
    let mut verdicts = Vec::new();
    for folder in folders {
        verdicts.push((folder, golden::compare(&device, folder)));
        bar.inc(1);
    }
    bar.finish_and_clear();
    let failed = verdicts.iter().filter(|(_, verdict)| !verdict.as_ref().is_ok_and(Verdict::passed)).count();
    if let [(_, Err(_))] = verdicts.as_slice() {
        return verdicts.remove(0).1.map(|_| ExitCode::FAILURE);
    }
    if arguments.json {
        output::print_json(&verdicts.iter().map(|(folder, verdict)| as_json(folder, verdict)).collect())?;
    } else {
        let mut table =
            Table::new(["folder", "layer", "tokens", "rerouted", "weights", "experts", "output", "tolerance", ""]);
        table = table.text(&[8]);
        for (folder, verdict) in &verdicts {
            table.row(line(folder, verdict));
        }
        let mut out = output::stdout();
        table.print(&mut out)?;
        writeln!(out, "{} folders, {failed} failed", verdicts.len())?;
        out.flush()?;
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn line(folder: &Path, verdict: &Result<Verdict>) -> Vec<(String, Style)> {
    let name = folder.canonicalize().ok().and_then(|path| path.file_name().map(|name| name.display().to_string()));
    let name = plain(name.unwrap_or_else(|| folder.display().to_string()));
    let error = |error: f64| plain(format_args!("{error:.1e}"));
    match verdict {
        Ok(verdict) => vec![
            name,
            plain(verdict.layer),
            plain(verdict.tokens),
            plain(verdict.rerouted),
            error(verdict.weights),
            verdict.experts.map_or(plain("-"), error),
            error(verdict.output),
            error(verdict.tolerance),
            if verdict.passed() { ("ok".into(), GOOD) } else { ("failed".into(), BAD) },
        ],
        Err(error) => {
            let mut cells = vec![plain("-"); 8];
            cells[0] = name;
            cells.push((format!("failed: {error:#}"), BAD));
            cells
        }
    }
}

fn as_json(folder: &Path, verdict: &Result<Verdict>) -> serde_json::Value {
    match verdict {
        Ok(verdict) => json!({
            "folder": folder,
            "passed": verdict.passed(),
            "layer": verdict.layer,
            "tokens": verdict.tokens,
            "rerouted": verdict.rerouted,
            "weights_error": verdict.weights,
            "experts_error": verdict.experts,
            "output_error": verdict.output,
            "tolerance": verdict.tolerance,
        }),
        Err(error) => json!({ "folder": folder, "passed": false, "error": format!("{error:#}") }),
    }
}
