//! Host to device through two pinned buffers: one is filled while the other is on its way.

use crate::device::{Device, driver_error};
use crate::error::{Error, Result};
use cudarc::driver::{CudaStream as DriverStream, result};
use std::sync::Arc;

/// Bytes of a buffer, unless one row is longer.
const CHUNK: usize = 32 << 20;
/// Fewer bytes than this are not worth another thread.
const GRAIN: usize = 1 << 20;

/// Copies rows to the device.
pub(crate) struct Upload {
    buffers: [Pinned; 2],
    next: usize,
}

struct Pinned {
    device: Arc<Device>,
    stream: Arc<DriverStream>,
    address: *mut u8,
    bytes: usize,
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Ok(_current) = self.device.bind("upload") {
            let _ = self.device.wait(&self.stream, "upload");
            // SAFETY: allocated by `Pinned::new`, freed nowhere else; no copy from it is on its way.
            let _ = unsafe { result::free_host(self.address.cast()) };
            // what cudarc does to drop a stream changes the current context
            self.stream = self.device.context.default_stream();
        }
    }
}

impl Pinned {
    fn new(device: &Arc<Device>, bytes: usize) -> Result<Self> {
        let stream = device.new_stream("upload")?;
        // SAFETY: the context is current; the memory is freed once, on drop.
        let address =
            unsafe { result::malloc_host(bytes, 0) }.map_err(|e| driver_error("pinned memory", e))?.cast::<u8>();
        // SAFETY: so many bytes were allocated.
        unsafe { address.write_bytes(0, bytes) };
        Ok(Self { device: Arc::clone(device), stream, address, bytes })
    }

    /// The buffer, once the copy from it has ended.
    fn wait(&mut self) -> Result<&mut [u8]> {
        self.device.wait(&self.stream, "upload")?;
        // SAFETY: `bytes` bytes were allocated and cleared, the device reads them no more, and the borrow is exclusive.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.address, self.bytes) })
    }

    /// Sends the first `bytes` bytes; the caller has checked that they fit where they go.
    fn send(&self, bytes: usize, address: u64) -> Result<()> {
        // SAFETY: the buffer holds so many bytes, and `wait` comes before they are written again.
        let data = unsafe { std::slice::from_raw_parts(self.address, bytes.min(self.bytes)) };
        // SAFETY: as above; the destination is the caller's.
        unsafe { result::memcpy_htod_async(address, data, self.stream.cu_stream()) }
            .map_err(|e| driver_error("upload", e))
    }
}

impl Upload {
    /// For rows of at most `row_bytes` bytes.
    ///
    /// Errors: `Driver`.
    pub(crate) fn new(device: &Arc<Device>, row_bytes: usize) -> Result<Self> {
        let _current = device.bind("upload")?;
        let bytes = CHUNK.max(row_bytes);
        Ok(Self { buffers: [Pinned::new(device, bytes)?, Pinned::new(device, bytes)?], next: 0 })
    }

    /// Fills `rows` rows of `row_bytes` bytes at `address`, row by row as `fill` says. `room` is what is there.
    ///
    /// Errors: `Copy` when it is too little, `Driver`.
    pub(crate) fn rows(
        &mut self,
        (address, room): (u64, usize),
        rows: usize,
        row_bytes: usize,
        fill: impl Fn(usize, &mut [u8]) + Sync,
    ) -> Result<()> {
        let bytes = rows.saturating_mul(row_bytes);
        if bytes > room || row_bytes > self.buffers[0].bytes {
            return Err(Error::Copy { bytes, available: room });
        }
        if bytes == 0 {
            return Ok(());
        }
        let _current = self.buffers[0].device.bind("upload")?;
        let at_once = (self.buffers[0].bytes / row_bytes).max(1);
        for first in (0..rows).step_by(at_once) {
            let count = at_once.min(rows - first);
            let buffer = &mut self.buffers[self.next];
            self.next = 1 - self.next;
            fill_rows(&mut buffer.wait()?[..count * row_bytes], row_bytes, |i, row| fill(first + i, row));
            buffer.send(count * row_bytes, address + (first * row_bytes) as u64)?;
        }
        Ok(())
    }

    /// Waits for all of it.
    ///
    /// Errors: `Driver`, `DeviceLost`.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.buffers.iter_mut().try_for_each(|buffer| buffer.wait().map(|_| ()))
    }
}

/// By as many threads as it is worth.
fn fill_rows(to: &mut [u8], row_bytes: usize, fill: impl Fn(usize, &mut [u8]) + Sync) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(to.len() / GRAIN).clamp(1, 16);
    let rows_each = (to.len() / row_bytes).div_ceil(threads);
    let part = |first: usize, part: &mut [u8]| {
        for (i, row) in part.chunks_exact_mut(row_bytes).enumerate() {
            fill(first + i, row);
        }
    };
    if threads == 1 {
        return part(0, to);
    }
    std::thread::scope(|scope| {
        for (i, rows) in to.chunks_mut(rows_each * row_bytes).enumerate() {
            let part = &part;
            scope.spawn(move || part(i * rows_each, rows));
        }
    });
}
