//! The portable GPU backend: operations and layers through wgpu, on Metal, Vulkan and DX12, in the caller's command
//! encoders and buffers.
//!
//! Each kernel lies beside its launcher, in WGSL. A kernel has at most 8 storage buffers and 128 bytes of parameters,
//! which are immediate data: a device needs wgpu's feature `IMMEDIATES`.
#![forbid(unsafe_code)]

mod accumulate;
mod activation;
mod activation_backward;
mod backward;
mod combine;
mod combine_backward;
mod copy;
mod device;
mod down;
mod down_backward;
mod down_combine;
mod drop_overflow;
mod error;
mod forward;
mod gate;
mod gate_backward;
mod gate_up;
mod gate_up_backward;
mod gradient;
mod grouped;
mod grouped_backward;
mod kernel;
mod launch;
mod layer;
mod linear;
mod losses;
mod measure;
mod memory;
mod norm;
mod norm_backward;
mod pack;
mod permute;
mod pipeline;
mod plan;
mod record;
mod rehearse;
mod route;
mod route_backward;
mod routes;
mod shared;
mod stream;
mod turn;
mod upload;
mod workspace;

pub use device::DeviceNumbers;
pub use error::{Error, Result};
pub use layer::WgpuLayer;
pub use measure::{DenseSizes, ReadRate, read_bandwidth, time_dense, time_repeats};
pub use memory::{Memory, Mut, Ref};
pub use pack::Experts;
pub use stream::WgpuStream;
pub use workspace::Workspace;

use device::Device;
use fused_moe_core::config::LayerConfig;
use fused_moe_core::operation::*;
use fused_moe_core::weights::{ExpertWeights, LayerWeights};
use fused_moe_core::{Backend, Options};
use pipeline::Pipelines;
use record::Recorder;
use std::sync::Arc;

/// A GPU and its queue. Cheap to clone; clones share their kernels.
///
/// ```
/// use fused_moe_core::Backend;
/// match fused_moe_wgpu::Wgpu::new(0) {
///     Ok(wgpu) => println!("{}", wgpu.describe()),
///     Err(error) => println!("{error}"),
/// }
/// ```
#[derive(Clone, Debug)]
pub struct Wgpu {
    device: Arc<Device>,
    pipelines: Arc<Pipelines>,
    recorder: Option<Arc<Recorder>>,
    /// Whether the bits of a row of `linear` do not depend on how many there are.
    invariant: bool,
}

/// All adapters, usable or not, in the order of their numbers: GPUs before processors that play one. Those of DX12 are there
/// where `dxcompiler.dll` is, or the compiler that `WGPU_DX12_COMPILER` names (`staticdxc` in a program that links it).
pub fn adapters() -> Vec<DeviceNumbers> {
    let numbers =
        |adapter: &wgpu::Adapter| DeviceNumbers::new(adapter.get_info(), adapter.features(), &adapter.limits());
    device::adapters().iter().map(numbers).collect()
}

impl Wgpu {
    /// The adapter of this number, with all features and limits it has that help.
    ///
    /// Errors: `NoAdapter`, `NoSuchAdapter`, `Unsupported`, `Limit`, `Device`.
    pub fn new(index: usize) -> Result<Self> {
        let adapters = device::adapters();
        match adapters.get(index) {
            Some(adapter) => Ok(Self::on(Device::new(adapter)?)),
            None if adapters.is_empty() => Err(Error::NoAdapter),
            None => Err(Error::NoSuchAdapter { index, count: adapters.len() }),
        }
    }

    /// A device of the host program's. It needs the feature `IMMEDIATES` with 128 bytes, and uses `SUBGROUP` and
    /// timestamps where it has them. On DX12 the instance must have been made with the compiler DXC: not all kernels
    /// compile with FXC.
    ///
    /// Errors: `Unsupported`, `Limit`.
    pub fn from_device(device: wgpu::Device, queue: wgpu::Queue) -> Result<Self> {
        Ok(Self::on(Device::of(device, queue)?))
    }

    fn on(device: Device) -> Self {
        Self { device: Arc::new(device), pipelines: Arc::default(), recorder: None, invariant: false }
    }

    /// The device's numbers.
    pub fn numbers(&self) -> &DeviceNumbers {
        &self.device.numbers
    }

    /// wgpu's handles.
    pub fn handles(&self) -> (&wgpu::Device, &wgpu::Queue) {
        (&self.device.device, &self.device.queue)
    }

    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    pub(crate) fn pipelines(&self) -> &Pipelines {
        &self.pipelines
    }

    /// The same device, on which launches are noted and not made.
    pub(crate) fn recording(&self) -> (Self, Arc<Recorder>) {
        let recorder = Arc::new(Recorder::default());
        (Self { recorder: Some(Arc::clone(&recorder)), ..self.clone() }, recorder)
    }

    /// The same device for a layer's parts that are made of operations, `invariant` as the layer is.
    pub(crate) fn for_parts(&self, invariant: bool) -> Self {
        Self { invariant, ..self.clone() }
    }

    pub(crate) fn recorder(&self) -> Option<&Recorder> {
        self.recorder.as_deref()
    }
}

impl Backend for Wgpu {
    type Ref<'a> = Ref<'a>;
    type Mut<'a> = Mut<'a>;
    type Memory = Memory;
    type Stream = WgpuStream;
    type Workspace = Workspace;
    type Experts = Experts;
    type Layer = WgpuLayer;
    type Error = Error;

    fn name(&self) -> &'static str {
        "wgpu"
    }

    fn describe(&self) -> String {
        let DeviceNumbers { name, api, driver, software, subgroups, binding_bytes, buffer_bytes, .. } = self.numbers();
        let driver = if driver.is_empty() { String::new() } else { format!(", driver {driver}") };
        let software = if *software { ", in software" } else { "" };
        let subgroups = if *subgroups { "subgroups" } else { "no subgroups" };
        let (binding, buffer) = (binding_bytes >> 20, buffer_bytes >> 20);
        format!("{name}, {api}{driver}{software}, {subgroups}, bindings of {binding} MiB, buffers of {buffer} MiB")
    }

    fn stream(&self) -> Result<WgpuStream> {
        WgpuStream::new(self)
    }

    fn allocate(&self, bytes: usize) -> Result<Memory> {
        Memory::new(&self.device, bytes)
    }

    fn upload(&self, data: &[u8], memory: &mut Memory) -> Result<()> {
        memory.checked(data.len())?;
        memory.copy_in(&self.device, data)
    }

    fn download(&self, stream: &WgpuStream, memory: &Memory, data: &mut [u8]) -> Result<()> {
        memory.copy_out(&self.device, stream, data)
    }

    fn read(memory: &Memory) -> Ref<'_> {
        memory.read()
    }

    fn write(memory: &mut Memory) -> Mut<'_> {
        memory.write()
    }

    fn shorten<'short, 'long: 'short>(storage: Ref<'long>) -> Ref<'short> {
        storage
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

    fn gate(&self, stream: &WgpuStream, operands: Gate<'_, Self>) -> Result<()> {
        stream.whole(|| gate::gate(self, stream, &operands, false))
    }

    fn route(&self, stream: &WgpuStream, operands: Route<'_, Self>) -> Result<()> {
        stream.whole(|| route::route(self, stream, operands))
    }

    fn gate_route(&self, stream: &WgpuStream, operands: GateRoute<'_, Self>) -> Result<()> {
        stream.whole(|| gate::gate_route(self, stream, operands, false))
    }

    fn gather_weights(&self, stream: &WgpuStream, operands: GatherWeights<'_, Self>) -> Result<()> {
        stream.whole(|| route::gather_weights(self, stream, operands))
    }

    fn permute(&self, stream: &WgpuStream, operands: Permute<'_, Self>) -> Result<()> {
        stream.whole(|| permute::permute(self, stream, operands))
    }

    fn drop_overflow(&self, stream: &WgpuStream, operands: DropOverflow<'_, Self>) -> Result<()> {
        stream.whole(|| drop_overflow::drop_overflow(self, stream, operands))
    }

    fn tile_schedule(&self, stream: &WgpuStream, operands: TileSchedule<'_, Self>) -> Result<()> {
        stream.whole(|| permute::tile_schedule(self, stream, operands))
    }

    fn gate_up(&self, stream: &WgpuStream, operands: GateUp<'_, Self>) -> Result<()> {
        stream.whole(|| gate_up::gate_up(self, stream, &operands))
    }

    fn activation(&self, stream: &WgpuStream, operands: Activate<'_, Self>) -> Result<()> {
        stream.whole(|| activation::activation(self, stream, operands))
    }

    fn down(&self, stream: &WgpuStream, operands: Down<'_, Self>) -> Result<()> {
        stream.whole(|| down::down(self, stream, &operands))
    }

    fn combine(&self, stream: &WgpuStream, operands: Combine<'_, Self>) -> Result<()> {
        stream.whole(|| combine::combine(self, stream, operands, None))
    }

    fn linear(&self, stream: &WgpuStream, operands: Linear<'_, Self>) -> Result<()> {
        stream.whole(|| linear::linear(self, stream, &operands, self.invariant))
    }

    fn zero(&self, stream: &WgpuStream, operands: Zero<'_, Self>) -> Result<()> {
        stream.whole(|| accumulate::zero(self, stream, operands))
    }

    fn accumulate(&self, stream: &WgpuStream, operands: Accumulate<'_, Self>) -> Result<()> {
        stream.whole(|| accumulate::accumulate(self, stream, operands, false))
    }

    fn pack(&self, weights: &ExpertWeights<'_>) -> Result<Experts> {
        Experts::new(self, weights)
    }

    fn prepare(&self, config: &LayerConfig, weights: &LayerWeights<'_>, options: &Options) -> Result<WgpuLayer> {
        WgpuLayer::new(self, config, weights, options)
    }
}

/// For unit tests that need an adapter: without one they are passed over, unless `FMOE_REQUIRE_ADAPTER` demands it.
#[cfg(test)]
fn first_adapter() -> Option<Wgpu> {
    match Wgpu::new(0) {
        Ok(wgpu) => Some(wgpu),
        Err(error @ Error::NoAdapter) => {
            let required = std::env::var("FMOE_REQUIRE_ADAPTER").is_ok_and(|value| value == "1");
            assert!(!required, "FMOE_REQUIRE_ADAPTER: {error}");
            println!("{error}: not run");
            None
        }
        Err(error) => panic!("{error}"),
    }
}
