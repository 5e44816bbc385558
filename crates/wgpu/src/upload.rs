//! Host to device, some rows at a time: so much host memory is taken and no more.

use crate::device::Device;
use crate::error::Result;

/// Bytes at a time, unless one row is longer.
const CHUNK: usize = 32 << 20;

/// Copies rows to the device.
pub(crate) struct Upload<'a> {
    device: &'a Device,
    row_bytes: usize,
    chunk: Vec<u8>,
}

impl<'a> Upload<'a> {
    /// Of rows of so many bytes, a multiple of 4.
    pub(crate) fn new(device: &'a Device, row_bytes: usize) -> Self {
        Self { device, row_bytes: row_bytes.max(4), chunk: Vec::new() }
    }

    /// Rows that follow each other in a buffer with room for them. `fill(n, to)` writes row n into zeros, or into what it
    /// wrote of another row. Waits.
    ///
    /// Errors: `DeviceLost`, `Device`.
    pub(crate) fn rows(&mut self, buffer: &wgpu::Buffer, rows: usize, fill: impl Fn(usize, &mut [u8])) -> Result<()> {
        let at_once = (CHUNK / self.row_bytes).clamp(1, rows.max(1));
        self.chunk.resize(at_once * self.row_bytes, 0);
        for first in (0..rows).step_by(at_once) {
            let count = at_once.min(rows - first);
            let bytes = &mut self.chunk[..count * self.row_bytes];
            for (i, to) in bytes.chunks_exact_mut(self.row_bytes).enumerate() {
                fill(first + i, to);
            }
            let offset = (first * self.row_bytes) as u64;
            self.device.checked("upload", || {
                self.device.queue.write_buffer(buffer, offset, bytes);
                self.device.queue.submit([]);
            })?;
            self.device.wait("upload")?;
        }
        Ok(())
    }
}
