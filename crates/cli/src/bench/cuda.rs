//! An NVIDIA GPU: graphs of several calls, replayed, on the device's clock.

use super::budget;
use super::machine::{self, Ceilings};
use super::meter::{Calls, LayerSizes, Meter, Room, StreamOf, Times};
use crate::args::{Origin, Spread};
use crate::output::{bytes, remedied, rounded};
use anyhow::{Result, ensure};
use fused_moe::config::LayerConfig;
use fused_moe::cuda::{Cuda, Dense, DenseSizes, read_bandwidth, time_replays};
use fused_moe::{DType, Stream};
use std::time::Duration;

/// Replays of a graph that are timed.
const REPLAYS: usize = 25;
/// Replays and passes that a ceiling is the best of.
const PASSES: usize = 10;
/// Bytes that calls read before one comes back to the same weights, in L2 caches: so many, that nothing is left there.
const CACHES: u64 = 4;

/// A GPU.
pub(crate) struct Gpu {
    cuda: Cuda,
    dense: Dense,
}

impl Gpu {
    pub(crate) fn new(cuda: Cuda) -> Self {
        Self { dense: Dense::new(&cuda), cuda }
    }
}

/// Calls in a graph: the more the shorter they are, for the launch of the graph counts too.
pub(super) fn calls(tokens: usize) -> usize {
    match tokens {
        ..=512 => 8,
        513..=8192 => 4,
        _ => 2,
    }
}

impl Meter for Gpu {
    type Backend = Cuda;
    const ORIGIN: Origin = Origin::Logits;
    const TOKENS: &'static [usize] = &[1, 8, 32, 128, 512, 2048, 8192];
    const TRAINED: &'static [usize] = &[512, 2048, 8192];

    fn backend(&self) -> &Cuda {
        &self.cuda
    }

    fn device(&self) -> String {
        self.cuda.numbers().name.clone()
    }

    fn threads(&self) -> Option<usize> {
        None
    }

    fn isa(&self) -> Option<String> {
        None
    }

    fn cache(&self) -> u64 {
        self.cuda.numbers().l2_bytes as u64
    }

    fn room(&self, source: u64) -> Result<Room> {
        let host = budget(machine::available_memory().unwrap_or(u64::MAX));
        if source > host {
            return Err(remedied(
                format!("random weights take {} on the host, {} can be had", bytes(source), bytes(host)),
                "take a smaller shape or a narrower --dtype",
            ));
        }
        Ok(Room { had: budget(self.cuda.free_bytes()? as u64), source: 0 })
    }

    fn turns(&self, sizes: LayerSizes, _: Spread) -> u64 {
        self.cache().saturating_mul(CACHES).div_ceil(sizes.chosen.max(1)).max(2)
    }

    fn most_layers(&self) -> usize {
        calls(1)
    }

    fn batches(&self, tokens: usize) -> usize {
        calls(tokens)
    }

    fn ceilings(&self) -> Result<Ceilings> {
        let stream = fused_moe::Backend::stream(&self.cuda)?;
        let read = read_bandwidth(&self.cuda, &stream, PASSES)?;
        let bandwidth = read.bytes_per_second;
        Ok(Ceilings { bandwidth, slowest: bandwidth, arithmetic: 0.0, buffer: read.buffer })
    }

    fn rate(&self, stream: &StreamOf<Self>, config: &LayerConfig, tokens: usize, dtype: DType) -> Result<Option<f64>> {
        let LayerConfig { hidden, intermediate, top_k, .. } = *config;
        let sizes = DenseSizes { rows: tokens * top_k, hidden, gate_up: config.gate_up_rows(), intermediate, dtype };
        let best = self.dense.time(stream, sizes, PASSES)?.into_iter().fold(f64::INFINITY, f64::min);
        Ok(Some(sizes.flops() / best * 1e6))
    }

    fn time(&self, stream: &StreamOf<Self>, batches: usize, call: Calls<'_, Self>, tick: &dyn Fn()) -> Result<Times> {
        let times = time_replays(stream, REPLAYS, || (0..batches).try_for_each(&mut *call))?;
        let status = stream.status()?;
        ensure!(status.is_ok(), "status: {status}");
        tick();
        let per_call = |time: f64| Duration::try_from_secs_f64(time * 1e-6 / batches as f64);
        let samples = times.into_iter().map(per_call).collect::<Result<_, _>>()?;
        Ok(Times { samples, calls: batches, finished: (0..batches).collect() })
    }

    fn clock(&self) -> &'static str {
        "graphs of 8 calls (4 from 513 tokens, 2 from 8193), each with its own logits, x and y, replayed; by the device's clock"
    }

    fn describe(&self, ceilings: &Ceilings) -> String {
        format!(
            "{} GB/s read ({}, 16 bytes a load, best of {PASSES} passes before and as many after)",
            rounded(ceilings.bandwidth / 1e9),
            bytes(ceilings.buffer as u64)
        )
    }

    fn arithmetic(&self) -> String {
        self.dense.by()
    }

    fn describe_arithmetic(&self, _: &Ceilings) -> String {
        format!(
            "FLOP floor: two dense products with the FLOPs of the experts, best of {PASSES}, by {}",
            self.arithmetic()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn longer_calls_need_fewer_in_a_graph() {
        assert_eq!([1, 512, 513, 8192, 8193, 1 << 20].map(calls), [8, 8, 4, 4, 2, 2]);
    }
}
