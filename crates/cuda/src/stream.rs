use crate::Cuda;
use crate::device::{self, Allocation, Capture, Device, Executable};
use crate::error::{Error, Result};
use cudarc::driver::CudaStream as DriverStream;
use cudarc::driver::sys::CUstream;
use fused_moe_core::{Status, Stream};
use std::sync::Arc;

/// A stream of the device, its own or the host program's, and a status word in device memory.
///
/// Graphs that were captured on it go on raising the bits of its word, wherever they are replayed.
#[derive(Debug)]
pub struct CudaStream {
    stream: Arc<DriverStream>,
    status: Arc<Allocation>,
    // last: freeing the word waits for the device, and what runs there are the backend's kernels
    cuda: Cuda,
}

impl CudaStream {
    pub(crate) fn new(cuda: &Cuda) -> Result<Self> {
        Self::of(cuda, cuda.device().new_stream("stream")?)
    }

    fn of(cuda: &Cuda, stream: Arc<DriverStream>) -> Result<Self> {
        Ok(Self { stream, status: Arc::new(cuda.device().allocate(4)?), cuda: cuda.clone() })
    }

    /// A stream of cudarc's, of the same context.
    ///
    /// Errors: `OtherContext`, `OutOfMemory` for the status word.
    pub fn from_cudarc(cuda: &Cuda, stream: Arc<DriverStream>) -> Result<Self> {
        cuda.device().check(stream.context(), "stream", "stream")?;
        Self::of(cuda, stream)
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
        Self::of(cuda, stream)
    }

    /// cudarc's handle.
    pub fn driver(&self) -> &DriverStream {
        &self.stream
    }

    /// Waits for the work enqueued so far.
    ///
    /// Errors: `DeviceLost` or `Driver` when some of it failed.
    pub fn synchronize(&self) -> Result<()> {
        self.device().wait(&self.stream, "synchronisation")
    }

    pub(crate) fn device(&self) -> &Arc<Device> {
        self.cuda.device()
    }

    pub(crate) fn status_address(&self) -> u64 {
        self.status.address
    }
}

impl Drop for CudaStream {
    fn drop(&mut self) {
        if let Ok(_current) = self.cuda.device().bind("stream") {
            // what cudarc does to drop a stream changes the current context
            self.stream = self.cuda.context().default_stream();
        }
    }
}

impl Stream for CudaStream {
    type Error = Error;

    fn status(&self) -> Result<Status> {
        let mut word = [0; 4];
        device::copy_out(self.device(), &self.stream, self.status.address, &mut word, "status")?;
        let status = Status::from_bits(u32::from_le_bytes(word));
        if !status.is_ok() {
            device::clear(self.device(), &self.stream, self.status.address)?;
        }
        Ok(status)
    }
}

/// Operations recorded once and run any number of times, with whatever their operands then hold.
///
/// The operands' memory must outlive it, a layer's weights and its workspace included. The kernels and the status word of
/// the stream that it was captured on it keeps itself.
#[derive(Debug)]
pub struct Graph {
    graph: Executable,
    _status: Arc<Allocation>,
    _cuda: Cuda,
}

impl Graph {
    /// Records what `enqueue` enqueues on `stream`; nothing runs. What it needs must have been compiled before: run it
    /// once, or use a prepared layer.
    ///
    /// Errors: `enqueue`'s, and `Driver` when something in it cannot be captured.
    pub fn capture(stream: &CudaStream, enqueue: impl FnOnce() -> Result<()>) -> Result<Self> {
        let _current = stream.device().bind("capture")?;
        let capture = Capture::begin(&stream.stream)?;
        enqueue()?;
        let graph = capture.end(stream.device())?;
        Ok(Self { graph, _status: Arc::clone(&stream.status), _cuda: stream.cuda.clone() })
    }

    /// Enqueues the recorded work.
    ///
    /// Errors: `OtherContext`, `Driver`, `DeviceLost`.
    pub fn replay(&self, stream: &CudaStream) -> Result<()> {
        self.graph.launch(&stream.stream)
    }
}
