//! What this machine could do: read bandwidth and arithmetic rate, measured; memory and cache, as the system tells.

use anyhow::{Context, Result};
use fused_moe::DType;
use fused_moe::cpu::arch::Kernels;
use fused_moe::cpu::{Cpu, Memory};
use std::fs;
use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

/// What a layer is compared with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ceilings {
    /// Bytes read from memory in a second.
    pub(crate) bandwidth: f64,
    /// The same of the slowest measurement that there was, each of them the best of its passes.
    pub(crate) slowest: f64,
    /// Floating-point operations in a second; 0 where they are measured for each batch size.
    pub(crate) arithmetic: f64,
    /// Size of the buffer that was read.
    pub(crate) buffer: usize,
}

impl Ceilings {
    /// The higher of two measurements.
    pub(crate) fn or_higher(self, other: Self) -> Self {
        let (bandwidth, arithmetic) = (self.bandwidth.max(other.bandwidth), self.arithmetic.max(other.arithmetic));
        Self { bandwidth, arithmetic, slowest: self.slowest.min(other.slowest), ..self }
    }

    /// Whether the measurements of the read bandwidth differ so much that the reader should know.
    pub(crate) fn vary(&self) -> bool {
        self.slowest < STEADY * self.bandwidth
    }
}

/// The least part of the best measurement that the slowest one may be and pass for the same.
const STEADY: f64 = 0.75;
/// Passes of each measurement, at least.
pub(super) const PASSES: usize = 6;

/// Measures both with the threads of a processor, the arithmetic with its instruction set and numbers of a format. The best
/// of a few passes counts: a ceiling is what nothing should beat.
pub(crate) fn measure(cpu: &Cpu, dtype: DType, cache: u64, available: u64) -> Result<Ceilings> {
    let buffer = cache.saturating_mul(4).clamp(1 << 28, 1 << 32).min(available / 4).max(1 << 22) as usize;
    let kernels = Kernels::new(cpu.isa()).unwrap_or_else(Kernels::best);
    let bandwidth = bandwidth(cpu.threads(), buffer)?;
    Ok(Ceilings { bandwidth, slowest: bandwidth, arithmetic: arithmetic(cpu.threads(), kernels, dtype), buffer })
}

/// Bytes that come from memory together.
const LINE: usize = 64;
/// Places that a thread reads at a time, so that it never waits for one of them alone.
const STREAMS: usize = 8;

/// Fetches a buffer: one number of each cache line, from several places in turn.
fn fetch(floats: &[f32]) -> f32 {
    let length = floats.len() / STREAMS;
    let streams: [&[f32]; STREAMS] = std::array::from_fn(|i| &floats[i * length..(i + 1) * length]);
    let mut sums = [0.0; STREAMS];
    for at in (0..length).step_by(LINE / size_of::<f32>()) {
        for (sum, stream) in sums.iter_mut().zip(streams) {
            *sum += stream[at];
        }
    }
    sums.iter().sum()
}

/// A buffer, cut between the threads, each fetching its part: the bandwidth of the best pass.
fn bandwidth(threads: usize, bytes: usize) -> Result<f64> {
    let mut memory = Memory::new(bytes).context("memory to measure the bandwidth with")?;
    let floats: &mut [f32] = bytemuck::try_cast_slice_mut(&mut memory).map_err(|error| anyhow::anyhow!("{error}"))?;
    let part = floats.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        for floats in floats.chunks_mut(part) {
            scope.spawn(|| floats.iter_mut().enumerate().for_each(|(i, x)| *x = 1.0 + (i & 0xff) as f32));
        }
    });
    let floats: &[f32] = floats;
    let best = passes(threads, |thread| {
        let first = (thread * part).min(floats.len());
        let last = (first + part).min(floats.len());
        black_box(fetch(&floats[first..last]));
    });
    Ok(size_of_val(floats) as f64 / best.as_secs_f64())
}

/// Multiply-adds of a format's numbers, in registers alone.
fn arithmetic(threads: usize, kernels: Kernels, dtype: DType) -> f64 {
    const ROUNDS: usize = 200_000;
    let multiply_adds = kernels.multiply_adds(dtype, 1) * ROUNDS;
    let best = passes(threads, |_| {
        black_box(kernels.multiply_adds(dtype, black_box(ROUNDS)));
    });
    (threads * 2 * multiply_adds) as f64 / best.as_secs_f64()
}

/// The shortest of some passes of `work` on so many threads: at least a few, but for those that take long, and so many that other
/// work on the machine does not meet all of them.
fn passes(threads: usize, work: impl Fn(usize) + Sync) -> Duration {
    const WHILE: Duration = Duration::from_millis(200);
    const ENOUGH: Duration = Duration::from_secs(2);
    let begin = Instant::now();
    let mut best = together(threads, &work);
    for pass in 1.. {
        let elapsed = begin.elapsed();
        if elapsed > ENOUGH || pass >= PASSES && elapsed > WHILE {
            break;
        }
        best = best.min(together(threads, &work));
    }
    best
}

/// From the first beginning to the last end of `work` on so many threads that are let go at once, by their own clocks:
/// whoever waits for them may wake late.
fn together(threads: usize, work: impl Fn(usize) + Sync) -> Duration {
    let barrier = Barrier::new(threads);
    let timed = |thread| {
        barrier.wait();
        let begin = Instant::now();
        work(thread);
        (begin, Instant::now())
    };
    let times: Vec<(Instant, Instant)> = std::thread::scope(|scope| {
        let timed = &timed;
        let workers: Vec<_> = (0..threads).map(|thread| scope.spawn(move || timed(thread))).collect();
        workers.into_iter().filter_map(|worker| worker.join().ok()).collect()
    });
    let first = times.iter().map(|(begin, _)| *begin).min();
    let last = times.iter().map(|(_, end)| *end).max();
    first.zip(last).map_or(Duration::MAX, |(first, last)| last - first)
}

/// Bytes of memory that can be had without swapping, where the system tells.
pub(crate) fn available_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Bytes of the largest cache, where the system tells.
pub(crate) fn last_level_cache() -> Option<u64> {
    let caches = fs::read_dir("/sys/devices/system/cpu/cpu0/cache").ok()?;
    let sizes = caches.filter_map(|entry| {
        let text = fs::read_to_string(entry.ok()?.path().join("size")).ok()?;
        let text = text.trim();
        let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
        let unit = match unit {
            "K" => 1 << 10,
            "M" => 1 << 20,
            _ => 1,
        };
        digits.parse::<u64>().ok()?.checked_mul(unit)
    });
    sizes.max()
}

/// The processor's name, where the system tells.
pub(crate) fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split_once(':'));
    name.map_or_else(|| format!("unknown {} processor", std::env::consts::ARCH), |(_, name)| name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use fused_moe::cpu::arch::Isa;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn ceilings_are_positive() {
        let cpu = Cpu::with_threads(2).unwrap();
        let ceilings = measure(&cpu, DType::BF16, 0, 1 << 24).unwrap();
        assert!(ceilings.slowest > 1e6 && ceilings.arithmetic > 1e6 && ceilings.buffer == 1 << 22);
        assert!(!ceilings.vary(), "one measurement has nothing to differ from");
    }

    #[test]
    fn the_shortest_pass_counts() {
        let (slow, ran) = (Duration::from_millis(200), AtomicUsize::new(0));
        let best = passes(1, |_| {
            if ran.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) {
                std::thread::sleep(slow);
            }
        });
        assert!(best < slow, "{best:?}");
    }

    #[test]
    fn the_arithmetic_is_that_of_the_instruction_set() {
        let rate = |isa| {
            let cpu = Cpu::with_threads(1).unwrap().with_isa(isa).unwrap();
            measure(&cpu, DType::F32, 0, 1 << 24).unwrap().arithmetic
        };
        // vectors of eight numbers and fused multiply-adds against the baseline's four
        if Isa::Avx2.is_available() {
            assert!(rate(Isa::Avx2) > 1.5 * rate(Isa::Scalar));
        }
    }

    #[test]
    fn measurements_far_apart_are_seen() {
        let of = |bandwidth| Ceilings { bandwidth, slowest: bandwidth, arithmetic: 1.0, buffer: 1 };
        let vary = |before, after| of(before).or_higher(of(after)).vary();
        assert_eq!(
            [vary(40.0, 31.0), vary(31.0, 40.0), vary(40.0, 29.0), vary(29.0, 40.0)],
            [false, false, true, true]
        );
    }
}
