use crate::device::Device;
use crate::error::{Error, Result};
use crate::stream::WgpuStream;
use fused_moe_core::Storage;
use wgpu::BufferUsages;

/// A `wgpu::Buffer`: a counted handle, the backend's or the host program's.
#[derive(Clone, Debug)]
pub struct Memory {
    buffer: wgpu::Buffer,
    bytes: usize,
}

impl Memory {
    pub(crate) fn new(device: &Device, bytes: usize) -> Result<Self> {
        Ok(Self { buffer: device.buffer(bytes as u64, Device::USAGES)?, bytes })
    }

    /// A buffer of the host program's, which needs the usages `STORAGE`, `COPY_SRC` and `COPY_DST`, on the backend's
    /// device. An element in the last bytes of a buffer whose size is no multiple of 4 cannot be bound.
    pub fn from_buffer(buffer: wgpu::Buffer) -> Self {
        let bytes = usize::try_from(buffer.size()).unwrap_or(usize::MAX);
        Self { buffer, bytes }
    }

    /// A buffer that stands for `bytes` bytes of operands that no kernel is bound to, or while kernels are found and not
    /// launched.
    pub(crate) fn placeholder(buffer: &wgpu::Buffer, bytes: usize) -> Self {
        Self { buffer: buffer.clone(), bytes }
    }

    /// The buffer.
    pub fn buffer(&self) -> &wgpu::Buffer {
        &self.buffer
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// As storage of operands that are read.
    pub fn read(&self) -> Ref<'_> {
        Ref(Range { buffer: &self.buffer, start: 0, bytes: self.bytes })
    }

    /// As storage of operands that are written.
    pub fn write(&mut self) -> Mut<'_> {
        Mut(Range { buffer: &self.buffer, start: 0, bytes: self.bytes })
    }

    /// Whole words through the queue; the last one, if it is not whole, keeps what it has beyond.
    pub(crate) fn copy_in(&mut self, device: &Device, data: &[u8]) -> Result<()> {
        const CHUNK: usize = 64 << 20;
        self.usable("upload")?;
        let (whole, rest) = data.split_at(data.len() & !3);
        for (i, chunk) in whole.chunks(CHUNK).enumerate() {
            let offset = (i * CHUNK) as u64;
            device.checked("upload", || device.queue.write_buffer(&self.buffer, offset, chunk))?;
            if whole.len() > CHUNK {
                device.queue.submit([]);
                device.wait("upload")?;
            }
        }
        if !rest.is_empty() {
            let mut word = [0; 4];
            let offset = whole.len() as u64;
            read(device, (&self.buffer, offset), &mut word)?;
            word[..rest.len()].copy_from_slice(rest);
            device.checked("upload", || device.queue.write_buffer(&self.buffer, offset, &word))?;
        }
        Ok(())
    }

    /// After what was recorded on the stream.
    pub(crate) fn copy_out(&self, device: &Device, stream: &WgpuStream, data: &mut [u8]) -> Result<()> {
        const CHUNK: usize = 64 << 20;
        self.checked(data.len())?;
        self.usable("download")?;
        stream.submit()?;
        if data.is_empty() {
            return device.wait("download");
        }
        for (i, chunk) in data.chunks_mut(CHUNK).enumerate() {
            read(device, (&self.buffer, (i * CHUNK) as u64), chunk)?;
        }
        Ok(())
    }

    fn usable(&self, operation: &'static str) -> Result<()> {
        let usage = self.buffer.usage();
        let needed = [(BufferUsages::COPY_SRC, "COPY_SRC"), (BufferUsages::COPY_DST, "COPY_DST")];
        match needed.into_iter().find(|(flag, _)| !usage.contains(*flag)) {
            Some((_, missing)) => Err(Error::Usage { operation, missing }),
            None => Ok(()),
        }
    }

    pub(crate) fn checked(&self, bytes: usize) -> Result<()> {
        if bytes > self.bytes { Err(Error::Copy { bytes, available: self.bytes }) } else { Ok(()) }
    }
}

/// Bytes of a buffer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Range<'a> {
    pub(crate) buffer: &'a wgpu::Buffer,
    pub(crate) start: u64,
    pub(crate) bytes: usize,
}

/// Part of a buffer that operations read.
#[derive(Clone, Copy, Debug)]
pub struct Ref<'a>(Range<'a>);

/// Part of a buffer that operations write.
#[derive(Debug)]
pub struct Mut<'a>(Range<'a>);

impl<'a> Ref<'a> {
    /// All of a buffer; see [`Memory::from_buffer`].
    pub fn of(buffer: &'a wgpu::Buffer) -> Self {
        Self(Range { buffer, start: 0, bytes: usize::try_from(buffer.size()).unwrap_or(usize::MAX) })
    }
}

impl<'a> Mut<'a> {
    /// All of a buffer; see [`Memory::from_buffer`]. What is enqueued on a device runs in order, so that nobody else
    /// reads or writes it meanwhile unless another queue does.
    pub fn of(buffer: &'a wgpu::Buffer) -> Self {
        Self(Range { buffer, start: 0, bytes: usize::try_from(buffer.size()).unwrap_or(usize::MAX) })
    }

    pub(crate) fn shorten<'short>(self) -> Mut<'short>
    where
        'a: 'short,
    {
        self
    }

    pub(crate) fn share(&self) -> Ref<'_> {
        Ref(self.0)
    }

    pub(crate) fn buffer(&self) -> &'a wgpu::Buffer {
        self.0.buffer
    }

    pub(crate) fn reborrow(&mut self) -> Mut<'_> {
        Mut(self.0)
    }

    /// The first `bytes` bytes (all, if there are fewer); what follows them is left.
    pub(crate) fn split_off_front(&mut self, bytes: usize) -> Mut<'a> {
        let bytes = bytes.min(self.0.bytes);
        let front = Range { bytes, ..self.0 };
        self.0.start += bytes as u64;
        self.0.bytes -= bytes;
        Mut(front)
    }
}

impl Storage for Ref<'_> {
    fn bytes(&self) -> usize {
        self.0.bytes
    }
}

impl Storage for Mut<'_> {
    fn bytes(&self) -> usize {
        self.0.bytes
    }
}

/// Storage that lies on a buffer.
pub(crate) trait Bound: Storage {
    fn range(&self) -> Range<'_>;
}
impl Bound for Ref<'_> {
    fn range(&self) -> Range<'_> {
        self.0
    }
}
impl Bound for Mut<'_> {
    fn range(&self) -> Range<'_> {
        self.0
    }
}

/// Bytes of a buffer from an offset on, through a buffer that can be mapped. Waits.
fn read(device: &Device, (buffer, offset): (&wgpu::Buffer, u64), data: &mut [u8]) -> Result<()> {
    let bytes = (data.len() as u64).next_multiple_of(4);
    let mapped = device.buffer(bytes, BufferUsages::MAP_READ | BufferUsages::COPY_DST)?;
    device.checked("download", || {
        let mut encoder = device.device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(buffer, offset, &mapped, 0, bytes);
        device.queue.submit([encoder.finish()]);
    })?;
    device.read_mapped(&mapped, data, "download")
}
