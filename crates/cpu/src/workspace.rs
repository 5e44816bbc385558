use crate::error::Result;
use crate::memory::Memory;
use fused_moe_core::DType::F32;
use fused_moe_core::config::CapacityOrder;
use fused_moe_core::problem::{LayerProblem, workspace_bytes};
use fused_moe_core::surroundings;
use fused_moe_core::{DType, Error, HostView, HostViewMut, Shape, View};

/// Scratch of a layer: one piece of memory, divided anew in each call.
///
/// For T tokens, K experts a token and R = T*K it holds about `4 * (R * (H + I) + T * (2H + S + E))` bytes, of which the
/// experts' outputs `[R, H]` are the most; what stands around the experts has its own in `[T, ..]`.
#[derive(Debug)]
pub struct Workspace {
    memory: Memory,
}

/// Bytes that a buffer begins at a multiple of.
const ALIGNMENT: usize = 64;

/// A buffer of 4-byte elements.
pub(crate) struct Buffer<'a>(&'a mut [u8]);

impl Buffer<'_> {
    pub(crate) fn view(&self, dtype: DType, shape: impl Into<Shape>) -> Result<HostView<'_>> {
        Ok(View::new(&*self.0, dtype, 0, shape)?)
    }

    pub(crate) fn view_mut(&mut self, dtype: DType, shape: impl Into<Shape>) -> Result<HostViewMut<'_>> {
        Ok(View::new(&mut *self.0, dtype, 0, shape)?)
    }
}

/// The buffers of one call.
pub(crate) struct Scratch<'a> {
    /// f32 `[T, E]`, those without weights counted.
    pub(crate) logits: Buffer<'a>,
    pub(crate) routing: RoutingScratch<'a>,
    pub(crate) permutation: PermutationScratch<'a>,
    /// `[T, H]`: what the experts read, where that is not x itself.
    pub(crate) tokens: Buffer<'a>,
    /// `[R, I]`, at most f32.
    pub(crate) a: Buffer<'a>,
    /// f32 `[R, H]`.
    pub(crate) y: Buffer<'a>,
    pub(crate) shared: SharedScratch<'a>,
}

/// What lies between the operations around these stages.
pub(crate) type AroundScratch<'a> = [HostViewMut<'a>; surroundings::BUFFERS];

pub(crate) struct RoutingScratch<'a> {
    /// u32 `[T, K]`.
    pub(crate) experts: Buffer<'a>,
    /// f32 `[T, K]`.
    pub(crate) weights: Buffer<'a>,
    /// u32 `[T]`: the best expert of each token, where a capacity asks for its softmax.
    pub(crate) best: Buffer<'a>,
    /// f32 `[T]`: this softmax.
    pub(crate) importance: Buffer<'a>,
}

pub(crate) struct PermutationScratch<'a> {
    /// u32 `[R]`.
    pub(crate) row_slot: Buffer<'a>,
    /// u32 `[R]`.
    pub(crate) slot_row: Buffer<'a>,
    /// u32 `[E+1]`, those without weights counted.
    pub(crate) offsets: Buffer<'a>,
}

pub(crate) struct SharedScratch<'a> {
    /// `[T, S]`, at most f32.
    pub(crate) a: Buffer<'a>,
    /// f32 `[T, H]`.
    pub(crate) y: Buffer<'a>,
    /// f32 `[T]`.
    pub(crate) logit: Buffer<'a>,
    /// u32 `[T]`, which nobody reads: the rows of the shared expert are the tokens.
    pub(crate) slots: Buffer<'a>,
}

/// Of the stages alone.
const STAGES: usize = 15;
const BUFFERS: usize = STAGES + surroundings::BUFFERS;

impl Workspace {
    pub(crate) fn new(memory: Memory, layer: &LayerProblem, max_tokens: usize) -> Result<Self> {
        let mut workspace = Self { memory };
        workspace.carve("workspace", layer, max_tokens)?;
        Ok(workspace)
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
    ) -> Result<(Scratch<'_>, AroundScratch<'_>)> {
        let (expected, actual) = (Self::bytes(layer, tokens)?, self.memory.len());
        let sizes = buffers(layer, tokens).filter(|_| expected <= actual);
        let sizes = sizes.ok_or(Error::Workspace { operation, tokens, expected, actual })?;
        let mut rest = &mut self.memory[..];
        let mut next = sizes.into_iter().map(|bytes| {
            let (buffer, others) = std::mem::take(&mut rest).split_at_mut(bytes);
            rest = others;
            buffer
        });
        let mut buffer = || Buffer(next.next().unwrap_or_default());
        let stages = Scratch {
            logits: buffer(),
            routing: RoutingScratch { experts: buffer(), weights: buffer(), best: buffer(), importance: buffer() },
            permutation: PermutationScratch { row_slot: buffer(), slot_row: buffer(), offsets: buffer() },
            tokens: buffer(),
            a: buffer(),
            y: buffer(),
            shared: SharedScratch { a: buffer(), y: buffer(), logit: buffer(), slots: buffer() },
        };
        let mut view = || {
            let bytes = next.next().unwrap_or_default();
            let elements = bytes.len() / F32.size();
            View::new(bytes, F32, 0, [elements])
        };
        let around = [
            view()?,
            view()?,
            view()?,
            view()?,
            view()?,
            view()?,
            view()?,
            view()?,
            view()?,
            view()?,
            view()?,
            view()?,
            view()?,
            view()?,
            view()?,
            view()?,
        ];
        Ok((stages, around))
    }
}

/// Bytes of the buffers, in the order that `carve` hands them out in.
fn buffers(layer: &LayerProblem, tokens: usize) -> Option<[usize; BUFFERS]> {
    let config = &layer.core;
    let (hidden, choices) = (config.hidden, config.choices());
    let by_score = config.capacity.is_some_and(|capacity| capacity.order == CapacityOrder::Score);
    let ranked = if by_score { tokens } else { 0 };
    let rows = tokens.checked_mul(config.top_k)?;
    let shared = config.shared.map_or([0; 4], |shared| [shared.intermediate, hidden, 1, 1]);
    let stages: [usize; STAGES] = [
        tokens.checked_mul(choices)?,
        rows,
        rows,
        ranked,
        ranked,
        rows,
        rows,
        choices + 1,
        tokens.checked_mul(hidden)?,
        rows.checked_mul(config.intermediate)?,
        rows.checked_mul(hidden)?,
        tokens.checked_mul(shared[0])?,
        tokens.checked_mul(shared[1])?,
        tokens.checked_mul(shared[2])?,
        tokens.checked_mul(shared[3])?,
    ];
    let mut bytes = [0; BUFFERS];
    let around = surroundings::buffers(&layer.config, tokens)?;
    for (bytes, elements) in bytes.iter_mut().zip(stages.into_iter().chain(around)) {
        *bytes = elements.checked_mul(4)?.checked_next_multiple_of(ALIGNMENT)?;
    }
    Some(bytes)
}
