//! `fmoe run`: layers of a checkpoint on an input.

mod call;

use crate::args;
use crate::devices;
use crate::output::{
    self, BAD, BOLD, DIM, GOOD, bytes, checkpoint_error, counted, duration, histogram, progress, remedied, rounded,
};
use crate::tensors::{self, Tensor, floats};
use anyhow::Result;
use fused_moe::checkpoint::{Checkpoint, CheckpointLayer, write_safetensors};
use fused_moe::{DType, Device, HostView, Statistics};
use fused_moe_conformance::tolerance;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tempfile::TempDir;

use call::{Once, Ran};

/// Tokens of a random input where the command line does not say.
const TOKENS: usize = 32;

/// A small layer that comes with the program: config.json, model.safetensors, golden.safetensors.
const CONFIG: &[u8] = include_bytes!("../../fused-moe/tests/goldens/qwen3_moe/config.json");
const MODEL: &[u8] = include_bytes!("../../fused-moe/tests/goldens/qwen3_moe/model.safetensors");
const GOLDEN: &[u8] = include_bytes!("../../fused-moe/tests/goldens/qwen3_moe/golden.safetensors");

/// The layer whose input and output [`GOLDEN`] holds.
const GOLDEN_LAYER: usize = 1;

pub(crate) fn run(arguments: &args::Run) -> Result<ExitCode> {
    if let Some(output) = &arguments.output {
        writable(output)?;
    }
    match &arguments.checkpoint {
        Some(path) => {
            let checkpoint = output::open(path, arguments.part.as_deref())?;
            let device = devices::chosen(&arguments.on)?;
            if let Some(output) = &arguments.output {
                unlike_inputs(output, arguments, &checkpoint)?;
            }
            let Chosen { layers, unable } = chosen_layers(arguments, &checkpoint)?;
            for (index, problem) in &unable {
                output::warn(format_args!("layer {index} cannot run: {problem}"));
            }
            let [first, ..] = layers.as_slice() else {
                return if unable.is_empty() { Err(no_layer(&checkpoint)) } else { Ok(ExitCode::FAILURE) };
            };
            let input = match &arguments.input {
                Some(name) => Tensor::read(name)?,
                None => random(arguments, first)?,
            };
            let expected = arguments.expect.as_deref().map(Tensor::read).transpose()?;
            let ids = token_ids(arguments, &layers, &input)?;
            let state = router_state(arguments, first, &input)?;
            let passed = Run { arguments, device, layers, input, expected, ids, state }.run()?;
            Ok(if passed && unable.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        None => {
            let device = devices::chosen(&arguments.on)?;
            let folder = built_in()?;
            let checkpoint = Checkpoint::open(folder.path()).map_err(checkpoint_error)?;
            let layer = checkpoint.layer(GOLDEN_LAYER).map_err(checkpoint_error)?;
            let golden = |name| Tensor::parse(Path::new("(built in)"), GOLDEN, Some(name));
            let (input, expected) = match arguments.tokens {
                Some(_) => (random(arguments, &layer)?, None),
                None => (golden("input.0")?, Some(golden("output_f64.0")?)),
            };
            writeln!(output::stdout(), "a small qwen3_moe layer that comes with fmoe")?;
            let run = Run { arguments, device, layers: vec![layer], input, expected, ids: None, state: None };
            Ok(if run.run()? { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
    }
}

/// The layer that comes with the program, in a directory of its own.
fn built_in() -> Result<TempDir> {
    let folder = tempfile::Builder::new().prefix("fmoe-").tempdir().map_err(|error| {
        let message = format!("{}: cannot make a directory: {error}", std::env::temp_dir().display());
        remedied(message, "set TMPDIR to a directory that can be written to, or give a checkpoint")
    })?;
    for (name, contents) in [("config.json", CONFIG), ("model.safetensors", MODEL)] {
        let path = folder.path().join(name);
        std::fs::write(&path, contents).map_err(|error| {
            let message = format!("{}: cannot write: {error}", path.display());
            remedied(message, "set TMPDIR to a directory with some free space, or give a checkpoint")
        })?;
    }
    Ok(folder)
}

/// The layers to run.
struct Chosen<'a> {
    layers: Vec<CheckpointLayer<'a>>,
    /// Of all of a model, the numbers of those that cannot run, and why.
    unable: Vec<(usize, String)>,
}

fn chosen_layers<'a>(arguments: &args::Run, checkpoint: &'a Checkpoint) -> Result<Chosen<'a>> {
    let load = |index| checkpoint.layer(index).map_err(checkpoint_error);
    if !arguments.all {
        // where the files hold none, the first says what is missing
        let first = || checkpoint.first_stored_layer().or(checkpoint.layers().first().copied());
        let chosen = arguments.layer.or_else(first).map(load).transpose()?;
        return Ok(Chosen { layers: chosen.into_iter().collect(), unable: Vec::new() });
    }
    let (mut layers, mut unable) = (Vec::new(), Vec::new());
    for layer in checkpoint.inspect().layers {
        match layer.problem {
            Some(problem) => unable.push((layer.index, problem)),
            None => layers.push(load(layer.index)?),
        }
    }
    Ok(Chosen { layers, unable })
}

/// The ids of the input's tokens, where a layer chooses experts by them: those that are named, else those beside the input.
fn token_ids(arguments: &args::Run, layers: &[CheckpointLayer<'_>], input: &Tensor) -> Result<Option<Vec<u32>>> {
    let tables = layers.iter().filter_map(|layer| Some((layer.index, layer.weights.table.as_ref()?.vocabulary)));
    let Some((layer, vocabulary)) = tables.min_by_key(|(_, vocabulary)| *vocabulary) else {
        return match &arguments.ids {
            Some(ids) => {
                let message = format!("--ids {ids}: no layer of this run chooses experts by token id");
                Err(remedied(message, "leave --ids out"))
            }
            None => Ok(None),
        };
    };
    let Some(source) = &arguments.input else { return Ok(None) };
    let beside = || tensors::companion(source, "input_ids");
    let Some(ids) = arguments.ids.clone().map_or_else(beside, |ids| Ok(Some(ids)))? else {
        let message = format!("layer {layer}: chooses experts by token id, and {} has none", input.origin);
        return Err(remedied(
            message,
            "add them to its file as tensor `input_ids`, or name one with --ids FILE[:TENSOR]",
        ));
    };
    tensors::ids(&ids, input.shape.rows(), vocabulary).map(Some)
}

/// Whether a router takes up the state of the one before: the first does not.
fn takes_state(layer: &CheckpointLayer<'_>) -> bool {
    layer.weights.router_mlp.is_some_and(|mlp| mlp.state_scale.is_some())
}

/// What the router before the first layer hands on, if it is beside the input.
fn router_state(arguments: &args::Run, first: &CheckpointLayer<'_>, input: &Tensor) -> Result<Option<Vec<f32>>> {
    let (Some(source), Some(mlp)) = (&arguments.input, first.config.router_mlp) else { return Ok(None) };
    if !takes_state(first) {
        return Ok(None);
    }
    let Some(name) = tensors::companion(source, "router_state")? else { return Ok(None) };
    let state = Tensor::read(&name)?;
    let (found, needed) = ([state.shape.rows(), state.shape.cols()], [input.shape.rows(), mlp.width]);
    if found != needed {
        return Err(remedied(
            format!("{}: shape {}, layer {} takes {needed:?}", state.origin, state.shape, first.index),
            "it is what the router of the layer before hands on, a row for each token",
        ));
    }
    Ok(Some(state.values().map(|x| x as f32).collect()))
}

fn no_layer(checkpoint: &Checkpoint) -> anyhow::Error {
    // a model that is dense by config.json and has experts says so
    if let Some(layer) = checkpoint.inspect().layers.first()
        && let Err(error) = checkpoint.layer(layer.index)
    {
        return checkpoint_error(error);
    }
    let message = format!("{}: the model has no layer with experts", checkpoint.path().display());
    remedied(message, "its config.json describes dense layers only; give an MoE model")
}

fn random(arguments: &args::Run, layer: &CheckpointLayer<'_>) -> Result<Tensor> {
    Tensor::random(arguments.tokens.unwrap_or(TOKENS), layer.config.hidden, arguments.seed)
}

/// Errors before anything is computed where the output can not be written.
fn writable(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Err(remedied(format!("{}: is a directory", path.display()), "give --output the name of a file"));
    }
    if path.exists() && !path.is_file() {
        let message = format!("{}: is no regular file", path.display());
        return Err(remedied(message, "give --output the name of a file, new or to be replaced"));
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !folder.metadata().is_ok_and(|data| data.is_dir()) {
        return Err(remedied(format!("{}: {} is no directory", path.display(), folder.display()), "make it first"));
    }
    // the file is written beside its name and takes its place
    match tempfile::tempfile_in(folder) {
        Ok(_) => Ok(()),
        Err(error) => Err(remedied(
            format!("{}: cannot write into {}: {error}", path.display(), folder.display()),
            "check the permissions of the directory, or name another",
        )),
    }
}

/// Errors where the output would take the place of something that the run reads.
fn unlike_inputs(output: &Path, arguments: &args::Run, checkpoint: &Checkpoint) -> Result<()> {
    // what is not there yet takes no place
    let Ok(target) = output.canonicalize() else { return Ok(()) };
    let same = |path: &Path| path.canonicalize().is_ok_and(|path| path == target);
    let beside = |file: &PathBuf| {
        let names = ["config.json", "model.safetensors.index.json"].map(|name| file.with_file_name(name));
        [vec![file.clone()], names.into()].concat()
    };
    let read = [("--input", &arguments.input), ("--expect", &arguments.expect)];
    let read = read.into_iter().find(|(_, name)| name.as_ref().is_some_and(|name| same(&tensors::split(name).0)));
    let what = match read {
        Some((option, _)) => format!("the file of {option}"),
        None if checkpoint.inspect().files.iter().flat_map(beside).any(|file| same(&file)) => {
            "a file of the checkpoint".to_owned()
        }
        None => return Ok(()),
    };
    Err(remedied(format!("--output {}: is {what}", output.display()), "give --output another name"))
}

struct Run<'a> {
    arguments: &'a args::Run,
    device: Device,
    layers: Vec<CheckpointLayer<'a>>,
    input: Tensor,
    expected: Option<Tensor>,
    ids: Option<Vec<u32>>,
    /// What the router before the first layer hands on.
    state: Option<Vec<f32>>,
}

impl Run<'_> {
    /// Whether every output is what is expected of it.
    fn run(&self) -> Result<bool> {
        self.check()?;
        self.warn_about_input();
        let mut outputs = Vec::new();
        let mut passed = true;
        let mut state = self.state.clone();
        let bar = progress(self.layers.len() as u64, "layers");
        for layer in &self.layers {
            let outputs_kept = if self.arguments.output.is_some() { self.layers.len() } else { 1 };
            let seed = self.arguments.seed;
            if state.is_none() && takes_state(layer) {
                let missing = "its router takes up the state of the layer before, and nothing beside the input has it";
                output::warn(format_args!("layer {}: {missing} (tensor router_state)", layer.index));
            }
            let (ids, handed) = (self.ids.as_deref(), state.as_deref().filter(|_| takes_state(layer)));
            let largest = self.largest_buffer();
            let once = Once { layer, input: &self.input, ids, state: handed, seed, outputs_kept, largest };
            let ran = self.device.visit(once)?;
            bar.inc(1);
            passed &= bar.suspend(|| self.show(layer, &ran))?;
            state = ran.state.clone();
            if self.arguments.output.is_some() {
                outputs.push((layer.index, ran));
            }
        }
        bar.finish_and_clear();
        if let Some(path) = &self.arguments.output {
            self.write(path, &outputs)?;
        }
        Ok(passed)
    }

    /// Bytes that a tensor on the device may have.
    fn largest_buffer(&self) -> u64 {
        match &self.device {
            Device::Wgpu(wgpu) => wgpu.numbers().buffer_bytes,
            _ => u64::MAX,
        }
    }

    /// Whether the output is what is expected, if anything is; says all about the run.
    fn show(&self, layer: &CheckpointLayer<'_>, ran: &Ran) -> Result<bool> {
        if self.arguments.all {
            self.line(layer, ran)?;
        } else {
            self.report(layer, ran)?;
        }
        if !ran.status.is_ok() {
            output::warn(format_args!("layer {}: {}", layer.index, ran.status));
        }
        let odd = floats(self.input.dtype, &ran.y).filter(|y| !y.is_finite()).count();
        if odd > 0 {
            let whence = if self.input.values().all(f64::is_finite) {
                "though the input was finite: the weights are not, or a sum passes the range of the format"
            } else {
                "as is some of the input"
            };
            output::warn(format_args!("layer {}: {}, {whence}", layer.index, not_finite(odd, "output")));
        }
        match &self.expected {
            Some(expected) => self.compare(layer, expected, ran),
            None => Ok(true),
        }
    }

    /// The widths of the input and of what is expected.
    fn check(&self) -> Result<()> {
        for layer in &self.layers {
            let hidden = layer.config.hidden;
            if self.input.shape.cols() != hidden {
                return Err(remedied(
                    format!(
                        "{}: shape {}, layer {} takes [T, {hidden}] or [B, S, {hidden}]",
                        self.input.origin, self.input.shape, layer.index
                    ),
                    "the input must be as wide as the model's hidden_size",
                ));
            }
        }
        if let Some(expected) = &self.expected {
            let (e, x) = (expected.shape, self.input.shape);
            if (e.rows(), e.cols()) != (x.rows(), x.cols()) {
                return Err(remedied(
                    format!("{}: shape {e}, the output has {x}", expected.origin),
                    "the expectation must have the shape of the input",
                ));
            }
        }
        Ok(())
    }

    fn warn_about_input(&self) {
        if self.input.narrowed {
            output::warn(format_args!("{}: f64, converted to f32", self.input.origin));
        }
        // random numbers are finite, and not to be made before it is known whether they fit
        let odd = if self.input.is_random() { 0 } else { self.input.values().filter(|x| !x.is_finite()).count() };
        if odd > 0 {
            output::warn(format_args!("{}: {}", self.input.origin, not_finite(odd, "input")));
        }
    }

    fn report(&self, layer: &CheckpointLayer<'_>, ran: &Ran) -> Result<()> {
        let mut out = output::stdout();
        let config = &layer.config;
        let name = if layer.name.is_empty() { "" } else { &layer.name };
        writeln!(out, "{BOLD}layer {}{BOLD:#} {DIM}{name}{DIM:#}", layer.index)?;
        write!(
            out,
            "shape    H {}, I {}, E {}, K {}",
            config.hidden, config.intermediate, config.experts, config.top_k
        )?;
        if let Some(shared) = &config.shared {
            write!(out, ", S {}", shared.intermediate)?;
        }
        let dtype = layer.weights.experts.iter().next().map_or(DType::F32, |expert| expert.up.dtype());
        writeln!(out, "; weights {dtype}")?;
        writeln!(out, "input    {} {}, {}", self.input.dtype, self.input.shape, self.input.origin)?;
        let counts = &ran.counts;
        let Statistics { total, max, mean, imbalance, dead, .. } = Statistics::from_counts(counts);
        let min = counts.iter().min().copied().unwrap_or(0);
        writeln!(
            out,
            "routing  {}; tokens per expert {min} to {max}, mean {}; imbalance {}; {dead} of {} unused",
            counted(total, "slot"),
            rounded(mean),
            rounded(imbalance),
            counted(counts.len(), "expert")
        )?;
        if let Some(elsewhere) = elsewhere(ran) {
            writeln!(out, "         {elsewhere}")?;
        }
        let bars = histogram(counts);
        if !bars.is_empty() {
            writeln!(out, "         {bars}")?;
        }
        writeln!(
            out,
            "time     {} (median of {} on {}), {} of weights: {} GB/s",
            duration(ran.median),
            ran.runs,
            ran.device,
            bytes(ran.bytes),
            rounded(ran.bandwidth())
        )?;
        out.flush()?;
        Ok(())
    }

    fn line(&self, layer: &CheckpointLayer<'_>, ran: &Ran) -> Result<()> {
        let Statistics { imbalance, dead, .. } = Statistics::from_counts(&ran.counts);
        let mut out = output::stdout();
        writeln!(
            out,
            "layer {:>3}  {:>9}  {:>6} GB/s  imbalance {:>5}  {dead} of {} unused{}  {DIM}{}{DIM:#}",
            layer.index,
            duration(ran.median),
            rounded(ran.bandwidth()),
            rounded(imbalance),
            counted(ran.counts.len(), "expert"),
            elsewhere(ran).map(|text| format!("; {text}")).unwrap_or_default(),
            histogram(&ran.counts)
        )?;
        out.flush()?;
        Ok(())
    }

    /// Whether the output is what is expected; says so.
    fn compare(&self, layer: &CheckpointLayer<'_>, expected: &Tensor, ran: &Ran) -> Result<bool> {
        let config = &layer.config;
        let inner = config.hidden + config.intermediate + config.top_k + config.shared.map_or(0, |s| s.intermediate);
        let coarsest = if self.input.dtype.epsilon() > expected.dtype.epsilon() { &self.input } else { expected };
        let allowed = self.arguments.tolerance.unwrap_or_else(|| tolerance::layer(inner, coarsest.dtype, 0.0));
        let error = relative_error(floats(self.input.dtype, &ran.y), || expected.values());
        // NaN is no match
        let matches = error <= allowed;
        let (word, style) = if matches { ("matches", GOOD) } else { ("does not match", BAD) };
        writeln!(
            output::stdout(),
            "output   {style}{word}{style:#} {}: largest error {error:.1e} of the largest value, {allowed:.1e} allowed",
            expected.origin
        )?;
        if let (false, Some(beside)) = (matches, layer.beside) {
            writeln!(output::stdout(), "beside   not part of the layer: {beside}")?;
        }
        Ok(matches)
    }

    fn write(&self, path: &Path, outputs: &[(usize, Ran)]) -> Result<()> {
        let mut named = Vec::new();
        for (index, ran) in outputs {
            let name = |stem: &str| if self.arguments.all { format!("{stem}.{index}") } else { stem.to_owned() };
            named.push((name("output"), HostView::new(&ran.y, self.input.dtype, 0, self.input.shape)?));
            let tokens = self.input.shape.rows();
            if let Some(state) = ran.state.as_ref().filter(|_| tokens > 0) {
                named.push((name("router_state"), HostView::of(state, [tokens, state.len() / tokens])?));
            }
        }
        let tensors = named.iter().map(|(name, view)| (name.as_str(), *view));
        write_safetensors(path, tensors).map_err(|error| {
            remedied(error.to_string(), "check the free space and the permissions of its directory")
        })?;
        writeln!(output::stdout(), "written  {}", path.display())?;
        Ok(())
    }
}

/// `2 elements of the input are NaN or infinite`.
fn not_finite(odd: usize, what: &str) -> String {
    let are = if odd == 1 { "is" } else { "are" };
    format!("{} of the {what} {are} NaN or infinite", counted(odd, "element"))
}

/// The slots that no expert's matrices carried out.
fn elsewhere(ran: &Ran) -> Option<String> {
    let dropped =
        (ran.dropped > 0).then(|| format!("{} dropped, their expert being full", counted(ran.dropped, "slot")));
    let weightless =
        (ran.weightless > 0).then(|| format!("{} of experts without weights", counted(ran.weightless, "slot")));
    let parts: Vec<String> = dropped.into_iter().chain(weightless).collect();
    (!parts.is_empty()).then(|| parts.join("; "))
}

/// The largest difference over the largest expected magnitude; infinite where one of two is not a number.
pub(crate) fn relative_error<I: Iterator<Item = f64>>(
    actual: impl Iterator<Item = f64>,
    expected: impl Fn() -> I,
) -> f64 {
    let largest = expected().filter(|x| x.is_finite()).fold(0f64, |m, x| m.max(x.abs()));
    let unit = if largest > 0.0 { largest } else { 1.0 };
    let error = |(a, e): (f64, f64)| match a == e || (a.is_nan() && e.is_nan()) {
        true => 0.0,
        false if (a - e).is_nan() => f64::INFINITY,
        false => (a - e).abs() / unit,
    };
    actual.zip(expected()).map(error).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_relative_to_the_largest_value() {
        let error = |a: &[f64], e: &[f64]| relative_error(a.iter().copied(), || e.iter().copied());
        assert_eq!(error(&[1.0, 4.0], &[1.0, 2.0]), 1.0);
        assert_eq!(error(&[], &[]), 0.0);
        assert_eq!(error(&[0.5], &[0.0]), 0.5);
        assert_eq!(error(&[f64::NAN], &[f64::NAN]), 0.0);
        assert!(error(&[f64::NAN], &[1.0]).is_infinite() && error(&[1.0], &[f64::INFINITY]).is_infinite());
    }
}
