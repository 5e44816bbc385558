//! `fmoe run`: layers of a checkpoint on an input.

use crate::args;
use crate::bench::weights::Numbers;
use crate::devices;
use crate::output::{
    self, BAD, BOLD, DIM, GOOD, bytes, checkpoint_error, duration, histogram, progress, remedied, rounded,
};
use crate::tensors::{self, Tensor, floats};
use anyhow::Result;
use fused_moe::backend::{shorten, shorten_mut};
use fused_moe::checkpoint::{Checkpoint, CheckpointLayer, write_safetensors};
use fused_moe::operation::Forward;
use fused_moe::weights::{ExpertMatrices, Matrix};
use fused_moe::{Backend, DType, Device, HostView, Layer, Options, Statistics, Status, Stream, View, Visitor};
use fused_moe_conformance::tolerance;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Tokens of a random input where the command line does not say.
const TOKENS: usize = 32;
/// Timed runs, after one that warms up; fewer where they take long.
const RUNS: usize = 5;
const ENOUGH: Duration = Duration::from_secs(2);

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
            let layers = chosen_layers(arguments, &checkpoint)?;
            let [first, ..] = layers.as_slice() else { return Err(no_layer(&checkpoint)) };
            let input = match &arguments.input {
                Some(name) => Tensor::read(name)?,
                None => random(arguments, first)?,
            };
            let expected = arguments.expect.as_deref().map(Tensor::read).transpose()?;
            Run { arguments, device, layers, input, expected }.run()
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
            Run { arguments, device, layers: vec![layer], input, expected }.run()
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

fn chosen_layers<'a>(arguments: &args::Run, checkpoint: &'a Checkpoint) -> Result<Vec<CheckpointLayer<'a>>> {
    let indices = match (arguments.all, arguments.layer) {
        (true, _) => checkpoint.layers().to_vec(),
        (false, Some(layer)) => vec![layer],
        // where the files hold none, the first says what is missing
        (false, None) => checkpoint.first_stored_layer().or(checkpoint.layers().first().copied()).into_iter().collect(),
    };
    indices.into_iter().map(|index| checkpoint.layer(index).map_err(checkpoint_error)).collect()
}

fn no_layer(checkpoint: &Checkpoint) -> anyhow::Error {
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
    match folder.metadata() {
        Ok(data) if data.is_dir() => Ok(()),
        _ => Err(remedied(format!("{}: {} is no directory", path.display(), folder.display()), "make it first")),
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
}

impl Run<'_> {
    fn run(&self) -> Result<ExitCode> {
        self.check()?;
        self.warn_about_input();
        let mut outputs = Vec::new();
        let mut passed = true;
        let bar = progress(self.layers.len() as u64, "layers");
        for layer in &self.layers {
            let outputs_kept = if self.arguments.output.is_some() { self.layers.len() } else { 1 };
            let seed = self.arguments.seed;
            let once = Once { layer, input: &self.input, seed, outputs_kept, largest: self.largest_buffer() };
            let ran = self.device.visit(once)?;
            bar.inc(1);
            passed &= bar.suspend(|| self.show(layer, &ran))?;
            if self.arguments.output.is_some() {
                outputs.push((layer.index, ran.y));
            }
        }
        bar.finish_and_clear();
        if let Some(path) = &self.arguments.output {
            self.write(path, &outputs)?;
        }
        Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
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
            output::warn(format_args!(
                "layer {}: {odd} elements of the output are NaN or infinite, {whence}",
                layer.index
            ));
        }
        match &self.expected {
            Some(expected) => self.compare(layer, expected, ran),
            None => Ok(true),
        }
    }

    /// The widths of the input and of what is expected.
    fn check(&self) -> Result<()> {
        for layer in &self.layers {
            if layer.weights.table.is_some() && self.arguments.input.is_some() {
                let message = format!("layer {}: chooses experts by token id, and --input has none", layer.index);
                return Err(remedied(message, "leave --input out for random tokens, or choose another layer"));
            }
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
            output::warn(format_args!("{}: {odd} elements of the input are NaN or infinite", self.input.origin));
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
            "routing  {total} slots; tokens per expert {min} to {max}, mean {}; imbalance {}; {dead} of {} experts unused",
            rounded(mean),
            rounded(imbalance),
            counts.len()
        )?;
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
            "layer {:>3}  {:>9}  {:>6} GB/s  imbalance {:>5}  {dead} of {} experts unused  {DIM}{}{DIM:#}",
            layer.index,
            duration(ran.median),
            rounded(ran.bandwidth()),
            rounded(imbalance),
            ran.counts.len(),
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

    fn write(&self, path: &Path, outputs: &[(usize, Vec<u8>)]) -> Result<()> {
        let named = outputs.iter().map(|(index, y)| {
            let name = if self.arguments.all { format!("output.{index}") } else { "output".to_owned() };
            Ok((name, HostView::new(y, self.input.dtype, 0, self.input.shape)?))
        });
        let named = named.collect::<Result<Vec<_>>>()?;
        let tensors = named.iter().map(|(name, view)| (name.as_str(), *view));
        write_safetensors(path, tensors).map_err(|error| {
            remedied(error.to_string(), "check the free space and the permissions of its directory")
        })?;
        writeln!(output::stdout(), "written  {}", path.display())?;
        Ok(())
    }
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

/// What a layer did.
struct Ran {
    y: Vec<u8>,
    /// Slots of each expert.
    counts: Vec<u32>,
    status: Status,
    median: Duration,
    runs: usize,
    /// Bytes of the weights that were needed.
    bytes: u64,
    device: String,
}

impl Ran {
    /// In 10^9 bytes a second.
    fn bandwidth(&self) -> f64 {
        self.bytes as f64 / self.median.as_secs_f64().max(1e-9) / 1e9
    }
}

/// Runs a layer a few times on one input.
struct Once<'a> {
    layer: &'a CheckpointLayer<'a>,
    input: &'a Tensor,
    /// Of the token ids, where experts are chosen by them.
    seed: u64,
    /// How many outputs are on the host in the end.
    outputs_kept: usize,
    /// Bytes that x and y may have each.
    largest: u64,
}

impl Visitor for Once<'_> {
    type Output = Result<Ran>;

    fn visit<B: Backend>(self, backend: &B) -> Result<Ran> {
        let layer = self.layer.prepare(backend, &Options::default())?;
        let (dtype, shape, experts) = (self.input.dtype, self.input.shape, layer.config().experts);
        if backend.name() == "cpu" {
            // x and y of the backend
            let workspace = |tokens| layer.workspace_bytes(tokens).ok();
            self.input.check_memory(self.outputs_kept + 2, self.largest, workspace)?;
        } else {
            self.input.check_memory(self.outputs_kept, self.largest, |_| Some(0))?;
        }
        let stream = backend.stream()?;
        let mut workspace = layer.workspace(shape.rows())?;
        let mut x = backend.allocate(self.input.bytes().len())?;
        backend.upload(self.input.bytes(), &mut x)?;
        let mut y = backend.allocate(self.input.bytes().len())?;
        let ids = match &self.layer.weights.table {
            Some(table) => {
                let mut ids = Numbers::new(DType::F32, shape.rows(), 1.0, self.seed).into_words();
                // the numbers are f32, whose low bits are mostly 0
                let mixed = |bits: u32| u64::from(bits).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
                ids.iter_mut().for_each(|id| *id = (mixed(*id) % table.vocabulary.max(1) as u64) as u32);
                let mut memory = backend.allocate(ids.len() * size_of::<u32>())?;
                backend.upload(bytemuck::cast_slice(&ids), &mut memory)?;
                Some(memory)
            }
            None => None,
        };
        let ends = match shape.dims() {
            &[sequences, tokens, _] if self.layer.by_sequence => {
                let ends: Vec<u32> = (0..=sequences).map(|n| (n * tokens) as u32).collect();
                let mut memory = backend.allocate(size_of_val(&ends[..]))?;
                backend.upload(bytemuck::cast_slice(&ends), &mut memory)?;
                Some((memory, ends.len())).filter(|_| sequences > 0)
            }
            _ => None,
        };
        let mut counts = backend.allocate(experts * size_of::<u32>())?;
        let mut status = Status::OK;
        let mut times = Vec::new();
        let begin = Instant::now();
        for run in 0..=RUNS {
            if run > 1 && begin.elapsed() > ENOUGH {
                break;
            }
            let mut call = Forward::<B>::new(
                shorten::<B>(View::new(B::read(&x), dtype, 0, shape)?),
                shorten_mut::<B>(View::new(B::write(&mut y), dtype, 0, shape)?),
            );
            if let Some(ids) = &ids {
                call.token_ids = Some(shorten::<B>(View::new(B::read(ids), DType::U32, 0, [shape.rows()])?));
            }
            if let Some((ends, count)) = &ends {
                call.sequences = Some(shorten::<B>(View::new(B::read(ends), DType::U32, 0, [*count])?));
            }
            call.counts = Some(shorten_mut::<B>(View::new(B::write(&mut counts), DType::U32, 0, [experts])?));
            let start = Instant::now();
            layer.run(&stream, call, &mut workspace)?;
            status |= stream.status()?;
            if run > 0 {
                times.push(start.elapsed());
            }
        }
        times.sort_unstable();
        let mut ran = Ran {
            y: vec![0; self.input.bytes().len()],
            counts: vec![0; experts],
            status,
            median: times.get(times.len() / 2).copied().unwrap_or_default(),
            runs: times.len(),
            bytes: 0,
            device: format!("{}: {}", backend.name(), backend.describe()),
        };
        backend.download(&stream, &y, &mut ran.y)?;
        backend.download(&stream, &counts, bytemuck::cast_slice_mut(&mut ran.counts))?;
        ran.bytes = weight_bytes(self.layer, &ran.counts);
        Ok(ran)
    }
}

/// Bytes of the router, the shared expert, and the experts that have tokens.
fn weight_bytes(layer: &CheckpointLayer<'_>, counts: &[u32]) -> u64 {
    let matrix = |matrix: &Matrix<'_>| (matrix.rows() * matrix.cols() * matrix.dtype().size()) as u64;
    let expert = |expert: &ExpertMatrices<'_>| {
        let optional = [&expert.gate, &expert.gate_bias, &expert.up_bias, &expert.down_bias];
        optional.into_iter().flatten().chain([&expert.up, &expert.down]).map(matrix).sum::<u64>()
    };
    let weights = &layer.weights;
    let router = weights.router.map_or(0, |router| router.extent() as u64);
    let shared = weights.shared.as_ref().map_or(0, |shared| expert(&shared.matrices));
    let used = weights.experts.iter().zip(counts).filter(|(_, count)| **count > 0);
    router + shared + used.map(|(matrices, _)| expert(matrices)).sum::<u64>()
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
