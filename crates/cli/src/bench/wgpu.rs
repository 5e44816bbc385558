//! A GPU behind wgpu: several calls in a submission, between two timestamps of the device's.

use super::budget;
use super::cuda::calls;
use super::machine::{self, Ceilings};
use super::meter::{Calls, LayerSizes, Meter, Room, StreamOf, Times};
use crate::args::{Origin, Spread};
use crate::output::{bytes, remedied, rounded};
use anyhow::{Result, ensure};
use fused_moe::config::LayerConfig;
use fused_moe::wgpu::{DenseSizes, Wgpu, read_bandwidth, time_dense, time_repeats};
use fused_moe::{Backend, DType, Stream};
use std::time::Duration;

/// Submissions that are timed.
const REPEATS: usize = 25;
/// Submissions that a ceiling is the best of.
const PASSES: usize = 10;
/// Bytes that calls read before one comes back to the same weights, in caches: so many, that nothing is left there.
const CACHES: u64 = 4;
/// wgpu does not say how large a GPU's cache is; few have more.
const CACHE: u64 = 64 << 20;

/// A GPU, or a processor that plays one.
pub(crate) struct Portable {
    wgpu: Wgpu,
}

impl Portable {
    pub(crate) fn new(wgpu: Wgpu) -> Self {
        Self { wgpu }
    }
}

impl Meter for Portable {
    type Backend = Wgpu;
    const ORIGIN: Origin = Origin::Logits;
    const TOKENS: &'static [usize] = &[1, 8, 32, 128, 512, 2048, 8192];
    const TRAINED: &'static [usize] = &[512, 2048, 8192];

    fn backend(&self) -> &Wgpu {
        &self.wgpu
    }

    fn device(&self) -> String {
        self.wgpu.numbers().name.clone()
    }

    fn threads(&self) -> Option<usize> {
        None
    }

    fn isa(&self) -> Option<String> {
        None
    }

    fn cache(&self) -> u64 {
        if self.wgpu.numbers().software { machine::last_level_cache().unwrap_or(32 << 20) } else { CACHE }
    }

    fn describe_cache(&self) -> String {
        let size = bytes(self.cache());
        if self.wgpu.numbers().software {
            format!("the largest cache has {size}")
        } else {
            format!("the cache is taken for {size}, which wgpu does not tell")
        }
    }

    /// wgpu does not tell how much memory a GPU has free: what does not fit is found out when it is allocated.
    fn room(&self, source: u64) -> Result<Room> {
        let host = budget(machine::available_memory().unwrap_or(u64::MAX));
        if source > host {
            return Err(remedied(
                format!("random weights take {} on the host, {} can be had", bytes(source), bytes(host)),
                "take a smaller shape or a narrower --dtype",
            ));
        }
        Ok(if self.wgpu.numbers().software { Room { had: host, source } } else { Room { had: u64::MAX, source: 0 } })
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
        let read = read_bandwidth(&self.wgpu, &self.wgpu.stream()?, PASSES)?;
        let bandwidth = read.bytes_per_second;
        Ok(Ceilings { bandwidth, slowest: bandwidth, arithmetic: 0.0, buffer: read.buffer })
    }

    fn rate(&self, stream: &StreamOf<Self>, config: &LayerConfig, tokens: usize, dtype: DType) -> Result<Option<f64>> {
        let LayerConfig { hidden, intermediate, top_k, .. } = *config;
        let sizes = DenseSizes { rows: tokens * top_k, hidden, gate_up: config.gate_up_rows(), intermediate, dtype };
        let best = time_dense(&self.wgpu, stream, sizes, PASSES)?.into_iter().fold(f64::INFINITY, f64::min);
        Ok(Some(sizes.flops() / best * 1e6))
    }

    fn time(&self, stream: &StreamOf<Self>, batches: usize, call: Calls<'_, Self>, tick: &dyn Fn()) -> Result<Times> {
        let times = time_repeats(&self.wgpu, stream, REPEATS, || {
            tick();
            (0..batches).try_for_each(&mut *call)
        })?;
        let status = stream.status()?;
        ensure!(status.is_ok(), "status: {status}");
        let per_call = |time: f64| Duration::try_from_secs_f64(time * 1e-6 / batches as f64);
        let samples = times.into_iter().map(per_call).collect::<Result<_, _>>()?;
        Ok(Times { samples, calls: batches, finished: (0..batches).collect() })
    }

    fn clock(&self) -> &'static str {
        clock(self.wgpu.numbers().timestamps)
    }

    fn describe(&self, ceilings: &Ceilings) -> String {
        format!(
            "{} GB/s read ({}, 16 bytes a load, best of {PASSES} passes before and as many after)",
            rounded(ceilings.bandwidth / 1e9),
            bytes(ceilings.buffer as u64)
        )
    }

    fn arithmetic(&self) -> String {
        "this crate's linear through wgpu".into()
    }

    fn describe_arithmetic(&self, _: &Ceilings) -> String {
        format!(
            "FLOP floor: two dense products with the FLOPs of the experts, best of {PASSES}, by {}, which no vendor tuned",
            self.arithmetic()
        )
    }
}

fn clock(timestamps: bool) -> &'static str {
    if timestamps {
        "submissions of 8 calls (4 from 513 tokens, 2 from 8193), each with its own logits, x and y; by the device's clock, between two timestamps"
    } else {
        "submissions of 8 calls (4 from 513 tokens, 2 from 8193), each with its own logits, x and y; by the host's clock, submission and waiting included: the device has no timestamps"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_is_named() {
        assert!(clock(true).contains("the device's clock") && !clock(true).contains("host"));
        assert!(clock(false).contains("the host's clock") && clock(false).contains("no timestamps"));
    }
}
