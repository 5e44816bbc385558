//! The CUDA backend: operations and layers on NVIDIA GPUs, on the caller's streams and device memory.
//!
//! Nothing of CUDA is needed to build it. At run time it loads the driver and, to compile a kernel the first time, NVRTC;
//! compiled kernels are kept in a cache folder (`FMOE_CACHE_DIR`). Each kernel lies beside its launcher.
//!
//! # In an engine
//!
//! The backend takes the engine's own cudarc context and stream, and its slices are lent to the calls
//! ([`CudaStream::lend`]); nothing of a call waits, allocates or reads back.
//!
//! ```no_run
//! use fused_moe_core::config::LayerConfig;
//! use fused_moe_core::weights::LayerWeights;
//! use fused_moe_core::{Backend, Layer, Options, Stream};
//! use fused_moe_cuda::cudarc::driver::CudaContext;
//! use fused_moe_cuda::{Cuda, CudaStream, Graph};
//!
//! fn engine(config: &LayerConfig, weights: &LayerWeights<'_>) -> Result<(), Box<dyn std::error::Error>> {
//!     let context = CudaContext::new(0)?;
//!     let theirs = context.new_stream()?;
//!
//!     let cuda = Cuda::from_context(context)?;
//!     let stream = CudaStream::from_cudarc(&cuda, theirs.clone())?;
//!     let layer = cuda.prepare(config, weights, &Options::default())?; // copies the weights
//!     let mut workspace = layer.workspace(16)?; // for up to 16 tokens; allocates, and compiles what their calls need
//!
//!     let shape = [4, config.hidden];
//!     let x = theirs.alloc_zeros::<f32>(4 * config.hidden)?; // half's f16 and bf16 with cudarc's feature `f16`
//!     let mut y = theirs.alloc_zeros::<f32>(4 * config.hidden)?;
//!
//!     // SAFETY: what is lent is used on the stream that lends it.
//!     unsafe {
//!         stream.lend(|lent| {
//!             let (x, y) = (lent.read(x.as_view(), shape)?, lent.write(y.as_view_mut(), shape)?);
//!             layer.forward(&stream, x, y, &mut workspace)
//!         })?;
//!     }
//!
//!     // SAFETY: likewise; and x, y, the workspace, the layer and the stream outlive the graph's last replay.
//!     let graph = unsafe {
//!         stream.lend(|lent| {
//!             let (x, y) = (lent.read(x.as_view(), shape)?, lent.write(y.as_view_mut(), shape)?);
//!             Graph::capture(&stream, || layer.forward(&stream, x, y, &mut workspace))
//!         })?
//!     };
//!     for _step in 0..100 {
//!         graph.replay(&stream)?; // x and y belong to this stream: they need no lending to be ordered with it
//!     }
//!
//!     let y = theirs.clone_dtoh(&y)?;
//!     let status = stream.status()?; // waits; `status_word` is for those who cannot
//!     println!("{status}, {y:?}");
//!     Ok(())
//! }
//! ```
//!
//! Memory that is no cudarc slice comes in by address: [`Ref::from_raw`], [`Mut::from_raw`], [`Memory::from_raw`],
//! [`CudaStream::from_raw`]. A workspace in the engine's own pool: [`Memory::from_slice`] and
//! [`workspace_in`](fused_moe_core::Layer::workspace_in). What a workspace may be shared by is said at [`Workspace`].
//!
//! # cudarc
//!
//! The engine's cudarc and this crate's are one, and a program can have one version feature of it (`cuda-12080`, say). This
//! crate's default feature `cuda-12000` chooses one for programs that do not use cudarc themselves. Others depend on
//! `fused-moe-cuda` (or on the facade, with its feature `cuda`) with `default-features = false`, and on cudarc 0.19 with the
//! version that they want and, if they like, `dynamic-loading` or `dynamic-linking`; nothing else makes the driver be loaded
//! at run time.
#![deny(unsafe_code)]

mod accumulate;
mod activation;
mod activation_backward;
mod backward;
mod combine;
mod combine_backward;
mod copy;
#[allow(unsafe_code)]
mod cublas;
mod dense;
#[allow(unsafe_code)]
mod device;
mod down;
mod down_backward;
mod down_combine;
mod drop_overflow;
mod error;
mod few;
mod gate;
mod gate_backward;
mod gate_up;
mod gate_up_backward;
mod grouped;
mod grouped_backward;
mod grouped_backward_wgmma;
#[allow(unsafe_code)]
mod jit;
mod kernel;
#[allow(unsafe_code)]
mod launch;
mod layer;
mod linear;
mod losses;
mod measure;
#[allow(unsafe_code)]
mod memory;
mod pack;
mod permute;
mod plan;
mod record;
mod rehearse;
mod ring;
mod route;
mod route_backward;
mod route_permute;
#[allow(unsafe_code)]
mod stream;
#[allow(unsafe_code)]
mod tensor_map;
#[allow(unsafe_code)]
mod upload;
mod wgmma;
mod workspace;

/// The version of cudarc whose slices, streams and contexts this crate takes.
pub use cudarc;
pub use dense::{Dense, DenseSizes};
pub use device::{DeviceNumbers, device_count, driver};
pub use error::{Error, Result};
pub use jit::{KernelCache, compile_all, compiler};
pub use layer::CudaLayer;
pub use measure::{ReadRate, read_bandwidth, time_replays};
pub use memory::{Memory, Mut, Ref};
pub use pack::Experts;
pub use stream::{CudaStream, Graph, Lending};
pub use workspace::Workspace;

use cudarc::driver::CudaContext;
use device::Device;
use fused_moe_core::config::LayerConfig;
use fused_moe_core::operation::*;
use fused_moe_core::weights::{ExpertWeights, LayerWeights};
use fused_moe_core::{Backend, Options};
use jit::Kernels;
use record::Recorder;
use std::sync::Arc;

/// A CUDA device. Cheap to clone; clones share their kernels.
///
/// ```
/// use fused_moe_core::Backend;
/// match fused_moe_cuda::Cuda::new(0) {
///     Ok(cuda) => println!("{}", cuda.describe()),
///     Err(error) => println!("{error}"),
/// }
/// ```
#[derive(Clone, Debug)]
pub struct Cuda {
    device: Arc<Device>,
    kernels: Arc<Kernels>,
    recorder: Option<Arc<Recorder>>,
}

impl Cuda {
    /// The device of this number, in its primary context.
    ///
    /// Errors: `NoDriver`, `DriverTooOld`, `NoDevice`, `Architecture`, `Driver`; `DeviceLost` when the process has broken the
    /// context before and the driver has noticed.
    pub fn new(ordinal: usize) -> Result<Self> {
        Self::on(Device::new(ordinal)?)
    }

    /// A context of the host program's.
    ///
    /// Errors: `DriverTooOld`, `Architecture`, `Driver`, and `DeviceLost` as [`new`](Self::new).
    pub fn from_context(context: Arc<CudaContext>) -> Result<Self> {
        Self::on(Device::of(context)?)
    }

    fn on(device: Device) -> Result<Self> {
        let device = Arc::new(device);
        // a context that is broken still tells the device's numbers, but not this one
        device.free_bytes()?;
        let kernels = Arc::new(Kernels::new(Arc::clone(&device)));
        Ok(Self { device, kernels, recorder: None })
    }

    /// The device's numbers.
    pub fn numbers(&self) -> &DeviceNumbers {
        &self.device.numbers
    }

    /// Bytes of device memory that are free.
    ///
    /// Errors: `Driver`, `DeviceLost`.
    pub fn free_bytes(&self) -> Result<usize> {
        self.device.free_bytes()
    }

    /// cudarc's handle of the context.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.device.context
    }

    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    pub(crate) fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    /// The same device, on which launches are noted and not made.
    pub(crate) fn recording(&self) -> (Self, Arc<Recorder>) {
        let recorder = Arc::new(Recorder::default());
        (Self { recorder: Some(Arc::clone(&recorder)), ..self.clone() }, recorder)
    }

    pub(crate) fn recorder(&self) -> Option<&Recorder> {
        self.recorder.as_deref()
    }
}

impl Backend for Cuda {
    type Ref<'a> = Ref<'a>;
    type Mut<'a> = Mut<'a>;
    type Memory = Memory;
    type Stream = CudaStream;
    type Workspace = Workspace;
    type Experts = Experts;
    type Layer = CudaLayer;
    type Error = Error;

    fn name(&self) -> &'static str {
        "cuda"
    }

    fn describe(&self) -> String {
        let DeviceNumbers { name, multiprocessors, l2_bytes, memory_bytes, driver, .. } = self.numbers();
        format!(
            "{name}, {}, {multiprocessors} multiprocessors, {} MiB L2, {} GiB, driver for CUDA {}.{}",
            self.numbers().architecture(),
            l2_bytes >> 20,
            memory_bytes >> 30,
            driver / 1000,
            driver % 1000 / 10
        )
    }

    fn stream(&self) -> Result<CudaStream> {
        CudaStream::new(self)
    }

    fn allocate(&self, bytes: usize) -> Result<Memory> {
        Memory::new(&self.device, bytes)
    }

    fn upload(&self, data: &[u8], memory: &mut Memory) -> Result<()> {
        memory.copy_in(&self.device, data)
    }

    fn download(&self, stream: &CudaStream, memory: &Memory, data: &mut [u8]) -> Result<()> {
        memory.copy_out(stream, data)
    }

    fn read(memory: &Memory) -> Ref<'_> {
        memory.read()
    }

    fn write(memory: &mut Memory) -> Mut<'_> {
        memory.write()
    }

    fn shorten<'short, 'long: 'short>(storage: Ref<'long>) -> Ref<'short> {
        storage.shorten()
    }

    fn shorten_mut<'short, 'long: 'short>(storage: Mut<'long>) -> Mut<'short> {
        storage.shorten()
    }

    fn share<'b>(storage: &'b Mut<'_>) -> Ref<'b> {
        storage.share()
    }

    fn reborrow<'b>(storage: &'b mut Mut<'_>) -> Mut<'b> {
        storage.reborrow()
    }

    fn gate(&self, stream: &CudaStream, operands: Gate<'_, Self>) -> Result<()> {
        gate::gate(self, stream, &operands, false)
    }

    fn route(&self, stream: &CudaStream, operands: Route<'_, Self>) -> Result<()> {
        route::route(self, stream, operands)
    }

    fn gate_route(&self, stream: &CudaStream, operands: GateRoute<'_, Self>) -> Result<()> {
        gate::gate_route(self, stream, operands)
    }

    fn gather_weights(&self, stream: &CudaStream, operands: GatherWeights<'_, Self>) -> Result<()> {
        route::gather_weights(self, stream, operands)
    }

    fn permute(&self, stream: &CudaStream, operands: Permute<'_, Self>) -> Result<()> {
        permute::permute(self, stream, operands)
    }

    fn drop_overflow(&self, stream: &CudaStream, operands: DropOverflow<'_, Self>) -> Result<()> {
        drop_overflow::drop_overflow(self, stream, &operands)
    }

    fn tile_schedule(&self, stream: &CudaStream, operands: TileSchedule<'_, Self>) -> Result<()> {
        permute::tile_schedule(self, stream, operands)
    }

    fn gate_up(&self, stream: &CudaStream, operands: GateUp<'_, Self>) -> Result<()> {
        gate_up::gate_up(self, stream, &operands)
    }

    fn activation(&self, stream: &CudaStream, operands: Activate<'_, Self>) -> Result<()> {
        activation::activation(self, stream, operands)
    }

    fn down(&self, stream: &CudaStream, operands: Down<'_, Self>) -> Result<()> {
        down::down(self, stream, &operands)
    }

    fn combine(&self, stream: &CudaStream, operands: Combine<'_, Self>) -> Result<()> {
        combine::combine(self, stream, operands)
    }

    fn linear(&self, stream: &CudaStream, operands: Linear<'_, Self>) -> Result<()> {
        linear::linear(self, stream, operands)
    }

    fn zero(&self, stream: &CudaStream, operands: Zero<'_, Self>) -> Result<()> {
        accumulate::zero(self, stream, operands)
    }

    fn accumulate(&self, stream: &CudaStream, operands: Accumulate<'_, Self>) -> Result<()> {
        accumulate::accumulate(self, stream, operands)
    }

    fn pack(&self, weights: &ExpertWeights<'_>) -> Result<Experts> {
        Experts::new(self, weights)
    }

    fn prepare(&self, config: &LayerConfig, weights: &LayerWeights<'_>, options: &Options) -> Result<CudaLayer> {
        CudaLayer::new(self, config, weights, options)
    }
}
