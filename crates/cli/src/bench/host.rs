//! The processor: each call on the host's clock.

use super::budget;
use super::machine::{self, Ceilings, PASSES};
use super::meter::{Calls, ErrorOf, LayerSizes, Meter, Pass, Passes, Room, StreamOf, Times};
use crate::args::{Origin, Spread};
use crate::output::{bytes, rounded};
use anyhow::{Result, ensure};
use fused_moe::config::LayerConfig;
use fused_moe::cpu::Cpu;
use fused_moe::{DType, Stream};
use std::time::{Duration, Instant};

/// Batches of tokens that runs go through.
const BATCHES: usize = 8;
/// Runs of a batch size, the first of which do not count.
const RUNS: std::ops::RangeInclusive<usize> = 7..=300;
const WARM_UP: usize = 2;
/// After so long, the fewest runs will do.
const ENOUGH: Duration = Duration::from_millis(1500);
/// Bytes that the layers should have together, in largest caches: so many, that little of what a run reads is left from
/// an earlier run.
const CACHES: u64 = 8;

/// The processor.
pub(crate) struct Host {
    cpu: Cpu,
    /// Format of what is multiplied.
    dtype: DType,
    cache: u64,
    available: u64,
}

impl Host {
    pub(crate) fn new(cpu: Cpu, dtype: DType) -> Self {
        let available = machine::available_memory().unwrap_or(u64::MAX);
        Self { cpu, dtype, cache: machine::last_level_cache().unwrap_or(32 << 20), available }
    }
}

impl Meter for Host {
    type Backend = Cpu;
    const ORIGIN: Origin = Origin::X;
    const TOKENS: &'static [usize] = &[1, 4, 16, 64, 256];
    const TRAINED: &'static [usize] = &[64, 256, 1024];

    fn backend(&self) -> &Cpu {
        &self.cpu
    }

    fn device(&self) -> String {
        machine::processor()
    }

    fn threads(&self) -> Option<usize> {
        Some(self.cpu.threads())
    }

    fn isa(&self) -> Option<String> {
        Some(self.cpu.isa().to_string())
    }

    fn cache(&self) -> u64 {
        self.cache
    }

    fn room(&self, source: u64) -> Result<Room> {
        Ok(Room { had: budget(self.available), source })
    }

    fn turns(&self, sizes: LayerSizes, routing: Spread) -> u64 {
        let hot = match routing {
            Spread::One => sizes.chosen,
            Spread::Uniform | Spread::Zipf | Spread::Half => sizes.layer,
        };
        self.cache.saturating_mul(CACHES).div_ceil(hot.max(1)).max(2)
    }

    fn most_layers(&self) -> usize {
        64
    }

    fn batches(&self, _: usize) -> usize {
        BATCHES
    }

    fn ceilings(&self) -> Result<Ceilings> {
        machine::measure(&self.cpu, self.dtype, self.cache, machine::available_memory().unwrap_or(1 << 30))
    }

    fn rate(&self, _: &StreamOf<Self>, _: &LayerConfig, _: usize, _: DType) -> Result<Option<f64>> {
        Ok(None)
    }

    fn time(&self, stream: &StreamOf<Self>, _: usize, call: Calls<'_, Self>, tick: &dyn Fn()) -> Result<Times> {
        let [times] = in_turn(stream, [()], &mut |(), number| call(number), tick)?;
        Ok(times)
    }

    /// In turn, so that what else the machine does falls on all passes alike.
    fn time_passes(
        &self,
        stream: &StreamOf<Self>,
        _: usize,
        call: Passes<'_, Self>,
        tick: &dyn Fn(),
    ) -> Result<[Times; 3]> {
        in_turn(stream, Pass::ALL, call, tick)
    }

    fn clock(&self) -> &'static str {
        "each call, by the host's clock"
    }

    fn describe(&self, ceilings: &Ceilings) -> String {
        format!(
            "{} GB/s read ({} of f32, best of {PASSES} passes or more before and after)",
            rounded(ceilings.bandwidth / 1e9),
            bytes(ceilings.buffer as u64)
        )
    }

    fn arithmetic(&self) -> String {
        format!("{} multiply-adds", self.dtype)
    }

    fn describe_arithmetic(&self, ceilings: &Ceilings) -> String {
        let rate = rounded(ceilings.arithmetic / 1e9);
        format!("{rate} GFLOP/s ({} of {}, in registers, best of as many passes)", self.arithmetic(), self.cpu.isa())
    }
}

/// Times calls of several kinds, one of each in every run.
fn in_turn<K: Copy, const N: usize>(
    stream: &StreamOf<Host>,
    kinds: [K; N],
    call: &mut dyn FnMut(K, usize) -> Result<(), ErrorOf<Host>>,
    tick: &dyn Fn(),
) -> Result<[Times; N]> {
    let (mut samples, begin, mut last) = ([(); N].map(|()| Vec::new()), Instant::now(), 0);
    for run in 0..WARM_UP + RUNS.end() {
        if run >= WARM_UP + RUNS.start() && begin.elapsed() > ENOUGH {
            break;
        }
        for (kind, samples) in kinds.into_iter().zip(&mut samples) {
            let start = Instant::now();
            call(kind, run)?;
            let status = stream.status()?;
            let time = start.elapsed();
            ensure!(status.is_ok(), "status: {status}");
            if run >= WARM_UP {
                samples.push(time);
            }
        }
        last = run;
        tick();
    }
    Ok(samples.map(|samples| Times { samples, calls: 1, finished: vec![last] }))
}
