//! Calls of a layer on a clock.

use super::batch::{Batch, Batches};
use super::machine::Ceilings;
use super::meter::{ErrorOf, Meter, StreamOf};
use super::weights::Source;
use crate::args::{Origin, Spread};
use anyhow::{Result, ensure};
use fused_moe::config::LayerConfig;
use fused_moe::{Backend, DType, HostView, Layer};
use fused_moe_conformance::rows::{self, Call};
use fused_moe_conformance::shapes::Cost;
use std::time::Duration;

/// Ticks of one batch size at most.
pub(crate) const STEPS: u64 = 303;
/// Rows of the first checked result that are worked out again; of each other result, one.
const ROWS: usize = 3;

/// Layers that take turns.
pub(crate) struct Bench<'a, M: Meter> {
    pub(crate) meter: &'a M,
    pub(crate) config: &'a LayerConfig,
    /// Format of weights, x and y.
    pub(crate) dtype: DType,
    pub(crate) layers: &'a [<M::Backend as Backend>::Layer],
    pub(crate) source: &'a Source,
    pub(crate) origin: Origin,
    pub(crate) routing: Spread,
    pub(crate) seed: u64,
}

/// What was measured at one batch size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timing {
    pub(crate) tokens: usize,
    pub(crate) runs: usize,
    /// Calls that a run consists of.
    pub(crate) calls: usize,
    pub(crate) median: Duration,
    /// The tenth and the ninetieth percentile.
    pub(crate) spread: [Duration; 2],
    /// Experts with tokens, on average.
    pub(crate) touched: f64,
    /// What a call costs at the least, on average.
    pub(crate) cost: Cost,
    /// Operations a second, where they were measured for this batch size.
    pub(crate) rate: Option<f64>,
    pub(crate) verified: Verified,
    /// The median of another backend.
    pub(crate) beside: Option<Duration>,
}

/// Times of a call or of a pass.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spans {
    pub(crate) median: Duration,
    /// The tenth and the ninetieth percentile.
    pub(crate) spread: [Duration; 2],
}

impl Spans {
    pub(super) fn of(samples: &mut [Duration]) -> Self {
        samples.sort_unstable();
        let quantile =
            |tenths: usize| samples.get(samples.len().saturating_sub(1) * tenths / 10).copied().unwrap_or_default();
        Self { median: quantile(5), spread: [quantile(1), quantile(9)] }
    }
}

/// What calls cost at the least and how many experts they touch, on average.
pub(super) fn mean(costs: &[(Cost, usize)]) -> (Cost, f64) {
    let count = costs.len().max(1);
    let mean = |part: fn(&Cost) -> u64| {
        let sum: u128 = costs.iter().map(|(cost, _)| u128::from(part(cost))).sum();
        u64::try_from(sum / count as u128).unwrap_or(u64::MAX)
    };
    let touched: usize = costs.iter().map(|(_, touched)| touched).sum();
    (Cost { bytes: mean(|cost| cost.bytes), flops: mean(|cost| cost.flops) }, touched as f64 / count as f64)
}

/// What the check found.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Verified {
    /// Rows that were worked out again.
    pub(crate) rows: usize,
    /// The error of y where it is worst, relative to the largest value of its row.
    pub(crate) error: f64,
    /// What it may be there.
    pub(crate) tolerance: f64,
}

impl Timing {
    /// Bytes in a second.
    pub(crate) fn bandwidth(&self) -> f64 {
        self.cost.bytes as f64 / self.median.as_secs_f64()
    }

    /// Floating-point operations in a second.
    pub(crate) fn arithmetic(&self) -> f64 {
        self.cost.flops as f64 / self.median.as_secs_f64()
    }

    /// Floating-point operations that the machine could do in a second.
    pub(crate) fn rate(&self, ceilings: &Ceilings) -> f64 {
        self.rate.unwrap_or(ceilings.arithmetic)
    }

    /// The shortest times in which the machine can read, and in which it can compute.
    pub(crate) fn floors(&self, ceilings: &Ceilings) -> [Duration; 2] {
        let read = self.cost.bytes as f64 / ceilings.bandwidth;
        let arithmetic = self.cost.flops as f64 / self.rate(ceilings);
        [read, arithmetic].map(|seconds| Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
    }

    /// The shortest time that the machine allows.
    pub(crate) fn floor(&self, ceilings: &Ceilings) -> Duration {
        let [read, arithmetic] = self.floors(ceilings);
        read.max(arithmetic)
    }
}

impl<M: Meter> Bench<'_, M> {
    /// Times calls, and gives the times if the outputs that they left are right; `tick` is called now and then.
    pub(crate) fn measure(&self, tokens: usize, tick: &dyn Fn()) -> Result<Timing> {
        let (meter, config, dtype) = (self.meter, self.config, self.dtype);
        let backend = meter.backend();
        let stream = backend.stream()?;
        let rate = meter.rate(&stream, config, tokens, dtype)?;
        tick();
        let count = meter.batches(tokens);
        let batches = Batches {
            backend,
            stream: &stream,
            config,
            dtype,
            source: self.source,
            origin: self.origin,
            routing: self.routing,
            tokens,
            seed: self.seed,
        };
        let mut batches = batches.make(count, self.layers.len())?;
        let [first, ..] = self.layers else { anyhow::bail!("no layers") };
        let mut workspace = first.workspace(tokens)?;
        let mut call = |number: usize| -> Result<(), ErrorOf<M>> {
            let (layer, batch) = turn(number, self.layers.len(), count);
            let call = batches[batch].call(dtype, tokens, config)?;
            self.layers[layer].run(&stream, call, &mut workspace)
        };
        let times = meter.time(&stream, count, &mut call, tick)?;
        let verified = self.verify(&stream, &batches, tokens, &times.finished)?;

        let costs: Vec<(Cost, usize)> = batches.iter().map(|batch| batch.cost(dtype, tokens, config)).collect();
        let (cost, touched) = mean(&costs);
        let mut samples = times.samples;
        let Spans { median, spread } = Spans::of(&mut samples);
        Ok(Timing {
            tokens,
            runs: samples.len(),
            calls: times.calls,
            median,
            spread,
            touched,
            cost,
            rate,
            verified,
            beside: None,
        })
    }

    /// The outputs of the calls of these numbers, against f64.
    fn verify(
        &self,
        stream: &StreamOf<M>,
        batches: &[Batch<M::Backend>],
        tokens: usize,
        calls: &[usize],
    ) -> Result<Verified> {
        let (config, shape) = (self.config, [tokens, self.config.hidden]);
        let sample = rows::sample(tokens, ROWS);
        let mut verified = Verified::default();
        for (i, &number) in calls.iter().enumerate() {
            let (layer, batch) = turn(number, self.layers.len(), batches.len());
            let batch = &batches[batch];
            let bytes = tokens * config.hidden * self.dtype.size();
            let mut y = vec![0u32; bytes.div_ceil(4)];
            self.meter.backend().download(stream, &batch.y, &mut bytemuck::cast_slice_mut(&mut y)[..bytes])?;
            let y = &bytemuck::cast_slice(&y)[..bytes];
            ensure!(!any_nan(self.dtype, y), "call {number} left NaN in its output");
            let logits = batch.logits.as_deref().map(|logits| HostView::of(logits, [tokens, config.experts]));
            let call = Call {
                x: batch.x.view(0, shape)?,
                experts: &batch.experts,
                weights: &batch.weights,
                logits: logits.transpose()?,
                y: HostView::new(y, self.dtype, 0, shape)?,
            };
            let weights = self.source.layer(layer)?;
            let one = sample.get(number % sample.len().max(1)..).and_then(|rest| rest.get(..1)).unwrap_or(&[]);
            let rows = if i == 0 { &sample[..] } else { one };
            let routes = rows::check_routes(config, &weights, &call, rows);
            let sums = rows::check(config, &weights, &call, rows);
            if let Some(failure) = routes.failure.or(sums.failure) {
                anyhow::bail!("call {number}: {failure}");
            }
            verified.rows += rows.len();
            if sums.error >= verified.error {
                (verified.error, verified.tolerance) = (sums.error, sums.tolerance);
            }
        }
        Ok(verified)
    }
}

/// Layer and batch of the call of a number: with each round of the batches, each meets the next layer.
fn turn(number: usize, layers: usize, batches: usize) -> (usize, usize) {
    let (layers, batches) = (layers.max(1), batches.max(1));
    (number % layers, (number + number / batches) % batches)
}

/// Whether there is a NaN among numbers of a format.
pub(super) fn any_nan(dtype: DType, bytes: &[u8]) -> bool {
    let infinity = match dtype {
        DType::F16 => 0x7c00,
        DType::BF16 => 0x7f80,
        _ => return bytes.chunks_exact(4).any(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]).is_nan()),
    };
    bytes.chunks_exact(2).any(|b| u16::from_le_bytes([b[0], b[1]]) & 0x7fff > infinity)
}

#[cfg(test)]
mod tests {
    use super::super::host::Host;
    use super::super::meter::{Calls, LayerSizes, Room, Times};
    use super::*;
    use fused_moe::Options;
    use fused_moe::cpu::Cpu;
    use half::{bf16, f16};

    fn timing(cost: Cost, rate: Option<f64>) -> Timing {
        let (median, spread) = (Duration::from_micros(10), [Duration::ZERO; 2]);
        let verified = Verified::default();
        Timing { tokens: 1, runs: 1, calls: 1, median, spread, touched: 1.0, cost, rate, verified, beside: None }
    }

    #[test]
    fn floors_are_of_the_same_run() {
        let ceilings = Ceilings { bandwidth: 1e12, slowest: 1e12, arithmetic: 1e12, buffer: 0 };
        let cost = Cost { bytes: 4_000_000, flops: 3_000_000 };
        let micros = |us| Duration::from_micros(us);
        assert_eq!(timing(cost, None).floors(&ceilings), [micros(4), micros(3)]);
        assert_eq!(timing(cost, None).floor(&ceilings), micros(4));
        let measured = timing(cost, Some(5e11));
        assert_eq!((measured.floor(&ceilings), measured.rate(&ceilings)), (micros(6), 5e11));
        assert_eq!((measured.bandwidth() / 1e9).round(), 400.0);
        assert_eq!((measured.arithmetic() / 1e9).round(), 300.0);
    }

    #[test]
    fn turns_begin_in_order_and_shift() {
        let turns = |layers, batches| (0..2 * batches).map(|i| turn(i, layers, batches)).collect::<Vec<_>>();
        assert_eq!(turns(2, 4)[..4], [(0, 0), (1, 1), (0, 2), (1, 3)]);
        assert_eq!(turns(2, 4)[4..], [(0, 1), (1, 2), (0, 3), (1, 0)]);
    }

    /// The processor, but what is run are other calls than those that are said to have been.
    struct Cheat {
        host: Host,
        runs: &'static [usize],
        says: &'static [usize],
    }

    impl Meter for Cheat {
        type Backend = Cpu;
        const ORIGIN: Origin = Origin::X;
        const TOKENS: &'static [usize] = &[1];
        const TRAINED: &'static [usize] = &[1];

        fn backend(&self) -> &Cpu {
            self.host.backend()
        }
        fn device(&self) -> String {
            self.host.device()
        }
        fn threads(&self) -> Option<usize> {
            self.host.threads()
        }
        fn isa(&self) -> Option<String> {
            self.host.isa()
        }
        fn cache(&self) -> u64 {
            self.host.cache()
        }
        fn room(&self, source: u64) -> Result<Room> {
            self.host.room(source)
        }
        fn turns(&self, sizes: LayerSizes, routing: Spread) -> u64 {
            self.host.turns(sizes, routing)
        }
        fn most_layers(&self) -> usize {
            self.host.most_layers()
        }
        fn batches(&self, _: usize) -> usize {
            8
        }
        fn ceilings(&self) -> Result<Ceilings> {
            self.host.ceilings()
        }
        fn rate(&self, _: &StreamOf<Self>, _: &LayerConfig, _: usize, _: DType) -> Result<Option<f64>> {
            Ok(None)
        }
        fn time(&self, _: &StreamOf<Self>, _: usize, call: Calls<'_, Self>, _: &dyn Fn()) -> Result<Times> {
            self.runs.iter().try_for_each(|&number| call(number))?;
            Ok(Times { samples: vec![Duration::from_micros(1)], calls: 1, finished: self.says.to_vec() })
        }
        fn clock(&self) -> &'static str {
            self.host.clock()
        }
        fn describe(&self, ceilings: &Ceilings) -> String {
            self.host.describe(ceilings)
        }
        fn arithmetic(&self) -> String {
            self.host.arithmetic()
        }
        fn describe_arithmetic(&self, ceilings: &Ceilings) -> String {
            self.host.describe_arithmetic(ceilings)
        }
    }

    #[test]
    fn no_time_is_given_for_wrong_outputs() {
        let (config, dtype, routing) = (LayerConfig::new(32, 16, 8, 2), DType::BF16, Spread::Uniform);
        let cpu = Cpu::with_threads(1).unwrap();
        let source = Source::new(&config, dtype, routing, 1);
        let prepare = |index| cpu.prepare(&config, &source.layer(index).unwrap(), &Options::default()).unwrap();
        let layers: Vec<_> = (0..3).map(prepare).collect();
        let measure = |origin, runs: &'static [usize], says: &'static [usize]| {
            let meter = &Cheat { host: Host::new(cpu.clone(), dtype), runs, says };
            let (config, layers, source) = (&config, &layers[..], &source);
            let bench = Bench { meter, config, dtype, layers, source, origin, routing, seed: 1 };
            bench.measure(5, &|| {}).map(|timing| timing.verified.rows).map_err(|error| error.to_string())
        };
        for origin in [Origin::X, Origin::Logits] {
            assert_eq!(measure(origin, &[0, 1, 2], &[0, 1, 2]), Ok(5));
            assert!(measure(origin, &[0], &[0, 1]).unwrap_err().contains("call 1 left NaN"));
            // the batch of call 1 and another layer's weights
            assert!(measure(origin, &[8], &[1]).unwrap_err().contains("call 1: y of token"));
        }
    }

    #[test]
    fn what_is_left_out_is_seen() {
        assert!([DType::F16, DType::BF16, DType::F32].into_iter().all(|dtype| any_nan(dtype, &[0xff; 4])));
        assert!(!any_nan(DType::F16, &f16::NEG_INFINITY.to_le_bytes()));
        assert!(!any_nan(DType::BF16, &bf16::INFINITY.to_le_bytes()));
        assert!(!any_nan(DType::F32, &f32::INFINITY.to_le_bytes()));
    }
}
