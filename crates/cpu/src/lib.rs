//! The CPU backend: operations and layers on host memory, multi-threaded and vectorised.
//!
//! The stages are called in order by [`CpuLayer`]; each is public as a method of [`Cpu`] through
//! [`Backend`].
//!
//! Operations and layers allocate nothing when they run. Work that comes from a thread outside the pool goes through
//! rayon's queue, which allocates a block now and then: call from inside the pool (`ThreadPool::install`) for none.
//! What an operation works on lies on the stack of its threads: half a MiB in a gradient and with tiles, less
//! in all others.
#![deny(unsafe_code)]

mod activation;
mod activation_backward;
#[allow(unsafe_code)]
pub mod arch;
mod backward;
mod combine;
mod combine_backward;
mod device;
mod down;
mod down_backward;
mod error;
mod gate;
mod gate_backward;
mod gate_up;
mod gate_up_backward;
mod grouped;
mod grouped_backward;
mod layer;
mod linear;
mod losses;
mod memory;
mod norm;
mod overflow;
mod pack;
mod panels;
mod permute;
mod plan;
mod pool;
mod route;
mod route_backward;
mod rows;
mod table;
mod workspace;

pub use error::{Error, Result};
pub use layer::CpuLayer;
pub use memory::Memory;
pub use pack::Experts;
pub use workspace::Workspace;

use arch::{Isa, Kernels};
use device::Caches;
use fused_moe_core::config::LayerConfig;
use fused_moe_core::operation::*;
use fused_moe_core::weights::{ExpertWeights, LayerWeights};
use fused_moe_core::{Backend, Options, Status, Stream};
use pool::Pool;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// The processor this program runs on, and the threads to use of it.
///
/// Cheap to clone. Operations run on the caller's thread and the pool's, and have finished when they return.
///
/// ```
/// use fused_moe_core::{View, operation::Gate, Backend};
/// use fused_moe_cpu::Cpu;
/// let cpu = Cpu::new()?;
/// let stream = cpu.stream()?;
/// let (x, router) = ([1.0f32, 2.0], [0.5f32, 0.0, 0.0, 0.5, 1.0, 1.0]);
/// let mut logits = [0.0f32; 3];
/// cpu.gate(&stream, Gate::new(View::of(&x, [1, 2])?, View::of(&router, [3, 2])?, View::of_mut(&mut logits, [1, 3])?))?;
/// assert_eq!(logits, [0.5, 1.0, 3.0]);
/// # Ok::<(), fused_moe_cpu::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Cpu {
    pool: Pool,
    kernels: Kernels,
    caches: Caches,
}

impl Cpu {
    /// On the rayon pool of the thread that calls an operation, else on the global one; with the fastest instruction set
    /// here.
    ///
    /// The variable `FMOE_CPU_ISA` (`scalar`, `neon`, `avx2`, `avx512`, `avx512bf16`, `amx`) forces another one, here and in the
    /// constructors below; empty, it forces none.
    ///
    /// Errors: `Isa` when it names one that is unknown or not here.
    pub fn new() -> Result<Self> {
        Self::on(Pool::global())
    }

    /// On a pool of the caller's.
    ///
    /// Errors: `Isa`, as for [`new`](Self::new).
    pub fn with_pool(pool: Arc<rayon::ThreadPool>) -> Result<Self> {
        Self::on(Pool::of(pool))
    }

    /// On a pool of its own with so many threads; 0 means one for each processor.
    ///
    /// Errors: `Threads` when they cannot be started, `Isa` as for [`new`](Self::new).
    pub fn with_threads(threads: usize) -> Result<Self> {
        Self::on(Pool::with_threads(threads)?)
    }

    fn on(pool: Pool) -> Result<Self> {
        Ok(Self { pool, kernels: device::kernels()?, caches: Caches::read() })
    }

    /// The same with another instruction set.
    ///
    /// Errors: `Isa` when the processor has it not.
    pub fn with_isa(self, isa: Isa) -> Result<Self> {
        Ok(Self { kernels: device::kernels_of(isa)?, ..self })
    }

    /// How many threads work on a call.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.kernels.isa()
    }

    pub(crate) fn device(&self) -> plan::Device {
        plan::Device { threads: self.threads(), isa: self.isa(), caches: self.caches }
    }
}

/// A caller's sequence of operations. Work has finished when a call returns; the stream keeps the status.
#[derive(Debug, Default)]
pub struct CpuStream {
    status: AtomicU32,
}

impl CpuStream {
    pub(crate) fn raise(&self, status: Status) {
        if !status.is_ok() {
            self.status.fetch_or(status.bits(), Ordering::Relaxed);
        }
    }
}

impl Stream for CpuStream {
    type Error = Error;

    fn status(&self) -> Result<Status> {
        Ok(Status::from_bits(self.status.swap(0, Ordering::Relaxed)))
    }
}

impl Backend for Cpu {
    type Ref<'a> = &'a [u8];
    type Mut<'a> = &'a mut [u8];
    type Memory = Memory;
    type Stream = CpuStream;
    type Workspace = Workspace;
    type Experts = Experts;
    type Layer = CpuLayer;
    type Error = Error;

    fn name(&self) -> &'static str {
        "cpu"
    }

    fn describe(&self) -> String {
        let name = device::model_name().unwrap_or_else(|| "CPU".to_owned());
        let threads = self.threads();
        format!("{name}, {}, {threads} thread{}", self.isa(), if threads == 1 { "" } else { "s" })
    }

    fn stream(&self) -> Result<CpuStream> {
        Ok(CpuStream::default())
    }

    fn allocate(&self, bytes: usize) -> Result<Memory> {
        Memory::new(bytes)
    }

    fn upload(&self, data: &[u8], memory: &mut Memory) -> Result<()> {
        memory.copy_in(data)
    }

    fn download(&self, _stream: &CpuStream, memory: &Memory, data: &mut [u8]) -> Result<()> {
        memory.copy_out(data)
    }

    fn read(memory: &Memory) -> &[u8] {
        memory
    }

    fn write(memory: &mut Memory) -> &mut [u8] {
        memory
    }

    fn shorten<'short, 'long: 'short>(storage: &'long [u8]) -> &'short [u8] {
        storage
    }

    fn shorten_mut<'short, 'long: 'short>(storage: &'long mut [u8]) -> &'short mut [u8] {
        storage
    }

    fn share<'b>(storage: &'b &mut [u8]) -> &'b [u8] {
        storage
    }

    fn reborrow<'b>(storage: &'b mut &mut [u8]) -> &'b mut [u8] {
        storage
    }

    fn gate(&self, stream: &CpuStream, operands: Gate<'_, Self>) -> Result<()> {
        gate::gate(self, stream, operands)
    }

    fn route(&self, stream: &CpuStream, operands: Route<'_, Self>) -> Result<()> {
        route::route(self, stream, operands)
    }

    fn gate_route(&self, stream: &CpuStream, operands: GateRoute<'_, Self>) -> Result<()> {
        gate::gate_route(self, stream, operands)
    }

    fn gather_weights(&self, stream: &CpuStream, operands: GatherWeights<'_, Self>) -> Result<()> {
        route::gather_weights(self, stream, operands)
    }

    fn permute(&self, stream: &CpuStream, operands: Permute<'_, Self>) -> Result<()> {
        permute::permute(self, stream, operands)
    }

    fn drop_overflow(&self, _stream: &CpuStream, operands: DropOverflow<'_, Self>) -> Result<()> {
        overflow::drop_overflow(self, operands)
    }

    fn tile_schedule(&self, _stream: &CpuStream, operands: TileSchedule<'_, Self>) -> Result<()> {
        permute::tile_schedule(operands)
    }

    fn gate_up(&self, _stream: &CpuStream, operands: GateUp<'_, Self>) -> Result<()> {
        gate_up::gate_up(self, operands)
    }

    fn activation(&self, _stream: &CpuStream, operands: Activate<'_, Self>) -> Result<()> {
        activation::activation(self, operands)
    }

    fn down(&self, _stream: &CpuStream, operands: Down<'_, Self>) -> Result<()> {
        down::down(self, operands)
    }

    fn combine(&self, _stream: &CpuStream, operands: Combine<'_, Self>) -> Result<()> {
        combine::combine(self, operands)
    }

    fn linear(&self, _stream: &CpuStream, operands: Linear<'_, Self>) -> Result<()> {
        linear::linear(self, operands)
    }

    fn zero(&self, _stream: &CpuStream, operands: Zero<'_, Self>) -> Result<()> {
        combine::zero(self, operands)
    }

    fn accumulate(&self, _stream: &CpuStream, operands: Accumulate<'_, Self>) -> Result<()> {
        combine::accumulate(self, operands)
    }

    fn pack(&self, weights: &ExpertWeights<'_>) -> Result<Experts> {
        Experts::new(self, weights)
    }

    fn prepare(&self, config: &LayerConfig, weights: &LayerWeights<'_>, options: &Options) -> Result<CpuLayer> {
        CpuLayer::new(self, config, weights, options)
    }
}
