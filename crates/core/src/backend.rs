//! What a backend implements: memory, streams, the operations, and prepared layers.
//!
//! A program written over `B: Backend` runs unchanged on host slices, on CUDA device pointers and on `wgpu::Buffer`s.

use crate::config::LayerConfig;
use crate::dtype::DType;
use crate::error::Error;
use crate::operation::*;
use crate::status::Status;
use crate::tensor::{Storage, View};
use crate::weights::{ExpertWeights, LayerWeights};
use std::ops::Range;

/// An operand that is read.
pub type In<'a, B> = View<<B as Backend>::Ref<'a>>;

/// An operand that is written (and, where its field says so, read).
pub type Out<'a, B> = View<<B as Backend>::Mut<'a>>;

/// A place where layers run.
///
/// Every operation checks its operands, enqueues its work on the stream and returns; none allocates, waits or reads
/// back. Each is a method with one struct of operands, documented in [`operation`](crate::operation).
pub trait Backend: Sized {
    /// Memory that operations read: `&[u8]`, a device address range, a `&wgpu::Buffer`.
    type Ref<'a>: Storage + Copy;
    /// Memory that operations write.
    type Mut<'a>: Storage;
    /// A buffer: owned, or a handle to one that the host program owns.
    type Memory: Send + Sync;
    /// Where work is enqueued in order.
    type Stream: Stream<Error = Self::Error>;
    /// Scratch of a layer.
    type Workspace: Send;
    /// Expert matrices as this backend likes to read them.
    type Experts: Send + Sync;
    /// A layer prepared for this backend.
    type Layer: Layer<Self> + Send + Sync;
    /// What can fail here; includes every [`Error`] of the contract.
    type Error: std::error::Error + From<Error> + Send + Sync + 'static;

    /// Its name on a command line: `cpu`, `cuda`, `wgpu`.
    fn name(&self) -> &'static str;

    /// The device in words.
    fn describe(&self) -> String;

    /// A stream of this device.
    fn stream(&self) -> Result<Self::Stream, Self::Error>;

    /// A zeroed buffer.
    fn allocate(&self, bytes: usize) -> Result<Self::Memory, Self::Error>;

    /// Copies `data` to the beginning of `memory`, which must be as long at least; waits until `data` may be reused.
    fn upload(&self, data: &[u8], memory: &mut Self::Memory) -> Result<(), Self::Error>;

    /// Waits for `stream`, then copies the beginning of `memory` to `data`.
    fn download(&self, stream: &Self::Stream, memory: &Self::Memory, data: &mut [u8]) -> Result<(), Self::Error>;

    /// A buffer as storage of operands that are read.
    fn read(memory: &Self::Memory) -> Self::Ref<'_>;

    /// A buffer as storage of operands that are written.
    fn write(memory: &mut Self::Memory) -> Self::Mut<'_>;

    /// The same right to read, for a shorter while.
    fn shorten<'short, 'long: 'short>(storage: Self::Ref<'long>) -> Self::Ref<'short>;

    /// The same right to write, for a shorter while.
    fn shorten_mut<'short, 'long: 'short>(storage: Self::Mut<'long>) -> Self::Mut<'short>;

    /// Reads, for a while, what is otherwise written.
    fn share<'b>(storage: &'b Self::Mut<'_>) -> Self::Ref<'b>;

    /// Lends, for a while, the right to write.
    fn reborrow<'b>(storage: &'b mut Self::Mut<'_>) -> Self::Mut<'b>;

    /// `logits = softcap(scale * (n . router^T) + bias)`, n being x or its RMSNorm.
    fn gate(&self, stream: &Self::Stream, operands: Gate<'_, Self>) -> Result<(), Self::Error>;

    /// Logits to experts and weights.
    fn route(&self, stream: &Self::Stream, operands: Route<'_, Self>) -> Result<(), Self::Error>;

    /// Gate and route in one.
    fn gate_route(&self, stream: &Self::Stream, operands: GateRoute<'_, Self>) -> Result<(), Self::Error>;

    /// Weights of experts that were chosen elsewhere.
    fn gather_weights(&self, stream: &Self::Stream, operands: GatherWeights<'_, Self>) -> Result<(), Self::Error>;

    /// Groups the slots by expert.
    fn permute(&self, stream: &Self::Stream, operands: Permute<'_, Self>) -> Result<(), Self::Error>;

    /// Takes the slots that overflow a capacity out of the routes.
    fn drop_overflow(&self, stream: &Self::Stream, operands: DropOverflow<'_, Self>) -> Result<(), Self::Error>;

    /// Cuts the rows of each expert into tiles.
    fn tile_schedule(&self, stream: &Self::Stream, operands: TileSchedule<'_, Self>) -> Result<(), Self::Error>;

    /// Each row times its expert's gate_up, activation included if asked for.
    fn gate_up(&self, stream: &Self::Stream, operands: GateUp<'_, Self>) -> Result<(), Self::Error>;

    /// The activation alone.
    fn activation(&self, stream: &Self::Stream, operands: Activate<'_, Self>) -> Result<(), Self::Error>;

    /// Each row times its expert's down.
    fn down(&self, stream: &Self::Stream, operands: Down<'_, Self>) -> Result<(), Self::Error>;

    /// Weighted sum of a token's rows, shared expert, residual and next norm.
    fn combine(&self, stream: &Self::Stream, operands: Combine<'_, Self>) -> Result<(), Self::Error>;

    /// A dense product.
    fn linear(&self, stream: &Self::Stream, operands: Linear<'_, Self>) -> Result<(), Self::Error>;

    /// Writes zeros.
    fn zero(&self, stream: &Self::Stream, operands: Zero<'_, Self>) -> Result<(), Self::Error>;

    /// `acc += w * y`.
    fn accumulate(&self, stream: &Self::Stream, operands: Accumulate<'_, Self>) -> Result<(), Self::Error>;

    /// Copies expert matrices into the form that [`Matrices::Packed`] takes.
    fn pack(&self, weights: &ExpertWeights<'_>) -> Result<Self::Experts, Self::Error>;

    /// Checks a layer and copies its weights to this device.
    fn prepare(
        &self,
        config: &LayerConfig,
        weights: &LayerWeights<'_>,
        options: &Options,
    ) -> Result<Self::Layer, Self::Error>;
}

/// The gradients of the operations, for backends that train.
///
/// As for [`Backend`]'s own operations: operands are checked, work is enqueued, nothing is waited for or read back, and the
/// same inputs give the same bits. No memory is allocated for operands; what a stream keeps for sums that go by several
/// launches (256 KiB on wgpu) is made when one of its operations needs it first.
pub trait BackendBackward: Backend {
    /// The format of what lies between two operations of a layer that is trained, for x and expert matrices of these
    /// formats: that of both where the backend's products want all operands alike, else f32.
    fn between(&self, _x: DType, _matrices: DType) -> DType {
        DType::F32
    }

    /// Of the experts' rows, the weights and the shared expert's part.
    fn combine_backward(&self, stream: &Self::Stream, operands: CombineBackward<'_, Self>) -> Result<(), Self::Error>;

    /// Of the rows, the matrices and the biases of down.
    fn down_backward(&self, stream: &Self::Stream, operands: DownBackward<'_, Self>) -> Result<(), Self::Error>;

    /// Of the pre-activation.
    fn activation_backward(
        &self,
        stream: &Self::Stream,
        operands: ActivationBackward<'_, Self>,
    ) -> Result<(), Self::Error>;

    /// The same and the gradient of the routing weights at once, where that is a launch of its own; `false`: nothing was
    /// enqueued.
    fn activation_weights_backward(
        &self,
        _stream: &Self::Stream,
        _operands: ActivationWeightsBackward<'_, Self>,
    ) -> Result<bool, Self::Error> {
        Ok(false)
    }

    /// Of the rows, the matrices and the biases of gate_up.
    fn gate_up_backward(&self, stream: &Self::Stream, operands: GateUpBackward<'_, Self>) -> Result<(), Self::Error>;

    /// Of the logits and the per-expert scale.
    fn route_backward(&self, stream: &Self::Stream, operands: RouteBackward<'_, Self>) -> Result<(), Self::Error>;

    /// Of what the router's product read, of the router and its bias.
    fn gate_backward(&self, stream: &Self::Stream, operands: GateBackward<'_, Self>) -> Result<(), Self::Error>;

    /// Of an RMSNorm's rows and weight.
    fn norm_backward(&self, stream: &Self::Stream, operands: NormBackward<'_, Self>) -> Result<(), Self::Error>;

    /// The load-balancing loss and its gradient.
    fn load_balance_loss(&self, stream: &Self::Stream, operands: LoadBalanceLoss<'_, Self>) -> Result<(), Self::Error>;

    /// The router z-loss and its gradient.
    fn z_loss(&self, stream: &Self::Stream, operands: ZLoss<'_, Self>) -> Result<(), Self::Error>;
}

/// A view for a shorter while: generic code needs it to bring operands of different origins together.
pub fn shorten<'short, 'long: 'short, B: Backend>(view: In<'long, B>) -> In<'short, B> {
    view.map_storage(B::shorten)
}

/// A writable view for a shorter while.
pub fn shorten_mut<'short, 'long: 'short, B: Backend>(view: Out<'long, B>) -> Out<'short, B> {
    view.map_storage(B::shorten_mut)
}

/// A residual for a shorter while.
pub fn shorten_residual<'short, 'long: 'short, B: Backend>(residual: Residual<'long, B>) -> Residual<'short, B> {
    match residual {
        Residual::Of(view) => Residual::Of(shorten::<B>(view)),
        Residual::InPlace => Residual::InPlace,
    }
}

/// A norm for a shorter while.
pub fn shorten_norm<'short, 'long: 'short, B: Backend>(norm: NextNorm<'long, B>) -> NextNorm<'short, B> {
    let NextNorm { weight, eps, out } = norm;
    NextNorm { weight: weight.map(shorten::<B>), eps, out: shorten_mut::<B>(out) }
}

/// Reads, for a while, what is otherwise written.
pub fn share<'b, B: Backend>(view: &'b Out<'_, B>) -> In<'b, B> {
    view.as_ref().map_storage(B::share)
}

/// Lends, for a while, the right to write.
pub fn reborrow<'b, B: Backend>(view: &'b mut Out<'_, B>) -> Out<'b, B> {
    view.as_mut().map_storage(B::reborrow)
}

/// Work in order, and what went wrong in it.
pub trait Stream {
    /// What can fail here.
    type Error;

    /// Waits for the work enqueued so far; returns what happened in it and forgets it.
    fn status(&self) -> Result<Status, Self::Error>;
}

/// How a layer is to be prepared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// What results may depend on.
    pub numerics: Numerics,
    /// The experts that live here (expert parallelism); all of them by default. Weights of others are not copied, and
    /// their slots contribute nothing. Experts without weights are where the last of the others is, so that the results of
    /// several devices add up.
    pub local_experts: Option<Range<usize>>,
}

/// What the bits of a token's result may depend on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Numerics {
    /// The token, the weights and the shape of the batch: the fastest road for each batch size.
    #[default]
    Fast,
    /// The token and the weights alone: the same bits in any batch.
    BatchInvariant,
}

/// A layer on a device: weights in place, ready to be called any number of times, from several threads at once.
pub trait Layer<B: Backend> {
    /// What it computes.
    fn config(&self) -> &LayerConfig;

    /// Bytes of weights that it holds.
    fn weight_bytes(&self) -> usize;

    /// Bytes of scratch that a call with up to `max_tokens` tokens needs.
    fn workspace_bytes(&self, max_tokens: usize) -> Result<usize, B::Error>;

    /// A workspace in memory of the caller's, `workspace_bytes(max_tokens)` at least.
    fn workspace_in(&self, memory: B::Memory, max_tokens: usize) -> Result<B::Workspace, B::Error>;

    /// A workspace in memory of its own: the only allocation.
    fn workspace(&self, max_tokens: usize) -> Result<B::Workspace, B::Error>;

    /// How a call with `tokens` tokens would be carried out and why, in a few lines.
    fn explain(&self, tokens: usize) -> String;

    /// The layer, with whatever parts the call names.
    fn run(&self, stream: &B::Stream, call: Forward<'_, B>, workspace: &mut B::Workspace) -> Result<(), B::Error>;

    /// `y = layer(x)`, both `[T, H]`.
    fn forward(
        &self,
        stream: &B::Stream,
        x: In<'_, B>,
        y: Out<'_, B>,
        workspace: &mut B::Workspace,
    ) -> Result<(), B::Error>
    where
        Self: Sized,
    {
        self.run(stream, Forward::new(shorten::<B>(x), shorten_mut::<B>(y)), workspace)
    }
}
