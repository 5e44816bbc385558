//! `fmoe bench`: how long a layer takes, and how long it would have to.

mod backward;
mod batch;
mod cuda;
mod gradients;
mod host;
pub(crate) mod machine;
mod measure;
mod meter;
mod record;
mod report;
mod training;
pub(crate) mod weights;
mod wgpu;

use crate::args::{self, Bits, Format, Origin};
use crate::devices;
use crate::output::{self, bytes, counted, misused, progress, remedied};
use anyhow::{Context, Result};
use clap::ValueEnum;
use cuda::Gpu;
use fused_moe::config::LayerConfig;
use fused_moe::{Backend, DType, Device, Numerics, Options};
use fused_moe_conformance::shapes::{self, SHAPES};
use host::Host;
use machine::Ceilings;
use measure::{Bench, Timing};
use meter::{LayerSizes, Meter};
use record::{Rows, Setting};
use std::path::Path;
use std::process::ExitCode;
use weights::Source;
use wgpu::Portable;

pub(crate) fn bench(arguments: &args::Bench) -> Result<ExitCode> {
    let (name, config) = shape(arguments)?;
    if let Some(0) = arguments.tokens.iter().min() {
        return Err(misused(
            "--tokens 0: there is nothing to measure",
            "give batch sizes of 1 or more, as in 1,16,256",
        ));
    }
    config.check().map_err(|error| misused(error.to_string(), "give sizes that make a layer"))?;
    if let Some(path) = arguments.json.as_deref().filter(|path| *path != Path::new("-")) {
        record::writable(path)?;
    }
    let record = arguments.record.as_deref();
    record.map_or(Ok(()), record::prepare)?;
    let device = match (device(arguments)?, arguments.threads) {
        (Device::Cpu(_), Some(threads)) => Device::Cpu(fused_moe::cpu::Cpu::with_threads(threads)?),
        (Device::Cpu(cpu), None) => Device::Cpu(cpu),
        (Device::Cuda(_), Some(threads)) => return Err(no_threads(threads, "cuda")),
        (Device::Wgpu(_), Some(threads)) => return Err(no_threads(threads, "wgpu")),
        (device, _) => device,
    };
    let beside = arguments.beside.as_deref().map(|name| devices::named("--beside", name)).transpose()?;
    let quiet = arguments.json.as_deref() == Some(Path::new("-"));
    let (tokens, from) = (&arguments.tokens[..], arguments.from);
    let run = Run { arguments, name: &name, config: &config, tokens, from, quiet, record };
    if arguments.backward {
        return run.backward_on(device).map(|()| ExitCode::SUCCESS);
    }
    let mut measured = run.on(device)?;
    if let Some(device) = beside {
        let tokens: Vec<usize> = measured.timings.iter().map(|timing| timing.tokens).collect();
        let beside =
            Run { tokens: &tokens, from: Some(measured.origin), quiet: true, record: None, ..run }.on(device)?;
        measured.setting.beside = Some(beside.setting.backend.to_owned());
        for (timing, other) in measured.timings.iter_mut().zip(&beside.timings) {
            timing.beside = Some(other.median);
        }
    }
    if !quiet {
        report::timings(&measured.setting, &measured.timings, &measured.machine)?;
    }
    run.keep(&measured.setting.device, &Rows::calls(&measured.setting, &measured.timings))?;
    Ok(ExitCode::SUCCESS)
}

/// The device that the command line asks for; a number of threads asks for the processor.
fn device(arguments: &args::Bench) -> Result<Device> {
    match (arguments.threads, arguments.on.backend.as_deref()) {
        (Some(_), None) if arguments.on.adapter.is_none() => devices::named("--backend", "cpu"),
        (Some(threads), Some(name)) if name.starts_with("cuda") || name.starts_with("wgpu") => {
            Err(no_threads(threads, name))
        }
        _ => devices::chosen(&arguments.on),
    }
}

fn no_threads(threads: usize, backend: &str) -> anyhow::Error {
    let message = format!("--threads {threads}: {backend} has no threads to choose, they are the CPU backend's");
    misused(message, "leave --threads out, or give --backend cpu")
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
        None => Err(misused(
            format!("--shape {name}: no such shape"),
            format!(
                "there are {}; or give --hidden, --intermediate, --experts and --top-k",
                SHAPES.map(|s| s.name).join(", ")
            ),
        )),
    }
}

#[derive(Clone, Copy)]
struct Run<'a> {
    arguments: &'a args::Bench,
    name: &'a str,
    config: &'a LayerConfig,
    /// Batch sizes; none: the meter's.
    tokens: &'a [usize],
    /// Where calls begin; none: where the meter says.
    from: Option<Origin>,
    /// Prints nothing.
    quiet: bool,
    /// Where rows are recorded.
    record: Option<&'a Path>,
}

/// What a run found.
struct Measured<'a> {
    setting: Setting<'a>,
    timings: Vec<Timing>,
    origin: Origin,
    /// The machine's read bandwidth and its arithmetic, in words.
    machine: [String; 2],
}

/// What may be taken of the memory that can be had.
fn budget(available: u64) -> u64 {
    available / 10 * 9
}

impl<'a> Run<'a> {
    fn dtype(&self) -> DType {
        match self.arguments.dtype {
            Format::F32 => DType::F32,
            Format::F16 => DType::F16,
            Format::Bf16 => DType::BF16,
        }
    }

    fn options(&self) -> Options {
        let numerics = match self.arguments.numerics {
            Bits::Fast => Numerics::Fast,
            Bits::BatchInvariant => Numerics::BatchInvariant,
        };
        Options { numerics, ..Options::default() }
    }

    fn origin<M: Meter>(&self) -> Origin {
        self.from.unwrap_or(M::ORIGIN)
    }

    fn tokens<M: Meter>(&self) -> &[usize] {
        if self.tokens.is_empty() { M::TOKENS } else { self.tokens }
    }

    fn setting<M: Meter>(&self, meter: &M, layers: usize, ceilings: Ceilings) -> Setting<'a> {
        Setting {
            version: env!("CARGO_PKG_VERSION"),
            backend: meter.backend().name(),
            device: meter.device(),
            threads: meter.threads(),
            isa: meter.isa(),
            shape: self.name,
            config: self.config,
            dtype: self.dtype().to_string(),
            routing: value_name(self.arguments.routing),
            from: value_name(self.origin::<M>()),
            numerics: value_name(self.arguments.numerics),
            layers,
            ceilings,
            arithmetic: meter.arithmetic(),
            beside: None,
        }
    }

    fn sizes(&self) -> Result<LayerSizes> {
        let LayerConfig { hidden, intermediate, experts, top_k, .. } = *self.config;
        let gate_up = self.config.gate_up_rows() as u128;
        let bytes_of = |elements: u128| {
            u64::try_from(elements.saturating_mul(self.dtype().size() as u128))
                .map_err(|_| remedied("a layer of this shape is larger than any memory", "give smaller sizes"))
        };
        // panels of the CPU have 32 rows
        let whole = |rows: u128| rows.div_ceil(32) * 32;
        let (hidden, intermediate) = (hidden as u128, intermediate as u128);
        let (experts, top_k) = (experts as u128, top_k as u128);
        let of = |[gate_up, down]: [u128; 2], experts: u128| {
            let expert = gate_up.saturating_mul(hidden).saturating_add(down.saturating_mul(intermediate));
            expert.saturating_mul(experts)
        };
        let router = experts * hidden;
        Ok(LayerSizes {
            layer: bytes_of(of([gate_up, hidden], experts).saturating_add(router))?,
            packed: bytes_of(of([whole(gate_up), whole(hidden)], experts).saturating_add(router))?,
            chosen: bytes_of(of([gate_up, hidden], top_k.min(experts)))?,
        })
    }

    /// How many layers take turns.
    fn layers<M: Meter>(&self, meter: &M, source: u64) -> Result<usize> {
        let (sizes, room) = (self.sizes()?, meter.room(source)?);
        let layer = sizes.packed.max(1);
        let fit = room.left() / layer;
        if fit == 0 {
            return Err(remedied(
                format!("{}: a layer takes {} in {}; {}", self.name, bytes(layer), self.dtype(), room.describe(0)),
                "take a smaller shape or a narrower --dtype, or give --hidden, --intermediate, --experts and --top-k",
            ));
        }
        Ok(meter.turns(sizes, self.arguments.routing).min(fit).min(meter.most_layers() as u64) as usize)
    }

    /// Errors where the tokens do not fit beside the layers.
    fn check_tokens<M: Meter>(&self, meter: &M, source: u64, layers: u64) -> Result<()> {
        let LayerConfig { hidden, intermediate, experts, top_k, .. } = *self.config;
        let room = meter.room(source)?;
        let left = room.left().saturating_sub(layers);
        for &tokens in self.tokens::<M>() {
            let io = 2 * (meter.batches(tokens) + 1) * hidden * self.dtype().size();
            let logits = 4 * experts * (meter.batches(tokens) + 1);
            let token = io + logits + top_k * (hidden + intermediate) * 8;
            let needed = tokens as u128 * token as u128;
            if needed > u128::from(left) {
                let needed = bytes(needed.try_into().unwrap_or(u64::MAX));
                let help = match u128::from(left) / token as u128 {
                    0 => "not one token fits; take a smaller shape or a narrower --dtype".to_owned(),
                    fit => format!("at most {} fit", counted(fit, "token")),
                };
                let message = format!("--tokens {tokens}: takes about {needed}; {}", room.describe(layers));
                return Err(remedied(message, help));
            }
        }
        Ok(())
    }

    fn on(&self, device: Device) -> Result<Measured<'a>> {
        match device {
            Device::Cpu(cpu) => self.measure(&Host::new(cpu, self.dtype())),
            Device::Cuda(cuda) => self.measure(&Gpu::new(cuda)),
            Device::Wgpu(wgpu) => self.measure(&Portable::new(wgpu)),
            _ => Err(remedied("bench: this backend cannot be measured", "give --backend cpu, cuda or wgpu")),
        }
    }

    fn measure<M: Meter>(&self, meter: &M) -> Result<Measured<'a>> {
        let arguments = self.arguments;
        let sizes = self.sizes()?;
        let source_bytes = Source::size(self.config, self.dtype()) as u64;
        let count = self.layers(meter, source_bytes)?;
        self.check_tokens(meter, source_bytes, count as u64 * sizes.packed)?;

        self.check_record(meter, &record::CALLS)?;

        let bar = progress(count as u64, "random weights");
        let source = Source::new(self.config, self.dtype(), arguments.routing, arguments.seed);
        let mut layers = Vec::with_capacity(count);
        for index in 0..count {
            let layer = meter.backend().prepare(self.config, &source.layer(index)?, &self.options());
            layers.push(
                layer.map_err(|error| remedied(error.to_string(), "take a smaller shape or a narrower --dtype"))?,
            );
            bar.inc(1);
        }
        bar.set_message("this machine's own rates");
        let before = meter.ceilings()?;
        bar.finish_and_clear();

        if !self.quiet {
            let enough = meter.turns(sizes, arguments.routing) <= 2 * count as u64;
            report::setting(meter, &self.setting(meter, count, before), sizes.layer, enough)?;
        }
        let bench = Bench {
            meter,
            config: self.config,
            dtype: self.dtype(),
            layers: &layers,
            source: &source,
            origin: self.origin::<M>(),
            routing: arguments.routing,
            seed: arguments.seed,
        };
        let mut timings = Vec::new();
        for &tokens in self.tokens::<M>() {
            let of_tokens = counted(tokens, "token");
            let bar = progress(measure::STEPS, &of_tokens);
            let timing = bench.measure(tokens, &|| bar.inc(1));
            bar.finish_and_clear();
            timings.push(
                timing
                    .map_err(|error| short_of_memory(error, tokens))
                    .with_context(|| format!("{}, {of_tokens}: no time is given", self.name))?,
            );
        }
        let ceilings = before.or_higher(meter.ceilings()?);
        let machine = [meter.describe(&ceilings), meter.describe_arithmetic(&ceilings)];
        let setting = self.setting(meter, count, ceilings);
        Ok(Measured { setting, timings, origin: self.origin::<M>(), machine })
    }

    /// Errors where rows could not be recorded.
    fn check_record<M: Meter>(&self, meter: &M, kind: &record::Kind) -> Result<()> {
        self.record.map_or(Ok(()), |directory| record::appendable(directory, &meter.device(), kind))
    }

    /// Writes what is to be kept.
    fn keep(&self, device: &str, rows: &Rows) -> Result<()> {
        match self.arguments.json.as_deref() {
            Some(path) if path == Path::new("-") => output::print_json(&rows.json())?,
            Some(path) => {
                let text = format!("{:#}\n", rows.json());
                std::fs::write(path, text).with_context(|| format!("{}: cannot write", path.display()))?;
            }
            None => {}
        }
        if let Some(directory) = self.record {
            let path = record::append(directory, device, rows)?;
            output::note(format_args!("recorded in {}", path.display()));
        }
        Ok(())
    }
}

/// Tokens that a device had no memory for.
fn short_of_memory(error: anyhow::Error, tokens: usize) -> anyhow::Error {
    match error.downcast_ref() {
        Some(fused_moe::wgpu::Error::OutOfMemory { .. }) => {
            remedied(format!("--tokens {tokens}: {error}"), "give fewer tokens, or take a smaller shape")
        }
        _ => error,
    }
}

fn value_name(value: impl ValueEnum) -> String {
    value.to_possible_value().map_or(String::new(), |value| value.get_name().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Arguments, Command};
    use clap::Parser;

    #[test]
    fn numerics_are_those_of_the_command_line() {
        let numerics = |arguments: &[&str]| {
            let Command::Bench(arguments) = Arguments::parse_from([&["fmoe", "bench"], arguments].concat()).command
            else {
                panic!("{arguments:?}");
            };
            let (name, config) = shape(&arguments).unwrap();
            let (arguments, config) = (&arguments, &config);
            let run = Run { arguments, name: &name, config, tokens: &[], from: None, quiet: true, record: None };
            run.options().numerics
        };
        assert_eq!(numerics(&[]), Numerics::Fast);
        assert_eq!(numerics(&["--numerics", "fast"]), Numerics::Fast);
        assert_eq!(numerics(&["--numerics", "batch-invariant"]), Numerics::BatchInvariant);
        assert_eq!(numerics(&["--backward"]), Numerics::Fast);
    }
}
