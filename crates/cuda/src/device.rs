//! The device: its numbers, its context, its memory, and the driver calls of streams and graphs.

use crate::error::{Error, Result, loaded_from, loader_says};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUresult};
use cudarc::driver::{CudaContext, CudaStream as DriverStream};
use std::mem::ManuallyDrop;
use std::ptr;
use std::sync::Arc;

/// The oldest driver that will do, 1000 * major + 10 * minor.
const OLDEST_DRIVER: u32 = 12000;

/// The oldest driver whose graphs keep launches that overlap.
const OVERLAPPING_DRIVER: u32 = 12030;

/// What plans are made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceNumbers {
    /// Its name.
    pub name: String,
    /// Compute capability, major and minor.
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of the L2 cache.
    pub l2_bytes: usize,
    /// Bytes of shared memory that a block can have, when it asks.
    pub shared_per_block: usize,
    /// Bytes of shared memory of a multiprocessor.
    pub shared_per_multiprocessor: usize,
    /// Bytes of device memory.
    pub memory_bytes: usize,
    /// CUDA version of the driver, 1000 * major + 10 * minor.
    pub driver: u32,
}

impl DeviceNumbers {
    /// Whether a launch may begin before the one before it has ended, in graphs too.
    pub(crate) fn overlaps_launches(&self) -> bool {
        self.compute_capability.0 >= 9 && self.driver >= OVERLAPPING_DRIVER
    }

    /// Whether blocks of a launch may read each other's shared memory.
    pub(crate) fn has_clusters(&self) -> bool {
        self.compute_capability.0 >= 9
    }

    /// What NVRTC is told to compile for: the architecture's own features included where there are any.
    pub fn architecture(&self) -> String {
        let (major, minor) = self.compute_capability;
        let suffix = if major >= 9 { "a" } else { "" };
        format!("sm_{major}{minor}{suffix}")
    }
}

/// The driver's library, in the order that cudarc tries the names.
const DRIVER: &[&str] = if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so", "libcuda.so.1"] };

/// The file of the driver's library, looked for as cudarc does, which panics where there is none or it is none of a
/// driver's.
///
/// Errors: `NoDriver`.
pub fn driver() -> Result<String> {
    let mut reason = String::new();
    for name in DRIVER {
        // SAFETY: the driver's initialisers are made to run in any process.
        match unsafe { libloading::Library::new(*name) } {
            Ok(library) => {
                // SAFETY: looked up and not called.
                let found = unsafe { library.get::<unsafe extern "C" fn()>(b"cuDriverGetVersion\0") };
                match found {
                    Ok(_) => return Ok(loaded_from(name)),
                    Err(error) => reason = loader_says(&error),
                }
                break;
            }
            Err(error) if reason.is_empty() => reason = loader_says(&error),
            Err(_) => {}
        }
    }
    Err(Error::NoDriver { tried: DRIVER.join(", "), reason })
}

/// The CUDA version of the driver; it may be asked for before anything else.
///
/// Errors: `DriverTooOld`, `Driver`.
fn driver_version() -> Result<u32> {
    let mut version = 0;
    // SAFETY: writes one integer.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(|e| driver_error("driver version", e))?;
    let found = version.unsigned_abs();
    if found < OLDEST_DRIVER { Err(Error::DriverTooOld { found, needed: OLDEST_DRIVER }) } else { Ok(found) }
}

/// How many devices there are.
///
/// Errors: `NoDriver`, `DriverTooOld`, `Driver`.
pub fn device_count() -> Result<usize> {
    driver()?;
    driver_version()?;
    match CudaContext::device_count() {
        Ok(count) => Ok(count.unsigned_abs() as usize),
        Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => Ok(0),
        Err(error) => Err(driver_error("device count", error)),
    }
}

/// Makes the context current again that was so on this thread when this was made: the host program's stays as it was.
#[derive(Debug)]
#[must_use]
pub(crate) struct Restore {
    before: sys::CUcontext,
}

impl Restore {
    fn new() -> Self {
        Self { before: current() }
    }
}

impl Drop for Restore {
    fn drop(&mut self) {
        if current() != self.before {
            // SAFETY: it was current before, or there was none. A failure means that it is gone.
            let _ = unsafe { result::ctx::set_current(self.before) };
        }
    }
}

fn current() -> sys::CUcontext {
    result::ctx::get_current().ok().flatten().unwrap_or(ptr::null_mut())
}

/// A context on a device, and its numbers.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) context: ManuallyDrop<Arc<CudaContext>>,
    pub(crate) numbers: DeviceNumbers,
}

impl Drop for Device {
    fn drop(&mut self) {
        let _restore = Restore::new();
        // SAFETY: dropped nowhere else. cudarc makes the context current to release it.
        unsafe { ManuallyDrop::drop(&mut self.context) };
    }
}

impl Device {
    pub(crate) fn new(ordinal: usize) -> Result<Self> {
        let count = device_count()?;
        if ordinal >= count {
            return Err(Error::NoDevice { ordinal, count });
        }
        let _restore = Restore::new();
        Self::of(CudaContext::new(ordinal).map_err(|e| driver_error("context", e))?)
    }

    pub(crate) fn of(context: Arc<CudaContext>) -> Result<Self> {
        let during = "device numbers";
        let number = |attribute| {
            let value = context.attribute(attribute).map_err(|e| driver_error(during, e))?;
            Ok::<_, Error>(value.unsigned_abs())
        };
        let numbers = DeviceNumbers {
            name: context.name().map_err(|e| driver_error(during, e))?,
            compute_capability: (
                number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: number(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            l2_bytes: number(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
            shared_per_block: number(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
            shared_per_multiprocessor: number(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?
                as usize,
            memory_bytes: context.total_mem().map_err(|e| driver_error(during, e))?,
            driver: driver_version()?,
        };
        let (major, minor) = numbers.compute_capability;
        if major < 8 {
            return Err(Error::Architecture { device: numbers.name, major, minor });
        }
        Ok(Self { context: ManuallyDrop::new(context), numbers })
    }

    /// Makes the context current on this thread as long as the value lives.
    pub(crate) fn bind(&self, during: &'static str) -> Result<Restore> {
        let restore = Restore::new();
        let context = self.context.cu_ctx();
        if restore.before != context {
            // SAFETY: the context lives as long as its Arc.
            unsafe { result::ctx::set_current(context) }.map_err(|e| driver_error(during, e))?;
        }
        Ok(restore)
    }

    /// Errors: `OtherContext` when `operand` is not of this device's context.
    pub(crate) fn check(&self, other: &CudaContext, during: &'static str, operand: &'static str) -> Result<()> {
        if *other == **self.context { Ok(()) } else { Err(Error::OtherContext { during, operand }) }
    }

    pub(crate) fn free_bytes(&self) -> Result<usize> {
        let _current = self.bind("free memory")?;
        Ok(result::mem_get_info().map_err(|e| driver_error("free memory", e))?.0)
    }

    /// A stream of its own.
    pub(crate) fn new_stream(&self, during: &'static str) -> Result<Arc<DriverStream>> {
        let _current = self.bind(during)?;
        self.context.new_stream().map_err(|e| driver_error(during, e))
    }

    /// Zeroed memory.
    pub(crate) fn allocate(self: &Arc<Self>, bytes: usize) -> Result<Allocation> {
        let _current = self.bind("allocation")?;
        let length = bytes.max(256);
        // SAFETY: the context is current; the address is freed once, by the Allocation.
        let address = match unsafe { result::malloc_sync(length) } {
            Ok(address) => address,
            Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                return Err(Error::OutOfMemory { needed: bytes, free: self.free_bytes()? });
            }
            Err(error) => return Err(driver_error("allocation", error)),
        };
        let allocation = Allocation { device: Arc::clone(self), address };
        // SAFETY: the range was allocated above.
        unsafe { result::memset_d8_sync(address, 0, length) }.map_err(|e| driver_error("clearing memory", e))?;
        self.synchronize("clearing memory")?;
        Ok(allocation)
    }

    /// Waits for everything on the device.
    pub(crate) fn synchronize(&self, during: &'static str) -> Result<()> {
        let _current = self.bind(during)?;
        result::ctx::synchronize().map_err(|e| driver_error(during, e))
    }

    /// Waits for everything on a stream of this context.
    pub(crate) fn wait(&self, stream: &DriverStream, during: &'static str) -> Result<()> {
        let _current = self.bind(during)?;
        // SAFETY: the stream lives.
        unsafe { result::stream::synchronize(stream.cu_stream()) }.map_err(|e| driver_error(during, e))
    }
}

/// Device memory of its own.
#[derive(Debug)]
pub(crate) struct Allocation {
    pub(crate) device: Arc<Device>,
    pub(crate) address: u64,
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if let Ok(_current) = self.device.bind("free") {
            // SAFETY: allocated by `Device::allocate`, freed nowhere else. Freeing waits for the device. A failure means
            // that the context is gone, and the memory with it.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

/// Copies to the device and waits. The caller has checked the extents.
pub(crate) fn copy_in(device: &Device, data: &[u8], address: u64) -> Result<()> {
    let _current = device.bind("upload")?;
    device.synchronize("upload")?;
    // SAFETY: the caller's `&mut Memory` covers the range, and nothing on the device uses it after the wait.
    unsafe { result::memcpy_htod_sync(address, data) }.map_err(|e| driver_error("upload", e))?;
    device.synchronize("upload")
}

/// Fills `bytes` bytes at `address` with `data`, over and over. The caller owns the range.
pub(crate) fn repeat(device: &Device, data: &[u8], address: u64, bytes: usize) -> Result<()> {
    let _current = device.bind("upload")?;
    let mut done = data.len().min(bytes);
    copy_in(device, &data[..done], address)?;
    while done > 0 && done < bytes {
        let more = done.min(bytes - done);
        // SAFETY: both ranges lie within the caller's, one after the other.
        unsafe { result::memcpy_dtod_sync(address + done as u64, address, more) }
            .map_err(|e| driver_error("copy", e))?;
        done += more;
    }
    device.synchronize("copy")
}

/// Copies from the device, after the work of `stream`, and waits. The caller has checked the extents.
pub(crate) fn copy_out(
    device: &Device,
    stream: &DriverStream,
    address: u64,
    data: &mut [u8],
    during: &'static str,
) -> Result<()> {
    let _current = device.bind(during)?;
    // SAFETY: the caller's `&Memory` covers the range; the wait below comes before `data` is given back.
    unsafe { result::memcpy_dtoh_async(data, address, stream.cu_stream()) }.map_err(|e| driver_error(during, e))?;
    device.wait(stream, during)
}

/// Clears a word in the order of `stream`.
pub(crate) fn clear(device: &Device, stream: &DriverStream, address: u64) -> Result<()> {
    let _current = device.bind("status")?;
    // SAFETY: the caller owns the word.
    unsafe { result::memset_d8_async(address, 0, 4, stream.cu_stream()) }.map_err(|e| driver_error("status", e))
}

/// A stream that another library owns.
///
/// Errors: `OtherContext`.
///
/// # Safety
/// As [`CudaStream::from_raw`](crate::CudaStream::from_raw).
pub(crate) unsafe fn foreign_stream(device: &Device, stream: sys::CUstream) -> Result<Arc<DriverStream>> {
    let _current = device.bind("stream")?;
    let mut context = ptr::null_mut();
    // SAFETY: the caller's stream lives; writes one pointer. The default streams are those of the current context.
    unsafe { sys::cuStreamGetCtx(stream, &mut context) }.result().map_err(|e| driver_error("stream", e))?;
    if context != device.context.cu_ctx() {
        return Err(Error::OtherContext { during: "stream", operand: "stream" });
    }
    // SAFETY: passed on to the caller.
    Ok(unsafe { device.context.wrap_borrowed_stream(stream) })
}

/// A recording of what is enqueued on a stream instead of being run; ended at the latest when it is dropped.
pub(crate) struct Capture<'a> {
    stream: &'a DriverStream,
    open: bool,
}

impl<'a> Capture<'a> {
    pub(crate) fn begin(stream: &'a DriverStream) -> Result<Self> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        unsafe { result::stream::begin_capture(stream.cu_stream(), mode) }.map_err(|e| driver_error("capture", e))?;
        Ok(Self { stream, open: true })
    }

    /// Ends the recording and makes it ready to run.
    pub(crate) fn end(mut self, device: &Arc<Device>) -> Result<Executable> {
        let graph = self.stop().map_err(|e| driver_error("capture", e))?;
        // SAFETY: the graph was made above.
        let made = unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags_enum(0)) };
        destroy(graph);
        Ok(Executable { graph: made.map_err(|e| driver_error("graph", e))?, device: Arc::clone(device) })
    }

    fn stop(&mut self) -> Result<sys::CUgraph, DriverError> {
        self.open = false;
        // SAFETY: the stream lives, and a capture of this thread's began on it.
        unsafe { result::stream::end_capture(self.stream.cu_stream()) }
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        if self.open {
            let _ = self.stop().map(destroy);
        }
    }
}

/// A graph that [`Capture::stop`] made, once.
fn destroy(graph: sys::CUgraph) {
    // SAFETY: the caller's promise. A failure to destroy it loses memory and nothing else.
    let _ = unsafe { result::graph::destroy(graph) };
}

/// A graph that can be launched.
#[derive(Debug)]
pub(crate) struct Executable {
    graph: sys::CUgraphExec,
    device: Arc<Device>,
}

// SAFETY: the driver's handles may be used from any thread, one at a time.
unsafe impl Send for Executable {}

impl Executable {
    pub(crate) fn launch(&self, stream: &DriverStream) -> Result<()> {
        let during = "graph launch";
        self.device.check(stream.context(), during, "stream")?;
        let _current = self.device.bind(during)?;
        // SAFETY: both handles live.
        unsafe { result::graph::launch(self.graph, stream.cu_stream()) }.map_err(|e| driver_error(during, e))
    }
}

impl Drop for Executable {
    fn drop(&mut self) {
        if let Ok(_current) = self.device.bind("graph") {
            // SAFETY: destroyed nowhere else. A failure loses memory and nothing else.
            let _ = unsafe { result::graph::exec_destroy(self.graph) };
        }
    }
}

/// The driver's error as one of this crate's.
pub(crate) fn driver_error(during: &'static str, error: DriverError) -> Error {
    let text = |text: Result<&std::ffi::CStr, DriverError>| {
        text.map_or_else(|_| String::new(), |text| text.to_string_lossy().into_owned())
    };
    let reason = format!("{} ({})", text(error.error_string()), text(error.error_name()));
    match error.0 {
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
        | CUresult::CUDA_ERROR_LAUNCH_FAILED
        | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
        | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
        | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
        | CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE
        | CUresult::CUDA_ERROR_INVALID_PC
        | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
        | CUresult::CUDA_ERROR_ECC_UNCORRECTABLE
        | CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE
        | CUresult::CUDA_ERROR_ASSERT
        | CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED => Error::DeviceLost { during, reason },
        _ => Error::Driver { during, reason },
    }
}
