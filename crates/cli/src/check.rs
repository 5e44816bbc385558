//! `fmoe check`: the conformance suite, or golden data, on this machine.

use crate::args;
use crate::devices;
use crate::output::{self, BAD, DIM, GOOD, Table, checkpoint_error, counted, plain, progress, remedied};
use anstyle::Style;
use anyhow::Result;
use fused_moe::{Backend, BackendBackward, Device, Visitor, cuda};
use fused_moe_conformance::backward::backward_cases;
use fused_moe_conformance::golden::{GoldenError, GoldenReport, GoldenResult, check_golden};
use fused_moe_conformance::{Options, Progress, Report, Scale, cases, run, run_backward};
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
    let scale = if arguments.full { Scale::Full } else { Scale::Quick };
    let report = if arguments.backward {
        gradients(&device, arguments.filter.clone(), scale)?
    } else {
        device.visit(Suite { filter: arguments.filter.clone(), scale })?
    };
    if report.results.is_empty() {
        return Err(nothing_found(arguments.filter.as_deref().unwrap_or_default(), arguments));
    }
    if arguments.json {
        output::print_json(&serde_json::to_value(&report)?)?;
    } else {
        print(&report)?;
    }
    Ok(if report.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// No case that was asked for has this in its name; where others have, the help says which options ask for them.
fn nothing_found(filter: &str, arguments: &args::Check) -> anyhow::Error {
    let found = |&(backward, scale): &(bool, Scale)| match backward {
        true => backward_cases(scale).iter().any(|case| case.id().contains(filter)),
        false => cases(scale).iter().any(|case| case.id().contains(filter)),
    };
    let (own, other) = (arguments.backward, !arguments.backward);
    let scale = if arguments.full { Scale::Full } else { Scale::Quick };
    let others = [(other, scale), (own, Scale::Full), (other, Scale::Full)];
    let help = match others.iter().find(|others| found(others)) {
        Some(&(backward, size)) => match (backward == own, backward, size == scale) {
            (true, ..) => "there are such cases with --full",
            (false, true, true) => "there are such cases with --backward",
            (false, true, false) => "there are such cases with --backward --full",
            (false, false, true) => "there are such cases without --backward",
            (false, false, false) => "there are such cases with --full, without --backward",
        },
        None => "names are stage/case/format, as in `--filter gate_up` or `--filter bf16`; leave it out to run all",
    };
    remedied(format!("--filter {filter}: no case has this in its name"), help)
}

/// Every kernel of every plan, as NVRTC makes them.
fn compile(architectures: &[String]) -> Result<ExitCode> {
    let failed = |error: cuda::Error| {
        let help = match error {
            cuda::Error::Compile { .. } => {
                "the log says what NVRTC does not take; a newer one may know the architecture"
            }
            _ => {
                "NVRTC comes with the CUDA toolkit and with the Python package nvidia-cuda-nvrtc; FMOE_NVRTC may name it"
            }
        };
        remedied(error.to_string(), help)
    };
    let (name, (major, minor)) = cuda::compiler().map_err(failed)?;
    devices::warn_of_cache();
    let mut out = output::stdout();
    writeln!(out, "compiler {name}, NVRTC {major}.{minor}")?;
    for architecture in architectures {
        let bar = progress(0, &format!("kernels for {architecture}"));
        let start = Instant::now();
        let count = cuda::compile_all(architecture).map_err(failed);
        bar.finish_and_clear();
        let count = counted(count?, "kernel");
        writeln!(out, "{count} for {architecture} in {:.1} s", start.elapsed().as_secs_f64())?;
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

/// The suite of the gradients, which not every backend has.
fn gradients(device: &Device, filter: Option<String>, scale: Scale) -> Result<Report> {
    let options = Options { filter, scale, ..Options::default() };
    match device {
        Device::Cpu(cpu) => gradients_of(cpu, &options),
        Device::Cuda(cuda) => gradients_of(cuda, &options),
        Device::Wgpu(wgpu) => gradients_of(wgpu, &options),
        _ => Err(remedied("--backward: this backend has no gradients", "--backend cpu has them")),
    }
}

fn gradients_of<B: BackendBackward>(backend: &B, options: &Options) -> Result<Report> {
    watched(|progress| run_backward(backend, options, progress))
}

/// A run of a suite, and how far it is.
fn watched<E: Into<anyhow::Error>>(
    suite: impl FnOnce(&mut dyn FnMut(&Progress<'_>)) -> Result<Report, E>,
) -> Result<Report> {
    let bar = progress(0, "checking");
    let report = suite(&mut |progress| {
        bar.set_length(progress.count as u64);
        bar.set_position(progress.index as u64);
    });
    bar.finish_and_clear();
    report.map_err(Into::into)
}

struct Suite {
    filter: Option<String>,
    scale: Scale,
}

impl Visitor for Suite {
    type Output = Result<Report>;

    fn visit<B: Backend>(self, backend: &B) -> Result<Report> {
        let options = Options { filter: self.filter, scale: self.scale, ..Options::default() };
        watched(|progress| run(backend, &options, progress))
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
    let cases = counted(report.results.len(), "case");
    writeln!(out, "{cases}, {failed} failed {DIM}({seconds:.1} s){DIM:#}")?;
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
    let mut verdicts: Vec<(_, Result<GoldenReport>)> = Vec::new();
    for folder in folders {
        verdicts.push((folder, device.visit(Folder(folder))));
        bar.inc(1);
    }
    bar.finish_and_clear();
    let failed = verdicts.iter().filter(|(_, verdict)| !verdict.as_ref().is_ok_and(GoldenReport::passed)).count();
    if let [(_, Err(_))] = verdicts.as_slice() {
        return verdicts.remove(0).1.map(|_| ExitCode::FAILURE);
    }
    if arguments.json {
        output::print_json(&verdicts.iter().map(|(folder, verdict)| as_json(folder, verdict)).collect())?;
    } else {
        let header =
            ["folder", "layer", "format", "tokens", "rerouted", "weights", "experts", "output", "tolerance", ""];
        let mut table = Table::new(header).text(&[2, 9]);
        for (folder, verdict) in &verdicts {
            lines(folder, verdict).into_iter().for_each(|line| table.row(line));
        }
        let mut out = output::stdout();
        table.print(&mut out)?;
        for (folder, report) in verdicts.iter().filter_map(|(folder, verdict)| Some((folder, verdict.as_ref().ok()?))) {
            for GoldenResult { input, dtype, message, .. } in &report.results {
                if let Some(message) = message {
                    writeln!(out, "{BAD}failed{BAD:#} {}, input {input}, {dtype}: {message}", folder.display())?;
                }
            }
        }
        writeln!(out, "{}, {failed} failed", counted(verdicts.len(), "folder"))?;
        out.flush()?;
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A folder to be compared with.
struct Folder<'a>(&'a Path);

impl Visitor for Folder<'_> {
    type Output = Result<GoldenReport>;

    fn visit<B: Backend>(self, backend: &B) -> Result<GoldenReport> {
        check_golden(backend, self.0).map_err(|error| {
            let message = error.to_string();
            match (error, message.rsplit_once("; ")) {
                (GoldenError::Checkpoint(error), _) => checkpoint_error(error),
                (GoldenError::File { .. } | GoldenError::Content { .. }, Some((message, help))) => {
                    remedied(message, help)
                }
                (error, _) => anyhow::Error::new(error).context(format!("{}", self.0.display())),
            }
        })
    }
}

/// A line for each format, the worst of all inputs.
fn lines(folder: &Path, verdict: &Result<GoldenReport>) -> Vec<Vec<(String, Style)>> {
    let name = folder.canonicalize().ok().and_then(|path| path.file_name().map(|name| name.display().to_string()));
    let name = plain(name.unwrap_or_else(|| folder.display().to_string()));
    let report = match verdict {
        Ok(report) => report,
        Err(error) => {
            let mut cells = vec![plain("-"); 9];
            cells[0] = name;
            cells.push((format!("failed: {error:#}"), BAD));
            return vec![cells];
        }
    };
    let mut formats: Vec<&str> = report.results.iter().map(|result| result.dtype.as_str()).collect();
    formats.sort_unstable();
    formats.dedup();
    let line = |dtype: &str| {
        let results = || report.results.iter().filter(|result| result.dtype == dtype);
        let worst = |error: fn(&GoldenResult) -> Option<f64>| {
            let worst = results().filter_map(error).reduce(f64::max);
            worst.map_or(plain("-"), |error| plain(format_args!("{error:.1e}")))
        };
        vec![
            name.clone(),
            plain(report.layer),
            plain(dtype),
            plain(results().map(|result| result.tokens).sum::<usize>()),
            plain(results().map(|result| result.other_routes).sum::<usize>()),
            worst(|result| Some(result.weights_error)),
            worst(|result| result.experts_error),
            worst(|result| Some(result.output_error)),
            worst(|result| Some(result.tolerance)),
            if results().all(|result| result.message.is_none()) { ("ok".into(), GOOD) } else { ("failed".into(), BAD) },
        ]
    };
    formats.into_iter().map(line).collect()
}

/// The report with `passed` beside it, or why there is none.
fn as_json(folder: &Path, verdict: &Result<GoldenReport>) -> serde_json::Value {
    match verdict {
        Ok(report) => {
            let mut json = json!(report);
            json["passed"] = report.passed().into();
            json
        }
        Err(error) => json!({ "folder": folder, "passed": false, "error": format!("{error:#}") }),
    }
}
