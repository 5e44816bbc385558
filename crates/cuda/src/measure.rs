//! What the device does in what time, by its own clock.

use crate::Cuda;
use crate::device::{driver_error, repeat};
use crate::error::Result;
use crate::kernel::Kernel;
use crate::launch::{Grid, launch, params};
use crate::stream::{CudaStream, Graph};
use cudarc::driver::sys::CUevent_flags;

/// Microseconds of each of `repeats` replays of what `enqueue` enqueues on `stream`, captured as [`Graph::capture`] does it,
/// by the device's own clock, after two that are not timed. Waits.
///
/// Errors: `enqueue`'s, `Driver`, `DeviceLost`.
pub fn time_replays(stream: &CudaStream, repeats: usize, enqueue: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
    Graph::for_a_while(stream, enqueue, |graph| times(stream, graph, repeats))
}

fn times(stream: &CudaStream, graph: &Graph, repeats: usize) -> Result<Vec<f64>> {
    let _current = stream.device().bind("timing")?;
    let failed = |e| driver_error("timing", e);
    let event = || stream.driver().context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).map_err(failed);
    let (begin, end) = (event()?, event()?);
    for _ in 0..2 {
        graph.replay(stream)?;
    }
    let mut times = Vec::with_capacity(repeats);
    for _ in 0..repeats {
        begin.record(stream.driver()).map_err(failed)?;
        graph.replay(stream)?;
        end.record(stream.driver()).map_err(failed)?;
        times.push(f64::from(begin.elapsed_ms(&end).map_err(failed)?) * 1000.0);
    }
    Ok(times)
}

params! {
    ReadAllParams { from: u64, count: u64, sink: u64 }
}

/// How fast device memory was read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ReadRate {
    /// Bytes a second.
    pub bytes_per_second: f64,
    /// Bytes of the buffer that was read.
    pub buffer: usize,
}

/// Threads of a block, and blocks that a multiprocessor holds.
const THREADS: u32 = 512;
const BLOCKS: usize = 4;
/// The largest buffer, so long to read that the clock's steps do not matter.
const MOST: usize = 4 << 30;

/// The rate at which a kernel that does nothing else reads memory of the device, the best of `repeats` passes over a
/// buffer of 4 GiB (a quarter of what is free, where that is less). Waits.
///
/// Errors: `NoCompiler`, `OutOfMemory`, `Driver`, `DeviceLost`.
pub fn read_bandwidth(cuda: &Cuda, stream: &CudaStream, repeats: usize) -> Result<ReadRate> {
    let buffer = (cuda.free_bytes()? / 4).min(MOST) / 256 * 256;
    let (from, sink) = (cuda.device().allocate(buffer)?, cuda.device().allocate(256)?);
    repeat(cuda.device(), &noise(), from.address, buffer)?;
    cuda.kernels().prepare(&[Kernel::ReadAll])?;
    let params = ReadAllParams { from: from.address, count: buffer as u64 / 16, sink: sink.address };
    let grid = Grid::line(cuda.numbers().multiprocessors as usize * BLOCKS, THREADS);
    let pass = || launch(cuda, stream, Kernel::ReadAll, grid, &params);
    let best = time_replays(stream, repeats.max(1), pass)?.into_iter().fold(f64::INFINITY, f64::min);
    Ok(ReadRate { bytes_per_second: buffer as f64 / best * 1e6, buffer })
}

/// Numbers between 1/128 and 2 in size as f16, bf16 or f32, of either sign: memory that is all zeros is read and multiplied
/// at less power, and so faster, than real data.
pub(crate) fn noise() -> Vec<u8> {
    let mut state = 1u64;
    let half = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        // 0x3c00 to 0x3fff is a moderate number in all three formats
        ((state >> 48) as u16 & 0x83ff) | 0x3c00
    };
    std::iter::repeat_with(half).take(1 << 22).flat_map(u16::to_le_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    #[test]
    fn noise_is_moderate_in_every_format() {
        let bytes = noise();
        let moderate = |x: f32| (0.001..=4.0).contains(&x.abs());
        for bytes in bytes.chunks_exact(4).take(10_000) {
            let [a, b, c, d] = [bytes[0], bytes[1], bytes[2], bytes[3]];
            let (low, high) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
            assert!(moderate(f32::from_le_bytes([a, b, c, d])), "{low:x} {high:x}");
            assert!(moderate(f16::from_bits(low).to_f32()) && moderate(bf16::from_bits(low).to_f32()), "{low:x}");
        }
    }
}
