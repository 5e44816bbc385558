use crate::Cuda;
use crate::device::{self, Allocation, Device, Executable};
use crate::error::{Error, Result};
use cudarc::driver::CudaStream as DriverStream;
use cudarc::driver::sys::CUstream;
use fused_moe_core::{Status, Stream};
use std::sync::Arc;

/// A stream of the device, its own or the host program's, and a status word in device memory.
///
/// Graphs that were captured on it hold the word's address: it must outlive them.
#[derive(Debug)]
pub struct CudaStream {
    stream: Arc<DriverStream>,
    device: Arc<Device>,
    status: Allocation,
}

impl CudaStream {
    pub(crate) fn new(device: &Arc<Device>) -> Result<Self> {
        Self::of(device, device.new_stream("stream")?)
    }

    fn of(device: &Arc<Device>, stream: Arc<DriverStream>) -> Result<Self> {
        Ok(Self { stream, device: Arc::clone(device), status: device.allocate(4)? })
    }

    /// A stream of cudarc's, of the same context.
    ///
    /// Errors: `OtherContext`, `OutOfMemory` for the status word.
    pub fn from_cudarc(cuda: &Cuda, stream: Arc<DriverStream>) -> Result<Self> {
        cuda.device().check(stream.context(), "stream", "stream")?;
        Self::of(cuda.device(), stream)
    }

    /// A stream that the host program owns.
    ///
    /// Errors: `OtherContext`, `OutOfMemory` for the status word.
    ///
    /// # Safety
    /// `stream` must be a stream and outlive the value.
    pub unsafe fn from_raw(cuda: &Cuda, stream: CUstream) -> Result<Self> {
        // SAFETY: passed on to the caller.
        let stream = unsafe { device::foreign_stream(cuda.device(), stream) }?;
        Self::of(cuda.device(), stream)
    }

    /// cudarc's handle.
    pub fn driver(&self) -> &DriverStream {
        &self.stream
    }

    /// Waits for the work enqueued so far.
    ///
    /// Errors: `DeviceLost` or `Driver` when some of it failed.
    pub fn synchronize(&self) -> Result<()> {
        self.device.wait(&self.stream, "synchronisation")
    }

    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    pub(crate) fn status_address(&self) -> u64 {
        self.status.address
    }
}

impl Drop for CudaStream {
    fn drop(&mut self) {
        if let Ok(_current) = self.device.bind("stream") {
            // what cudarc does to drop a stream changes the current context
            self.stream = self.device.context.default_stream();
        }
    }
}

impl Stream for CudaStream {
    type Error = Error;

    fn status(&self) -> Result<Status> {
        let mut word = [0; 4];
        device::copy_out(&self.device, &self.stream, self.status.address, &mut word, "status")?;
        let status = Status::from_bits(u32::from_le_bytes(word));
        if !status.is_ok() {
            device::clear(&self.device, &self.stream, self.status.address)?;
        }
        Ok(status)
    }
}

/// Operations recorded once and run any number of times, with whatever their operands then hold.
///
/// The operands' memory and the stream that it was captured on must outlive it.
#[derive(Debug)]
pub struct Graph {
    graph: Executable,
}

impl Graph {
    /// Records what `enqueue` enqueues on `stream`; nothing runs. What it needs must have been compiled before: run it
    /// once, or use a prepared layer.
    ///
    /// Errors: `enqueue`'s, and `Driver` when something in it cannot be captured.
    pub fn capture(stream: &CudaStream, enqueue: impl FnOnce() -> Result<()>) -> Result<Self> {
        let _current = stream.device.bind("capture")?;
        device::begin_capture(&stream.stream)?;
        let enqueued = enqueue();
        let graph = device::end_capture(&stream.device, &stream.stream);
        enqueued?;
        Ok(Self { graph: graph? })
    }

    /// Enqueues the recorded work.
    ///
    /// Errors: `OtherContext`, `Driver`, `DeviceLost`.
    pub fn replay(&self, stream: &CudaStream) -> Result<()> {
        self.graph.launch(&stream.stream)
    }
}
