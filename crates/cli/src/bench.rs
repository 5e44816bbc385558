//! `fmoe bench`: how long a layer takes, and how long it would have to.

pub(crate) mod machine;
mod measure;
mod record;
pub(crate) mod weights;

use crate::args::{self, Format};
use crate::devices;
use crate::output::{self, BOLD, DIM, GOOD, Table, WARN, bytes, duration, plain, progress, remedied, rounded};
use anyhow::{Context, Result};
use clap::ValueEnum;
use fused_moe::config::LayerConfig;
use fused_moe::{Backend, DType, Device, Options, Visitor};
use fused_moe_conformance::shapes::{self, SHAPES};
use machine::Ceilings;
use measure::{Bench, Timing};
use record::Setting;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use weights::Source;

/// Bytes that the layers should have together, in largest caches: so many, that little of what a run reads is left from
/// an earlier run.
const CACHES: u64 = 8;
/// The most layers that take turns.
const LAYERS: usize = 64;

pub(crate) fn bench(arguments: &args::Bench) -> Result<ExitCode> {
    let (name, config) = shape(arguments)?;
    if let Some(0) = arguments.tokens.iter().min() {
        return Err(remedied(
            "--tokens 0: there is nothing to measure",
            "give batch sizes of 1 or more, as in 1,16,256",
        ));
    }
    let device = device(arguments)?;
    let threads = threads(&device);
    let cache = machine::last_level_cache();
    let available = machine::available_memory().unwrap_or(u64::MAX);
    let run = Run { arguments, name: &name, config: &config, cache: cache.unwrap_or(32 << 20), available, threads };
    device.visit(run)
}

/// The shape that the command line asks for.
fn shape(arguments: &args::Bench) -> Result<(String, LayerConfig)> {
    if let (Some(hidden), Some(intermediate), Some(experts), Some(top_k)) =
        (arguments.hidden, arguments.intermediate, arguments.experts, arguments.top_k)
    {
        let config = LayerConfig::new(hidden, intermediate, experts, top_k);
        return Ok((format!("{hidden}x{intermediate}x{experts}x{top_k}"), config));
    }
    let name = arguments.shape.as_deref().unwrap_or(SHAPES[0].name);
    match shapes::find(name) {
        Some(shape) => Ok((name.to_owned(), shape.config())),
        None => Err(remedied(
            format!("--shape {name}: no such shape"),
            format!(
                "there are {}; or give --hidden, --intermediate, --experts and --top-k",
                SHAPES.map(|s| s.name).join(", ")
            ),
        )),
    }
}

/// The device, with as many threads as the command line asks for.
fn device(arguments: &args::Bench) -> Result<Device> {
    let device = devices::chosen(&arguments.on)?;
    match (device, arguments.threads) {
        (Device::Cuda(_), _) => Err(remedied(
            "bench: calls on a CUDA device are not timed here yet",
            "`cargo run --release -p fused-moe-cuda --example layer_speed` times them by graph replay; \
             --backend cpu times the processor",
        )),
        (_, Some(0)) => Err(remedied("--threads 0: there is nobody to work", "give 1 or more, or leave it out")),
        (Device::Cpu(_), Some(threads)) => Ok(Device::Cpu(fused_moe::cpu::Cpu::with_threads(threads)?)),
        (device, _) => Ok(device),
    }
}

fn threads(device: &Device) -> usize {
    match device {
        Device::Cpu(cpu) => cpu.threads(),
        _ => std::thread::available_parallelism().map_or(1, usize::from),
    }
}

struct Run<'a> {
    arguments: &'a args::Bench,
    name: &'a str,
    config: &'a LayerConfig,
    /// Bytes of the largest cache.
    cache: u64,
    /// Bytes of memory that can be had.
    available: u64,
    threads: usize,
}

/// What may be taken of the memory that can be had.
fn budget(available: u64) -> u64 {
    available / 10 * 9
}

impl Run<'_> {
    fn dtype(&self) -> DType {
        match self.arguments.dtype {
            Format::F32 => DType::F32,
            Format::F16 => DType::F16,
            Format::Bf16 => DType::BF16,
        }
    }

    fn setting(&self, backend: &'static str, layers: usize, ceilings: Ceilings) -> Setting<'_> {
        Setting {
            version: env!("CARGO_PKG_VERSION"),
            backend,
            device: machine::processor(),
            threads: self.threads,
            shape: self.name,
            config: self.config,
            dtype: self.dtype().to_string(),
            routing: value_name(self.arguments.routing),
            layers,
            ceilings,
        }
    }

    fn layer_bytes(&self) -> Result<u64> {
        let LayerConfig { hidden, intermediate, experts, .. } = *self.config;
        let rows = self.config.gate_up_rows() as u128 + intermediate as u128;
        let elements = experts as u128 * hidden as u128 * (rows + 1);
        u64::try_from(elements * self.dtype().size() as u128)
            .map_err(|_| remedied("a layer of this shape is larger than any memory", "give smaller sizes"))
    }

    /// How many layers take turns.
    fn layers(&self, source: u64) -> Result<usize> {
        let layer = self.layer_bytes()?.max(1);
        let room = budget(self.available).saturating_sub(source);
        let fit = room / layer;
        if fit == 0 {
            return Err(remedied(
                format!(
                    "{}: a layer takes {} in {}, {} of memory can be had",
                    self.name,
                    bytes(layer),
                    self.dtype(),
                    bytes(room)
                ),
                "take a smaller shape or a narrower --dtype, or give --hidden, --intermediate, --experts and --top-k",
            ));
        }
        let wanted = self.cache.saturating_mul(CACHES).div_ceil(self.hot(layer)).max(2);
        Ok(wanted.min(fit).min(LAYERS as u64) as usize)
    }

    /// Errors where the tokens do not fit beside the layers.
    fn check_tokens(&self, taken: u64) -> Result<()> {
        let LayerConfig { hidden, intermediate, top_k, .. } = *self.config;
        let room = budget(self.available).saturating_sub(taken);
        for &tokens in &self.arguments.tokens {
            let token = (measure::BATCHES + 4) * hidden * self.dtype().size() + top_k * (hidden + intermediate) * 8;
            let needed = tokens as u128 * token as u128;
            if needed > u128::from(room) {
                let needed = bytes(needed.try_into().unwrap_or(u64::MAX));
                return Err(remedied(
                    format!("--tokens {tokens}: takes about {needed} beside the weights, {} can be had", bytes(room)),
                    format!("at most {} tokens fit", room as u128 / token as u128),
                ));
            }
        }
        Ok(())
    }

    /// Bytes of a layer that runs come back to.
    fn hot(&self, layer: u64) -> u64 {
        let (experts, top_k) = (self.config.experts as u64, self.config.top_k as u64);
        match self.arguments.routing {
            args::Spread::One => (layer / experts.max(1) * top_k).max(1),
            _ => layer,
        }
    }
}

impl Visitor for Run<'_> {
    type Output = Result<ExitCode>;

    fn visit<B: Backend>(self, backend: &B) -> Result<ExitCode> {
        let arguments = self.arguments;
        let seed = arguments.seed;
        let layer_bytes = self.layer_bytes()?;
        let source_bytes = Source::size(self.config, self.dtype()) as u64;
        let count = self.layers(source_bytes)?;
        self.check_tokens(source_bytes + count as u64 * layer_bytes)?;

        let bar = progress(count as u64, "random weights");
        let source = Source::new(self.config, self.dtype(), arguments.routing, seed);
        let mut layers = Vec::with_capacity(count);
        for index in 0..count {
            let layer = backend.prepare(self.config, &source.layer(index)?, &Options::default());
            layers.push(layer.map_err(|error| remedied(error.to_string(), "give sizes that make a layer"))?);
            bar.inc(1);
        }
        bar.set_message("this machine's own rates");
        let ceilings = || machine::measure(self.threads, self.cache, machine::available_memory().unwrap_or(1 << 30));
        let before = ceilings()?;
        bar.finish_and_clear();

        let device = format!("{}: {}", backend.name(), backend.describe());
        let quiet = arguments.json.as_deref() == Some(Path::new("-"));
        if !quiet {
            self.print_setting(&device, count, layer_bytes)?;
        }
        let bench = Bench { backend, config: self.config, dtype: self.dtype(), layers: &layers, source: &source, seed };
        let mut timings = Vec::new();
        for &tokens in &arguments.tokens {
            let bar = progress(measure::STEPS, &format!("{tokens} tokens"));
            let timing = bench.measure(tokens, || bar.inc(1));
            bar.finish_and_clear();
            timings.push(timing.with_context(|| format!("{}, {tokens} tokens: no time is given", self.name))?);
        }
        let setting = self.setting(backend.name(), count, before.or_higher(ceilings()?));
        if !quiet {
            print_timings(&timings, &setting.ceilings)?;
        }
        self.keep(&setting, &timings)?;
        Ok(ExitCode::SUCCESS)
    }
}

impl Run<'_> {
    fn print_setting(&self, device: &str, layers: usize, layer: u64) -> Result<()> {
        let mut out = output::stdout();
        let LayerConfig { hidden, intermediate, experts, top_k, .. } = *self.config;
        let (dtype, routing) = (self.dtype(), value_name(self.arguments.routing));
        writeln!(
            out,
            "{BOLD}{}{BOLD:#}: H {hidden}, I {intermediate}, E {experts}, K {top_k}; {dtype}; routing {routing}",
            self.name
        )?;
        writeln!(out, "device   {device}")?;
        writeln!(
            out,
            "weights  {layers} layers of {} take turns; the largest cache has {}",
            bytes(layer),
            bytes(self.cache)
        )?;
        if self.hot(layer) * (layers as u64) < self.cache * CACHES / 2 {
            writeln!(out, "         {WARN}so few that runs find some of them in the cache{WARN:#}")?;
        }
        out.flush()?;
        Ok(())
    }

    /// Writes what is to be kept.
    fn keep(&self, setting: &Setting<'_>, timings: &[Timing]) -> Result<()> {
        match self.arguments.json.as_deref() {
            Some(path) if path == Path::new("-") => output::print_json(&record::json(setting, timings))?,
            Some(path) => {
                let text = format!("{:#}\n", record::json(setting, timings));
                std::fs::write(path, text).with_context(|| format!("{}: cannot write", path.display()))?;
            }
            None => {}
        }
        if let Some(directory) = &self.arguments.record {
            let path = record::append(directory, setting, timings)?;
            output::note(format_args!("recorded in {}", path.display()));
        }
        Ok(())
    }
}

fn print_timings(timings: &[Timing], ceilings: &Ceilings) -> Result<()> {
    let mut out = output::stdout();
    let header = [
        "tokens",
        "median",
        "10 to 90 %",
        "runs",
        "experts",
        "GB/s",
        "of read",
        "GFLOP/s",
        "of dot",
        "floor",
        "x floor",
    ];
    let mut table = Table::new(header).text(&[2]);
    for timing in timings {
        let [low, high] = timing.spread;
        let floor = timing.floor(ceilings);
        let ratio = timing.median.as_secs_f64() / floor.as_secs_f64();
        let style = if ratio < 1.5 { GOOD } else { WARN };
        let percent = |part: f64| plain(format_args!("{:.0} %", 100.0 * part));
        table.row([
            plain(timing.tokens),
            plain(duration(timing.median)),
            plain(format_args!("{} to {}", duration(low), duration(high))),
            plain(timing.runs),
            plain(rounded(timing.touched)),
            plain(rounded(timing.bandwidth() / 1e9)),
            percent(timing.bandwidth() / ceilings.bandwidth),
            plain(rounded(timing.arithmetic() / 1e9)),
            percent(timing.arithmetic() / ceilings.arithmetic),
            plain(duration(floor)),
            (rounded(ratio), style),
        ]);
    }
    table.print(&mut out)?;
    writeln!(
        out,
        "machine  {} GB/s read ({} of f32); {} GFLOP/s (f32 dot kernel, operands in cache); best of {} passes before and as many after",
        rounded(ceilings.bandwidth / 1e9),
        bytes(ceilings.buffer as u64),
        rounded(ceilings.arithmetic / 1e9),
        machine::PASSES
    )?;
    let rows: usize = timings.iter().map(|timing| timing.verified.rows).sum();
    let error = timings.iter().map(|timing| timing.verified.error).fold(0.0, f64::max);
    let allowed = timings.iter().map(|timing| timing.verified.tolerance).fold(0.0, f64::max);
    writeln!(
        out,
        "{DIM}checked before timing: {rows} rows against f64, largest error {error:.1e} of the largest value, {allowed:.1e} allowed{DIM:#}"
    )?;
    out.flush()?;
    Ok(())
}

fn value_name(value: impl ValueEnum) -> String {
    value.to_possible_value().map_or(String::new(), |value| value.get_name().to_owned())
}
