use crate::device::Device;
use crate::error::Result;
use crate::memory::{Memory, Mut, Ref};
use fused_moe_core::config::CapacityOrder;
use fused_moe_core::problem::{LayerProblem, workspace_bytes};
use fused_moe_core::{DType, Error, Shape, Storage, View, surroundings};

/// Scratch of a layer: one piece of device memory, divided anew in each call.
///
/// For T tokens, K experts a token and R = T*K it holds about `4 * (R * (H + I) + T * (2H + S + E))` bytes, of which the
/// experts' outputs `[R, H]` are the most; a norm of them takes as much again, and what stands around the experts what
/// [`surroundings::buffers`] says.
///
/// Nothing in it outlasts a call, so that layers may share one: it serves any layer of the same device for as many tokens as
/// that layer's `workspace_bytes` fit its memory, one call after the other. `&mut` sees to it that calls are made in turn;
/// calls on different streams are the caller's to order. Making a workspace also compiles what the calls of the layer that
/// made it need, up to so many tokens, and only of that one: another layer that shares it compiles at its first calls
/// whatever kernels the two do not have in common.
#[derive(Debug)]
pub struct Workspace {
    memory: Memory,
}

/// Bytes that a buffer begins at a multiple of.
const ALIGNMENT: usize = 256;

/// A buffer with room for elements of 4 bytes.
pub(crate) struct Buffer<'a>(Mut<'a>);

impl<'a> Buffer<'a> {
    pub(crate) fn view(&self, dtype: DType, shape: impl Into<Shape>) -> Result<View<Ref<'_>>> {
        Ok(View::new(self.0.share(), dtype, 0, shape)?)
    }

    pub(crate) fn view_mut(&mut self, dtype: DType, shape: impl Into<Shape>) -> Result<View<Mut<'_>>> {
        Ok(View::new(self.0.reborrow(), dtype, 0, shape)?)
    }

    /// All of it.
    fn into_view(self) -> Result<View<Mut<'a>>> {
        let elements = self.0.bytes() / 4;
        Ok(View::new(self.0, DType::F32, 0, [elements])?)
    }
}

/// The buffers of one call.
pub(crate) struct Scratch<'a> {
    pub(crate) routing: RoutingScratch<'a>,
    pub(crate) permutation: PermutationScratch<'a>,
    /// `[T, H]`: what the experts read, where that is not x itself.
    pub(crate) tokens: Buffer<'a>,
    /// `[R, I]`.
    pub(crate) a: Buffer<'a>,
    /// `[R, H]`.
    pub(crate) y: Buffer<'a>,
    /// `[R, H]`: the norm of y.
    pub(crate) normed: Buffer<'a>,
    pub(crate) shared: SharedScratch<'a>,
}

pub(crate) struct RoutingScratch<'a> {
    /// f32 `[T, E]`, with experts without weights.
    pub(crate) logits: Buffer<'a>,
    /// u32 `[T, K]`.
    pub(crate) experts: Buffer<'a>,
    /// f32 `[T, K]`.
    pub(crate) weights: Buffer<'a>,
    /// u32 `[T]` and f32 `[T]`: each token's best expert and its softmax, where a capacity goes by it.
    pub(crate) best: [Buffer<'a>; 2],
}

pub(crate) struct PermutationScratch<'a> {
    /// u32 `[R]`.
    pub(crate) row_slot: Buffer<'a>,
    /// u32 `[R]`.
    pub(crate) slot_row: Buffer<'a>,
    /// u32 `[E+1]`, likewise, and a counter for each of the two products.
    pub(crate) offsets: Buffer<'a>,
}

pub(crate) struct SharedScratch<'a> {
    /// `[T, S]`.
    pub(crate) a: Buffer<'a>,
    /// `[T, H]`.
    pub(crate) y: Buffer<'a>,
    /// f32 `[T]`.
    pub(crate) logit: Buffer<'a>,
    /// u32 `[T]`, which nobody reads: the rows of the shared expert are the tokens.
    pub(crate) slots: Buffer<'a>,
    /// u32 `[2]`, likewise.
    pub(crate) ends: Buffer<'a>,
}

/// Counters of the products behind the offsets.
pub(crate) const COUNTERS: usize = 2;

/// What the stages from router to combine need.
const BUFFERS: usize = 17;

/// What stands around them needs, in the order of [`surroundings::buffers`].
pub(crate) type Around<'a> = [View<Mut<'a>>; surroundings::BUFFERS];

impl Workspace {
    pub(crate) fn new(memory: Memory, layer: &LayerProblem, max_tokens: usize) -> Result<Self> {
        let mut workspace = Self { memory };
        workspace.carve("workspace", layer, max_tokens)?;
        Ok(workspace)
    }

    /// Errors: `OtherContext` when it was made for another device.
    pub(crate) fn check(&self, device: &Device, during: &'static str) -> Result<()> {
        self.memory.check(device, during, "workspace")
    }

    /// How much `tokens` tokens need.
    ///
    /// Errors: `Value` when that is no number of bytes.
    pub(crate) fn bytes(layer: &LayerProblem, tokens: usize) -> Result<usize> {
        Ok(workspace_bytes(buffers(layer, tokens), tokens)?)
    }

    /// The buffers of a call with `tokens` tokens.
    ///
    /// Errors: `Workspace` when there is too little memory.
    pub(crate) fn carve(
        &mut self,
        operation: &'static str,
        layer: &LayerProblem,
        tokens: usize,
    ) -> Result<(Scratch<'_>, Around<'_>)> {
        let (expected, actual) = (Self::bytes(layer, tokens)?, self.memory.bytes());
        let sizes = buffers(layer, tokens).filter(|_| expected <= actual);
        let sizes = sizes.ok_or(Error::Workspace { operation, tokens, expected, actual })?;
        let mut sizes = sizes.into_iter();
        let mut rest = self.memory.write();
        let mut buffer = || Buffer(rest.split_off_front(sizes.next().unwrap_or(0)));
        let stages = Scratch {
            routing: RoutingScratch {
                logits: buffer(),
                experts: buffer(),
                weights: buffer(),
                best: [buffer(), buffer()],
            },
            permutation: PermutationScratch { row_slot: buffer(), slot_row: buffer(), offsets: buffer() },
            tokens: buffer(),
            a: buffer(),
            y: buffer(),
            normed: buffer(),
            shared: SharedScratch { a: buffer(), y: buffer(), logit: buffer(), slots: buffer(), ends: buffer() },
        };
        let mut part = || buffer().into_view();
        #[rustfmt::skip]
        let around = [
            part()?, part()?, part()?, part()?, part()?, part()?, part()?, part()?,
            part()?, part()?, part()?, part()?, part()?, part()?, part()?, part()?,
        ];
        Ok((stages, around))
    }
}

/// Bytes of the buffers, in the order that `carve` hands them out in.
fn buffers(layer: &LayerProblem, tokens: usize) -> Option<[usize; BUFFERS + surroundings::BUFFERS]> {
    let config = &layer.core;
    let (hidden, choices) = (config.hidden, config.choices());
    let rows = tokens.checked_mul(config.top_k)?;
    let shared = config.shared.map_or([0; 4], |shared| [shared.intermediate, hidden, 1, 1]);
    let by_score = config.capacity.is_some_and(|capacity| capacity.order == CapacityOrder::Score);
    let best = if by_score { tokens } else { 0 };
    let elements = [
        tokens.checked_mul(choices)?,
        rows,
        rows,
        best,
        best,
        rows,
        rows,
        choices + 1 + COUNTERS,
        tokens.checked_mul(hidden)?,
        rows.checked_mul(config.intermediate)?,
        rows.checked_mul(hidden)?,
        if config.norms.expert_out.is_some() { rows.checked_mul(hidden)? } else { 0 },
        tokens.checked_mul(shared[0])?,
        tokens.checked_mul(shared[1])?,
        tokens.checked_mul(shared[2])?,
        tokens.checked_mul(shared[3])?,
        2,
    ];
    let around = surroundings::buffers(&layer.config, tokens)?;
    let mut bytes = [0; BUFFERS + surroundings::BUFFERS];
    for (bytes, elements) in bytes.iter_mut().zip(elements.into_iter().chain(around)) {
        *bytes = elements.checked_mul(4)?.checked_next_multiple_of(ALIGNMENT)?;
    }
    Some(bytes)
}
