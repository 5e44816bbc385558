use crate::Cuda;
use crate::device::{self, Allocation, Capture, Device, Executable, driver_error};
use crate::error::{Error, Result};
use crate::memory::{Mut, Ref};
use cudarc::driver::sys::{CUstream, CUstreamCaptureStatus};
use cudarc::driver::{CudaStream as DriverStream, CudaView, CudaViewMut, DeviceSlice, SyncOnDrop};
use fused_moe_core::{Element, Shape, Status, Stream, View};
use std::cell::RefCell;
use std::marker::PhantomData;
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
    pub fn driver(&self) -> &Arc<DriverStream> {
        &self.stream
    }

    /// Lends cudarc's slices to the calls of a closure: the stream waits for what was done with them before, and cudarc
    /// waits for the calls before it frees them or uses them on other streams, in the way of its event tracking.
    ///
    /// To capture calls, lend first and capture inside; to replay a graph, lend the slices that it was captured with again,
    /// which orders the replay:
    ///
    /// ```no_run
    /// # use fused_moe_cuda::{Cuda, CudaLayer, CudaStream, Graph, Result, Workspace};
    /// # use fused_moe_cuda::cudarc::driver::CudaSlice;
    /// # use fused_moe_core::Layer;
    /// # fn decode(
    /// #     layer: &CudaLayer, stream: &CudaStream, workspace: &mut Workspace, x: &CudaSlice<f32>, y: &mut CudaSlice<f32>,
    /// #     hidden: usize,
    /// # ) -> Result<()> {
    /// // SAFETY: the one stream inside is the one that lends; all that is captured outlives the graph.
    /// let graph = unsafe {
    ///     stream.lend(|lent| {
    ///         let (x, y) = (lent.read(x.as_view(), [1, hidden])?, lent.write(y.as_view_mut(), [1, hidden])?);
    ///         Graph::capture(stream, || layer.forward(stream, x, y, workspace))
    ///     })?
    /// };
    /// // SAFETY: likewise.
    /// unsafe {
    ///     stream.lend(|lent| {
    ///         let _operands = (lent.read(x.as_view(), [1, hidden])?, lent.write(y.as_view_mut(), [1, hidden])?);
    ///         graph.replay(stream)
    ///     })
    /// }
    /// # }
    /// ```
    ///
    /// Where cudarc tracks nothing (after `disable_event_tracking`, or when the context has made no stream, so that there are
    /// only its default stream and raw ones), nothing waits: the order is the host program's affair.
    ///
    /// Errors: the closure's; `Capturing` when the stream is being captured and cudarc tracks events, for an event of outside
    /// would break the capture: nothing was done yet, and the capture goes on; `Driver`, `DeviceLost`.
    ///
    /// # Safety
    /// What is lent is used on this stream alone, and a capture of this stream that begins in the closure ends in it.
    pub unsafe fn lend<'env, R>(&'env self, calls: impl for<'s> FnOnce(&Lending<'s, 'env>) -> Result<R>) -> Result<R> {
        let _current = self.device().bind("lend")?;
        if self.device().context.is_managing_stream_synchronization() {
            let status = self.stream.capture_status().map_err(|e| driver_error("lend", e))?;
            if status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE {
                return Err(Error::Capturing);
            }
        }
        let lending = Lending { stream: self, until: RefCell::default(), lives: PhantomData };
        calls(&lending)
    }

    /// The word that the operations enqueued here raise a [`Status`] in, one u32 `[1]` in device memory.
    ///
    /// [`status`](Stream::status) waits for the device; a decode loop copies the word at this [`address`](Ref::address) to
    /// pinned memory, asynchronously on this stream, and looks at it a step later with [`Status::from_bits`]. The word keeps
    /// what was raised until `status` clears it, which is only needed when it is not 0.
    pub fn status_word(&self) -> Ref<'_> {
        // SAFETY: the word lives as long as the stream; operations set bits of it, each in one piece.
        unsafe { Ref::from_raw(self.status.address, size_of::<u32>()) }
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

/// Lends cudarc's slices to calls; see [`CudaStream::lend`].
#[derive(Debug)]
pub struct Lending<'s, 'env: 's> {
    stream: &'s CudaStream,
    /// Tell cudarc, when they are dropped, that the slices were used up to then.
    until: RefCell<Vec<SyncOnDrop<'s>>>,
    lives: PhantomData<&'env ()>,
}

impl<'s> Lending<'s, '_> {
    /// A row-major operand that is read; its [`storage`](View::storage) makes views of other strides or offsets.
    ///
    /// Errors: `Contract` when the slice is too short for the shape, `OtherContext` when it was not made with the backend's
    /// own [`context`](Cuda::context), the very handle.
    pub fn read<T: Element>(&self, slice: CudaView<'s, T>, shape: impl Into<Shape>) -> Result<View<Ref<'s>>> {
        self.check(slice.stream())?;
        let bytes = slice.num_bytes();
        let (address, used) = slice.view_ptr(&self.stream.stream);
        self.until.borrow_mut().push(used);
        // SAFETY: borrowed for 's, and whoever lends promises that it is used on the stream that cudarc was told of.
        Ok(View::new(unsafe { Ref::from_raw(address, bytes) }, T::DTYPE, 0, shape)?)
    }

    /// A row-major operand that is written.
    ///
    /// Errors: as [`read`](Self::read).
    pub fn write<T: Element>(&self, slice: CudaViewMut<'s, T>, shape: impl Into<Shape>) -> Result<View<Mut<'s>>> {
        self.check(slice.stream())?;
        let bytes = slice.num_bytes();
        let (address, used) = slice.view_ptr_mut(&self.stream.stream);
        self.until.borrow_mut().push(used);
        // SAFETY: as in `read`, and nobody else's for 's.
        Ok(View::new(unsafe { Mut::from_raw(address, bytes) }, T::DTYPE, 0, shape)?)
    }

    /// Another handle of the same context will not do: it is a handle that knows whether uses are tracked.
    fn check(&self, stream: &DriverStream) -> Result<()> {
        let same = Arc::ptr_eq(stream.context(), &self.stream.device().context);
        if same { Ok(()) } else { Err(Error::OtherContext { during: "lend", operand: "slice" }) }
    }
}

/// Operations recorded once and run any number of times, with whatever their operands then hold.
///
/// It keeps its kernels and the status word of the stream that it was captured on; everything else that it uses it has the
/// addresses of.
#[derive(Debug)]
pub struct Graph {
    graph: Executable,
    _status: Arc<Allocation>,
    _cuda: Cuda,
}

impl Graph {
    /// Records what `enqueue` enqueues on `stream`; nothing runs. Nothing in it may wait or allocate, so kernels must have
    /// been compiled before. Making a workspace does that for the calls that [`CudaLayer`](crate::CudaLayer) names; any other
    /// call or operation is to be run once before, with the same shapes, formats, optional parts and alignment.
    ///
    /// Whatever way `enqueue` ends, by panic too, the stream is not being captured any more. cudarc's slices are lent
    /// around the capture, as [`CudaStream::lend`] shows.
    ///
    /// Errors: `enqueue`'s, and `Driver` when something in it cannot be captured.
    ///
    /// # Safety
    /// All that `enqueue` used must outlive the graph's last [`replay`](Self::replay) and the work that that enqueued: the
    /// operands' memory, the workspaces and the layers. What else is done with the operands and workspaces must be ordered
    /// with the replays.
    pub unsafe fn capture(stream: &CudaStream, enqueue: impl FnOnce() -> Result<()>) -> Result<Self> {
        let _current = stream.device().bind("capture")?;
        let capture = Capture::begin(&stream.stream)?;
        enqueue()?;
        let graph = capture.end(stream.device())?;
        Ok(Self { graph, _status: Arc::clone(&stream.status), _cuda: stream.cuda.clone() })
    }

    /// Captures `enqueue` for as long as `replay` replays it, and waits for that.
    pub(crate) fn for_a_while<R>(
        stream: &CudaStream,
        mut enqueue: impl FnMut() -> Result<()>,
        replay: impl FnOnce(&Self) -> Result<R>,
    ) -> Result<R> {
        // SAFETY: the closure and what it borrows live until the wait below; memory can not be freed within a capture.
        let graph = unsafe { Self::capture(stream, &mut enqueue) }?;
        let replayed = replay(&graph);
        stream.synchronize()?;
        replayed
    }

    /// Enqueues the recorded work.
    ///
    /// Errors: `OtherContext`, `Driver`, `DeviceLost`.
    pub fn replay(&self, stream: &CudaStream) -> Result<()> {
        self.graph.launch(&stream.stream)
    }
}
