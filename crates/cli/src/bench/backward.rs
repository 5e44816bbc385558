//! The passes of a training step on a clock.

use super::Run;
use super::batch::{Batch, Batches};
use super::cuda::Gpu;
use super::gradients::Left;
use super::host::Host;
use super::machine::Ceilings;
use super::measure::{STEPS, Spans, Timing, Verified, mean};
use super::meter::{ErrorOf, LayerSizes, Meter, Pass, StreamOf, Times};
use super::record::{self, Rows, Setting};
use super::report;
use super::training::{Kept, MatrixMemory, Sizes};
use super::weights::Source;
use super::wgpu::Portable;
use crate::args::Origin;
use crate::output::{bytes, counted, progress, remedied};
use anyhow::{Context, Result, ensure};
use fused_moe::operation::LayerParameters;
use fused_moe::training::{TrainingLayer, TrainingWorkspace};
use fused_moe::{Backend, BackendBackward, Device, Layer, Options, Stream};
use fused_moe_conformance::shapes::Cost;

/// What was measured of the passes at one batch size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PassesTiming {
    /// The backward pass.
    pub(crate) backward: Timing,
    /// Of [`Pass::ALL`].
    pub(crate) passes: [Spans; 3],
    /// Bytes that a token keeps from the forward pass to the backward one, x among them.
    pub(crate) kept: usize,
}

impl PassesTiming {
    /// The backward pass over another.
    pub(crate) fn over(&self, pass: Pass) -> f64 {
        let other = Pass::ALL.into_iter().zip(self.passes).find(|(of, _)| *of == pass);
        other.map_or(f64::NAN, |(_, spans)| self.backward.median.as_secs_f64() / spans.median.as_secs_f64())
    }
}

impl<'a> Run<'a> {
    /// Times the passes on a device that has gradients.
    pub(super) fn backward_on(&self, device: Device) -> Result<()> {
        match device {
            Device::Cpu(cpu) => self.backward(&Host::new(cpu, self.dtype())),
            Device::Cuda(cuda) => self.backward(&Gpu::new(cuda)),
            Device::Wgpu(wgpu) => self.backward(&Portable::new(wgpu)),
            _ => Err(remedied("bench --backward: this backend has no gradients", "--backend cpu has them")),
        }
    }

    fn backward<M: Meter<Backend: BackendBackward>>(&self, meter: &M) -> Result<()> {
        let (config, dtype) = (self.config, self.dtype());
        let training = TrainingLayer::new(config)?;
        let LayerSizes { layer: layer_bytes, packed, .. } = self.sizes()?;
        let tokens = if self.tokens.is_empty() { M::TRAINED } else { self.tokens };
        let source_bytes = Source::size(config, dtype) as u64;
        let from_router = self.from.unwrap_or(Origin::X) == Origin::X;
        let room = meter.room(source_bytes)?;
        for &tokens in tokens {
            let sizes = Sizes { config, dtype, tokens, from_router };
            let of_tokens = (sizes.token_bytes(meter.batches(tokens)) as u64).saturating_mul(tokens as u64);
            let needed = Sizes::matrix_bytes(packed).saturating_add(of_tokens);
            if needed > room.left() {
                let message =
                    format!("--tokens {tokens}: training takes about {}; {}", bytes(needed), room.describe(0));
                return Err(remedied(message, "give fewer tokens, take a smaller shape or a narrower --dtype"));
            }
        }

        self.check_record(meter, &record::PASSES)?;
        let bar = progress(0, "random weights, and this machine's own rates");
        let source = Source::new(config, dtype, self.arguments.routing, self.arguments.seed);
        let layer = meter.backend().prepare(config, &source.layer(0)?, &Options::default())?;
        let sizes = Sizes { config, dtype, tokens: 0, from_router };
        let weights = MatrixMemory::weights(meter.backend(), &sizes, &source)?;
        let before = meter.ceilings()?;
        bar.finish_and_clear();
        let setting = |ceilings: Ceilings| Setting {
            from: if from_router { "x" } else { "logits" }.to_owned(),
            ..self.setting(meter, 1, ceilings)
        };
        if !self.quiet {
            report::setting(meter, &setting(before), layer_bytes, layer_bytes > meter.cache())?;
        }
        let mut step =
            Step { run: *self, meter, training: &training, layer: &layer, weights: &weights, source: &source };
        let mut timings = Vec::new();
        for &tokens in tokens {
            let of_tokens = counted(tokens, "token");
            let bar = progress(STEPS, &of_tokens);
            let timing = step.measure(&Sizes { config, dtype, tokens, from_router }, &|| bar.inc(1));
            bar.finish_and_clear();
            let name = self.name;
            timings.push(timing.with_context(|| format!("{name}, {of_tokens}: no time is given"))?);
        }
        let ceilings = before.or_higher(meter.ceilings()?);
        let setting = setting(ceilings);
        if !self.quiet {
            let machine = [meter.describe(&ceilings), meter.describe_arithmetic(&ceilings)];
            report::passes(&setting, &timings, &machine)?;
        }
        self.keep(&setting.device, &Rows::passes(&setting, &timings))
    }
}

/// A layer that is prepared, and the same layer where an optimizer would update it.
struct Step<'a, M: Meter> {
    run: Run<'a>,
    meter: &'a M,
    training: &'a TrainingLayer,
    layer: &'a <M::Backend as Backend>::Layer,
    weights: &'a MatrixMemory<M::Backend>,
    source: &'a Source,
}

impl<M: Meter<Backend: BackendBackward>> Step<'_, M> {
    /// Times the passes, and gives the times if what they left is right.
    fn measure(&mut self, sizes: &Sizes<'_>, tick: &dyn Fn()) -> Result<PassesTiming> {
        let &Sizes { config, dtype, tokens, from_router } = sizes;
        let (meter, backend) = (self.meter, self.meter.backend());
        let stream = backend.stream()?;
        let rate = meter.rate(&stream, config, tokens, dtype)?;
        let count = meter.batches(tokens);
        let batches = Batches {
            backend,
            stream: &stream,
            config,
            dtype,
            source: self.source,
            origin: if from_router { Origin::X } else { Origin::Logits },
            routing: self.run.arguments.routing,
            tokens,
            seed: self.run.arguments.seed,
        };
        let seed = |i: usize| self.run.arguments.seed.wrapping_add(9000 + i as u64);
        let mut memory = Memory {
            batches: batches.make(count, 1)?,
            kept: (0..count).map(|i| Kept::new(backend, sizes, seed(i))).collect::<Result<Vec<_>>>()?,
            gradients: MatrixMemory::gradients(backend, sizes)?,
            workspace: self.layer.workspace(tokens)?,
            scratch: self.training.workspace(backend, tokens)?,
        };
        let parameters = self.weights.parameters(sizes)?;
        for number in 0..count {
            Pass::ALL
                .into_iter()
                .try_for_each(|pass| self.enqueue(&stream, sizes, &parameters, &mut memory, (pass, number)))?;
        }
        let status = stream.status()?;
        ensure!(status.is_ok(), "status: {status}");
        // what the calls on the clock leave out must show
        memory.batches.iter_mut().try_for_each(|batch| batch.poison(backend))?;
        memory.kept.iter_mut().try_for_each(|kept| kept.poison(backend, sizes))?;
        memory.gradients.poison(backend, sizes)?;
        let mut call = |pass, number| self.enqueue(&stream, sizes, &parameters, &mut memory, (pass, number));
        let times = meter.time_passes(&stream, count, &mut call, tick)?;
        let Memory { batches, kept, gradients, .. } = memory;
        let [_, _, Times { finished, .. }] = &times;
        ensure!(!finished.is_empty(), "no call was finished");
        let left = Left { sizes, source: self.source, backend, stream: &stream };
        let mut verified = Verified::default();
        for (i, &number) in finished.iter().enumerate() {
            // the weights' gradients are those of the last call
            let matrices = (i + 1 == finished.len()).then_some(&gradients);
            left.verify((&batches[number % count], &kept[number % count]), matrices, &mut verified)
                .with_context(|| format!("call {number}"))?;
        }
        let costs: Vec<(Cost, usize)> = batches
            .iter()
            .map(|batch| {
                let (cost, touched) = batch.cost(dtype, tokens, config);
                (cost.backward(config, &batch.counts(config), dtype, from_router), touched)
            })
            .collect();
        let (cost, touched) = mean(&costs);
        let (runs, calls) = (times[2].samples.len(), times[2].calls);
        let passes = times.map(|mut times| Spans::of(&mut times.samples));
        Ok(PassesTiming {
            backward: Timing {
                tokens,
                runs,
                calls,
                median: passes[2].median,
                spread: passes[2].spread,
                touched,
                cost,
                rate,
                verified,
                beside: None,
            },
            passes,
            kept: self.training.activation_bytes(1, dtype) + config.hidden * dtype.size(),
        })
    }

    /// Enqueues a pass of the call of a number.
    fn enqueue(
        &self,
        stream: &StreamOf<M>,
        sizes: &Sizes<'_>,
        parameters: &LayerParameters<'_, M::Backend>,
        memory: &mut Memory<M::Backend>,
        (pass, number): (Pass, usize),
    ) -> Result<(), ErrorOf<M>> {
        let backend = self.meter.backend();
        let Memory { batches, kept, gradients, workspace, scratch } = memory;
        let i = number % batches.len().max(1);
        let (batch, kept) = (&mut batches[i], &mut kept[i]);
        match pass {
            Pass::Forward => self.layer.run(stream, batch.call(sizes.dtype, sizes.tokens, sizes.config)?, workspace),
            Pass::Saving => {
                let call = kept.forward(sizes, batch, parameters)?;
                self.training.forward(backend, stream, call, scratch)
            }
            Pass::Backward => {
                let call = kept.backward(sizes, batch, parameters, gradients)?;
                self.training.backward(backend, stream, call, scratch)
            }
        }
    }
}

/// What the passes read and write.
struct Memory<B: Backend> {
    batches: Vec<Batch<B>>,
    kept: Vec<Kept<B>>,
    gradients: MatrixMemory<B>,
    workspace: B::Workspace,
    scratch: TrainingWorkspace<B>,
}
