//! What the device does in what time, by its own clock where it has one.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernel::Kernel;
use crate::launch::{Groups, Operand, launch, params};
use crate::memory::Memory;
use crate::{Wgpu, WgpuStream};
use fused_moe_core::operation::Linear;
use fused_moe_core::{Backend, DType, View};
use std::time::Instant;
use wgpu::{BufferUsages, QuerySetDescriptor, QueryType};

/// Runs that are not timed.
const WARM_UP: usize = 2;

/// Microseconds of each of `repeats` runs, after two that are not timed. `work` records the calls of a run on the stream
/// and does not submit. Waits.
///
/// Where the device has timestamps ([`DeviceNumbers::timestamps`](crate::DeviceNumbers::timestamps)), they are taken before
/// and after the calls; else the time is the host's, from submission until everything is done.
///
/// Errors: those of `work`, `OutOfMemory`, `DeviceLost`, `Device`.
pub fn time_repeats(
    wgpu: &Wgpu,
    stream: &WgpuStream,
    repeats: usize,
    mut work: impl FnMut() -> Result<()>,
) -> Result<Vec<f64>> {
    let device = wgpu.device();
    let clock = device.numbers.timestamps.then(|| Clock::new(device)).transpose()?;
    stream.submit()?;
    device.wait("timing")?;
    let mut times = Vec::with_capacity(repeats);
    for run in 0..WARM_UP + repeats {
        let time = match &clock {
            Some(clock) => clock.time(stream, &mut work)?,
            None => {
                work()?;
                let start = Instant::now();
                stream.submit()?;
                device.wait("timing")?;
                start.elapsed().as_secs_f64() * 1e6
            }
        };
        if run >= WARM_UP {
            times.push(time);
        }
    }
    Ok(times)
}

/// Two timestamps, and the way that they take to the host.
struct Clock<'a> {
    device: &'a Device,
    set: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    mapped: wgpu::Buffer,
    /// Nanoseconds of a tick.
    period: f64,
}

/// Bytes of two timestamps.
const BYTES: u64 = 16;

impl<'a> Clock<'a> {
    fn new(device: &'a Device) -> Result<Self> {
        let descriptor = QuerySetDescriptor { label: None, ty: QueryType::Timestamp, count: 2 };
        let set = device.checked("timing", || device.device.create_query_set(&descriptor))?;
        let resolved = device.buffer(BYTES, BufferUsages::QUERY_RESOLVE | BufferUsages::COPY_SRC)?;
        let mapped = device.buffer(BYTES, BufferUsages::MAP_READ | BufferUsages::COPY_DST)?;
        let period = f64::from(device.queue.get_timestamp_period());
        Ok(Self { device, set, resolved, mapped, period })
    }

    /// Microseconds of what `work` records.
    fn time(&self, stream: &WgpuStream, work: &mut impl FnMut() -> Result<()>) -> Result<f64> {
        stream.record(|encoder| encoder.write_timestamp(&self.set, 0))?;
        work()?;
        stream.record(|encoder| {
            encoder.write_timestamp(&self.set, 1);
            encoder.resolve_query_set(&self.set, 0..2, &self.resolved, 0);
            encoder.copy_buffer_to_buffer(&self.resolved, 0, &self.mapped, 0, BYTES);
        })?;
        stream.submit()?;
        let mut ticks = [0u64; 2];
        self.device.read_mapped(&self.mapped, bytemuck::cast_slice_mut(&mut ticks), "timing")?;
        Ok(microseconds(ticks, self.period))
    }
}

/// Of two timestamps, in ticks of so many nanoseconds; the counter may have begun anew in between.
fn microseconds([begin, end]: [u64; 2], period: f64) -> f64 {
    end.wrapping_sub(begin) as f64 * period / 1e3
}

params! {
    ReadAllParams { count: u32, groups: u32 }
}

/// How fast device memory was read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ReadRate {
    /// Bytes a second.
    pub bytes_per_second: f64,
    /// Bytes of the buffer that was read.
    pub buffer: usize,
}

/// The largest buffer, so long to read that the clock's steps do not matter; the smallest that will do.
const MOST: u64 = 4 << 30;
const LEAST: u64 = 1 << 20;
/// Workgroups that read: several rounds of what a large GPU holds at once.
const GROUPS: u64 = 4096;
/// Bytes that a workgroup reads at the least.
const PART: u64 = 4 * 256 * 16;

/// The rate at which a kernel that does nothing else reads memory of the device, the best of `repeats` passes over a
/// buffer that is as large as a binding may be and 4 GiB at most (half of it, and so on, where memory is short). Waits.
///
/// Errors: `OutOfMemory`, `Compile`, `DeviceLost`, `Device`.
pub fn read_bandwidth(wgpu: &Wgpu, stream: &WgpuStream, repeats: usize) -> Result<ReadRate> {
    let mut bytes = read_bytes(wgpu.numbers().binding_bytes, wgpu.numbers().buffer_bytes);
    let from = loop {
        match noisy(wgpu, stream, bytes) {
            Err(Error::OutOfMemory { .. }) if bytes > LEAST => bytes = bytes / 2 / PART * PART,
            other => break other?,
        }
    };
    let sink = wgpu.allocate(4)?;
    let from_operand = Operand::matrix(wgpu.device(), "read_all", from.buffer(), (DType::BF16, 0))?.widened();
    let operands = [Some(from_operand), Some(Operand::whole(sink.buffer()))];
    let groups = (bytes / PART).clamp(1, GROUPS);
    let params = ReadAllParams { count: (bytes / 16) as u32, groups: groups as u32 };
    let work = || launch(wgpu, stream, Kernel::ReadAll, &operands, (Groups::Line(groups), &params));
    let best = best(time_repeats(wgpu, stream, repeats.max(1), work)?);
    Ok(ReadRate { bytes_per_second: bytes as f64 / best * 1e6, buffer: bytes as usize })
}

/// Bytes to read where so many can be bound, of a buffer of so many.
fn read_bytes(binding: u64, buffer: u64) -> u64 {
    MOST.min(binding).min(buffer) / PART * PART
}

/// Sizes of the two products of a layer call: `[rows, hidden] . [gate_up, hidden]^T` and
/// `[rows, intermediate] . [hidden, intermediate]^T`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DenseSizes {
    /// R.
    pub rows: usize,
    /// H.
    pub hidden: usize,
    /// Rows of an expert's gate_up: 2I, or I without gate.
    pub gate_up: usize,
    /// I.
    pub intermediate: usize,
    /// Format of all matrices; sums are f32.
    pub dtype: DType,
}

impl DenseSizes {
    /// Multiplications and additions.
    pub fn flops(&self) -> f64 {
        2.0 * self.rows as f64 * self.hidden as f64 * (self.gate_up as f64 + self.intermediate as f64)
    }
}

/// Pairs of products in a run.
const PAIRS: usize = 4;

/// Microseconds of the two products together by the backend's own [`linear`](Backend::linear), in each of `repeats` runs
/// of several. Waits.
///
/// Errors: `Contract` for sizes of 0, `OutOfMemory`, `Compile`, `DeviceLost`, `Device`.
pub fn time_dense(wgpu: &Wgpu, stream: &WgpuStream, sizes: DenseSizes, repeats: usize) -> Result<Vec<f64>> {
    let DenseSizes { rows, hidden, gate_up, intermediate, dtype } = sizes;
    let mut first = Product::new(wgpu, stream, [rows, hidden, gate_up], dtype)?;
    let mut second = Product::new(wgpu, stream, [rows, intermediate, hidden], dtype)?;
    let times = time_repeats(wgpu, stream, repeats.max(1), || {
        (0..PAIRS).try_for_each(|_| {
            first.record(wgpu, stream)?;
            second.record(wgpu, stream)
        })
    })?;
    Ok(times.into_iter().map(|time| time / PAIRS as f64).collect())
}

/// `out [rows, outer] = x [rows, inner] . weight [outer, inner]^T`.
struct Product {
    /// Rows, inner, outer.
    sizes: [usize; 3],
    dtype: DType,
    x: Memory,
    weight: Memory,
    out: Memory,
}

impl Product {
    fn new(wgpu: &Wgpu, stream: &WgpuStream, sizes: [usize; 3], dtype: DType) -> Result<Self> {
        let [rows, inner, outer] = sizes;
        let matrix = |rows: usize, columns: usize| noisy(wgpu, stream, (rows * columns * dtype.size()) as u64);
        let (x, weight) = (matrix(rows, inner)?, matrix(outer, inner)?);
        let out = wgpu.allocate(rows * outer * dtype.size())?;
        Ok(Self { sizes, dtype, x, weight, out })
    }

    fn record(&mut self, wgpu: &Wgpu, stream: &WgpuStream) -> Result<()> {
        let ([rows, inner, outer], dtype) = (self.sizes, self.dtype);
        let operands = Linear {
            x: View::new(self.x.read(), dtype, 0, [rows, inner])?,
            weight: View::new(self.weight.read(), dtype, 0, [outer, inner])?,
            bias: None,
            out: View::new(self.out.write(), dtype, 0, [rows, outer])?,
        };
        wgpu.linear(stream, operands)
    }
}

fn best(times: Vec<f64>) -> f64 {
    times.into_iter().fold(f64::INFINITY, f64::min)
}

/// A buffer of at least so many bytes, full of moderate numbers in every format: memory that is all zeros is read and
/// multiplied at less power, and so faster, than real data.
fn noisy(wgpu: &Wgpu, stream: &WgpuStream, bytes: u64) -> Result<Memory> {
    let (memory, noise) = (wgpu.allocate(bytes as usize)?, noise());
    let mut pattern = wgpu.allocate(noise.len())?;
    wgpu.upload(&noise, &mut pattern)?;
    let (end, step) = (memory.buffer().size(), noise.len() as u64);
    stream.record(|encoder| {
        for start in (0..end).step_by(noise.len()) {
            encoder.copy_buffer_to_buffer(pattern.buffer(), 0, memory.buffer(), start, step.min(end - start));
        }
    })?;
    stream.submit()?;
    Ok(memory)
}

/// Numbers between 1/128 and 2 in size as f16, bf16 or f32, of either sign.
fn noise() -> Vec<u8> {
    let mut state = 1u64;
    let half = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        // 0x3c00 to 0x3fff is a moderate number in all three formats
        ((state >> 48) as u16 & 0x83ff) | 0x3c00
    };
    std::iter::repeat_with(half).take(1 << 20).flat_map(u16::to_le_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_nanoseconds_times_the_period() {
        assert_eq!(microseconds([1000, 3000], 1.0), 2.0);
        assert_eq!(microseconds([0, 52], 38.4615), 52.0 * 38.4615 / 1e3);
        assert_eq!(microseconds([u64::MAX - 999, 1000], 1.0), 2.0);
    }

    #[test]
    fn the_read_fits_bindings_and_what_a_kernel_counts() {
        assert_eq!(read_bytes(128 << 20, 1 << 40), 128 << 20);
        assert_eq!(read_bytes(1 << 40, 256 << 20), 256 << 20);
        let most = read_bytes((4 << 30) - 256, u64::MAX);
        assert!(most > (4 << 30) - 2 * PART && most.is_multiple_of(PART), "{most}");
        // the number of the element after the last, and of those that the last turn asks about, is a u32
        assert!(read_bytes(u64::MAX, u64::MAX) / 2 + 8 * 4 * GROUPS * 256 < u64::from(u32::MAX));
    }

    #[test]
    fn the_products_have_the_operations_of_the_experts() {
        let sizes = DenseSizes { rows: 5, hidden: 7, gate_up: 22, intermediate: 11, dtype: DType::BF16 };
        assert_eq!(sizes.flops(), 2.0 * 5.0 * 7.0 * 33.0);
    }

    #[test]
    fn noise_is_moderate_in_every_format() {
        for bytes in noise().chunks_exact(4).take(10_000) {
            let [low, high] = [[bytes[0], bytes[1]], [bytes[2], bytes[3]]].map(u16::from_le_bytes);
            let bf16 = f32::from_bits(u32::from(high) << 16);
            let both = f32::from_bits(u32::from(high) << 16 | u32::from(low));
            assert!([bf16, both].into_iter().all(|x| (0.001..=4.0).contains(&x.abs())), "{bf16} {both}");
        }
    }
}
