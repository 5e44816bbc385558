//! Runs of a layer on a clock.

use super::machine::Ceilings;
use super::weights::{Numbers, Source};
use anyhow::{Result, ensure};
use fused_moe::backend::{shorten, shorten_mut};
use fused_moe::config::LayerConfig;
use fused_moe::operation::{Forward, RoutesOut};
use fused_moe::{Backend, DType, HostView, Layer, Stream, View};
use fused_moe_conformance::rows::{self, Call};
use fused_moe_conformance::shapes::Cost;
use std::time::{Duration, Instant};

/// Batches of tokens that runs go through.
pub(crate) const BATCHES: usize = 8;
/// Runs of a batch size, the first of which do not count.
const RUNS: std::ops::RangeInclusive<usize> = 7..=300;
const WARM_UP: usize = 2;
/// Ticks of one batch size at most.
pub(crate) const STEPS: u64 = (WARM_UP + *RUNS.end() + 1) as u64;
/// Rows of a result that are worked out again.
const ROWS: usize = 3;
/// After so long, the fewest runs will do.
const ENOUGH: Duration = Duration::from_millis(1500);

/// Layers that take turns.
pub(crate) struct Bench<'a, B: Backend> {
    pub(crate) backend: &'a B,
    pub(crate) config: &'a LayerConfig,
    /// Format of weights, x and y.
    pub(crate) dtype: DType,
    pub(crate) layers: &'a [B::Layer],
    pub(crate) source: &'a Source,
    pub(crate) seed: u64,
}

/// What was measured at one batch size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timing {
    pub(crate) tokens: usize,
    pub(crate) runs: usize,
    pub(crate) median: Duration,
    /// The tenth and the ninetieth percentile.
    pub(crate) spread: [Duration; 2],
    /// Experts with tokens, on average.
    pub(crate) touched: f64,
    /// What a run costs at the least, on average.
    pub(crate) cost: Cost,
    pub(crate) verified: Verified,
}

/// What the check before the clock found.
#[derive(Clone, Copy, Debug)]
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

    /// The shortest time that the machine allows.
    pub(crate) fn floor(&self, ceilings: &Ceilings) -> Duration {
        Duration::try_from_secs_f64(self.cost.floor(ceilings.bandwidth, ceilings.arithmetic)).unwrap_or(Duration::MAX)
    }
}

impl<B: Backend> Bench<'_, B> {
    /// Checks a result, then measures; `tick` is called after each run.
    pub(crate) fn measure(&self, tokens: usize, tick: impl Fn()) -> Result<Timing> {
        let LayerConfig { hidden, experts, .. } = *self.config;
        let backend = self.backend;
        let stream = backend.stream()?;
        let batches = (0..BATCHES as u64)
            .map(|i| Numbers::new(self.dtype, tokens * hidden, 1.0, self.seed.wrapping_add(1000 + i)))
            .collect::<Vec<_>>();
        let mut inputs = Vec::new();
        for batch in &batches {
            let mut memory = backend.allocate(batch.bytes().len())?;
            backend.upload(batch.bytes(), &mut memory)?;
            inputs.push(memory);
        }
        let mut y = backend.allocate(tokens * hidden * self.dtype.size())?;
        let mut counts = backend.allocate(experts * size_of::<u32>())?;
        let [first, ..] = self.layers else { anyhow::bail!("no layers") };
        let mut workspace = first.workspace(tokens)?;
        let verified = self.verify(&stream, &batches[0], tokens)?;
        tick();

        let (mut times, mut touched, mut bytes, mut flops) = (Vec::new(), 0usize, 0u128, 0u128);
        let begin = Instant::now();
        let mut host_counts = vec![0u32; experts];
        for run in 0..WARM_UP + RUNS.end() {
            if run >= WARM_UP + RUNS.start() && begin.elapsed() > ENOUGH {
                break;
            }
            let layer = &self.layers[run % self.layers.len()];
            let x = &inputs[(run + run / self.layers.len()) % BATCHES];
            let mut call = Forward::<B>::new(
                shorten::<B>(View::new(B::read(x), self.dtype, 0, [tokens, hidden])?),
                shorten_mut::<B>(View::new(B::write(&mut y), self.dtype, 0, [tokens, hidden])?),
            );
            call.counts = Some(shorten_mut::<B>(View::new(B::write(&mut counts), DType::U32, 0, [experts])?));
            let start = Instant::now();
            layer.run(&stream, call, &mut workspace)?;
            let status = stream.status()?;
            let time = start.elapsed();
            ensure!(status.is_ok(), "status: {status}");
            if run >= WARM_UP {
                times.push(time);
                backend.download(&stream, &counts, bytemuck::cast_slice_mut(&mut host_counts))?;
                let cost = Cost::of(self.config, tokens, &host_counts, [self.dtype; 2]);
                bytes += u128::from(cost.bytes);
                flops += u128::from(cost.flops);
                touched += host_counts.iter().filter(|&&count| count > 0).count();
            }
            tick();
        }
        times.sort_unstable();
        let quantile = |tenths: usize| times.get((times.len() - 1) * tenths / 10).copied().unwrap_or_default();
        let mean = |sum: u128| u64::try_from(sum / times.len().max(1) as u128).unwrap_or(u64::MAX);
        Ok(Timing {
            tokens,
            runs: times.len(),
            median: quantile(5),
            spread: [quantile(1), quantile(9)],
            touched: touched as f64 / times.len() as f64,
            cost: Cost { bytes: mean(bytes), flops: mean(flops) },
            verified,
        })
    }

    /// The first layer on the first batch, against f64.
    fn verify(&self, stream: &B::Stream, batch: &Numbers, tokens: usize) -> Result<Verified> {
        let LayerConfig { hidden, top_k, .. } = *self.config;
        let [layer, ..] = self.layers else { anyhow::bail!("no layers") };
        let backend = self.backend;
        let slots = tokens * top_k;
        let mut x = backend.allocate(batch.bytes().len())?;
        backend.upload(batch.bytes(), &mut x)?;
        let mut y = backend.allocate(tokens * hidden * self.dtype.size())?;
        let mut experts = backend.allocate(slots * size_of::<u32>())?;
        let mut weights = backend.allocate(slots * size_of::<f32>())?;
        let mut workspace = layer.workspace(tokens)?;
        let mut call = Forward::<B>::new(
            shorten::<B>(View::new(B::read(&x), self.dtype, 0, [tokens, hidden])?),
            shorten_mut::<B>(View::new(B::write(&mut y), self.dtype, 0, [tokens, hidden])?),
        );
        call.routes = Some(RoutesOut {
            experts: shorten_mut::<B>(View::new(B::write(&mut experts), DType::U32, 0, [tokens, top_k])?),
            weights: shorten_mut::<B>(View::new(B::write(&mut weights), DType::F32, 0, [tokens, top_k])?),
        });
        layer.run(stream, call, &mut workspace)?;
        let mut host_y = vec![0u32; (tokens * hidden * self.dtype.size()).div_ceil(4)];
        let (mut host_experts, mut host_weights) = (vec![0u32; slots], vec![0f32; slots]);
        let y_bytes = tokens * hidden * self.dtype.size();
        backend.download(stream, &y, &mut bytemuck::cast_slice_mut(&mut host_y)[..y_bytes])?;
        backend.download(stream, &experts, bytemuck::cast_slice_mut(&mut host_experts))?;
        backend.download(stream, &weights, bytemuck::cast_slice_mut(&mut host_weights))?;
        let call = Call {
            x: batch.view(0, [tokens, hidden])?,
            y: HostView::new(bytemuck::cast_slice(&host_y), self.dtype, 0, [tokens, hidden])?,
            experts: &host_experts,
            weights: &host_weights,
        };
        let (weights, sample) = (self.source.layer(0)?, rows::sample(tokens, ROWS));
        let routes = rows::check_routes(self.config, &weights, &call, &sample);
        let sums = rows::check(self.config, &weights, &call, &sample);
        if let Some(failure) = routes.failure.or(sums.failure) {
            anyhow::bail!(failure);
        }
        Ok(Verified { rows: sample.len(), error: sums.error, tolerance: sums.tolerance })
    }
}
