use crate::backend::{Backend, In, Out};
use crate::config::LayerConfig;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::{Shape, View};
use std::cell::Cell;

/// Scratch of a layer that is trained, made once for a largest number of tokens: each part in memory of its own,
/// `4 * (R * (2I + N + H + 4) + T * (3H + 2E + 1) + E + 3)` bytes for T tokens and R = T*K slots, N being 2I, or I without
/// gate; and `4 * T * (2H + 2S + N + 5)` more with a shared expert, N being its 2S or S.
pub struct TrainingWorkspace<B: Backend> {
    pub(super) max_tokens: usize,
    bytes: usize,
    pub(super) permutation: PermutationScratch<B>,
    /// Of the shared expert: every token to one expert.
    pub(super) identity: PermutationScratch<B>,
    /// u32 `[T, 1]`: zeros.
    pub(super) zeros: Scratch<B>,
    /// f32 `[T, E]`.
    pub(super) logits: Scratch<B>,
    /// f32 `[T, E]`.
    pub(super) d_logits: Scratch<B>,
    /// f32 `[T, K]`.
    pub(super) d_weights: Scratch<B>,
    /// `[T, H]`: the norm of x, in the format between operations.
    pub(super) n: Scratch<B>,
    /// f32 `[T, H]`: of what the experts read.
    pub(super) d_n: Scratch<B>,
    /// f32 `[T, H]`.
    pub(super) tokens: Scratch<B>,
    /// f32 `[T, 1]`: ones.
    pub(super) ones: Scratch<B>,
    /// f32 `[R, 1]`: the factor of each row.
    pub(super) factors: Scratch<B>,
    /// `[R, I]`, in the format between operations, as the next two.
    pub(super) a: Scratch<B>,
    /// `[R, I]`.
    pub(super) d_a: Scratch<B>,
    /// `[R, N]`.
    pub(super) d_z: Scratch<B>,
    /// `[R, H]`: the experts' outputs; in a backward pass the gradient of what each row read.
    pub(super) rows: Scratch<B>,
    pub(super) shared: SharedScratch<B>,
}

/// A permutation.
pub(super) struct PermutationScratch<B: Backend> {
    pub(super) row_slot: B::Memory,
    pub(super) slot_row: B::Memory,
    pub(super) offsets: B::Memory,
}

/// Scratch of the shared expert, in the formats of the other experts'.
pub(super) struct SharedScratch<B: Backend> {
    /// `[T, S]`.
    pub(super) a: Scratch<B>,
    /// `[T, S]`.
    pub(super) d_a: Scratch<B>,
    /// `[T, 2S]`.
    pub(super) d_z: Scratch<B>,
    /// `[T, H]`.
    pub(super) y: Scratch<B>,
    /// `[T, H]`.
    pub(super) d_y: Scratch<B>,
    /// f32 `[T, 1]`.
    pub(super) logit: Scratch<B>,
    /// f32 `[T, 1]`.
    pub(super) d_logit: Scratch<B>,
}

/// 4-byte numbers.
pub(super) struct Scratch<B: Backend> {
    memory: B::Memory,
    dtype: DType,
}

impl<B: Backend> Scratch<B> {
    pub(super) fn read(&self, shape: impl Into<Shape>) -> Result<In<'_, B>> {
        View::new(B::read(&self.memory), self.dtype, 0, shape)
    }

    pub(super) fn write(&mut self, shape: impl Into<Shape>) -> Result<Out<'_, B>> {
        View::new(B::write(&mut self.memory), self.dtype, 0, shape)
    }

    /// As numbers of another format, of no more bytes.
    pub(super) fn read_as(&self, dtype: DType, shape: impl Into<Shape>) -> Result<In<'_, B>> {
        View::new(B::read(&self.memory), dtype, 0, shape)
    }

    pub(super) fn write_as(&mut self, dtype: DType, shape: impl Into<Shape>) -> Result<Out<'_, B>> {
        View::new(B::write(&mut self.memory), dtype, 0, shape)
    }
}

impl<B: Backend> TrainingWorkspace<B> {
    pub(super) fn new(backend: &B, config: &LayerConfig, max_tokens: usize) -> Result<Self, B::Error> {
        let LayerConfig { hidden, intermediate, experts, top_k, .. } = *config;
        let rows = max_tokens.saturating_mul(top_k);
        let total = Cell::new(0usize);
        let memory = |rows: usize, cols: usize| -> Result<B::Memory, B::Error> {
            let bytes = rows.checked_mul(cols).and_then(|n| n.checked_mul(4)).ok_or_else(|| Error::Value {
                operation: "workspace",
                parameter: "max_tokens",
                expected: "as many tokens as the address space has room for",
                actual: max_tokens.to_string(),
            })?;
            total.set(total.get().saturating_add(bytes));
            backend.allocate(bytes)
        };
        let floats = |rows, cols| Ok::<_, B::Error>(Scratch { memory: memory(rows, cols)?, dtype: DType::F32 });
        let permutation = |slots, experts: usize| {
            Ok::<_, B::Error>(PermutationScratch {
                row_slot: memory(slots, 1)?,
                slot_row: memory(slots, 1)?,
                offsets: memory(experts + 1, 1)?,
            })
        };
        let width = config.shared.map_or(0, |shared| shared.intermediate);
        let height = config.shared.map_or(0, |shared| shared.activation.gate_up_rows(shared.intermediate));
        let mut ones = memory(max_tokens, 1)?;
        backend.upload(bytemuck::cast_slice(&vec![1.0f32; max_tokens]), &mut ones)?;
        // without a shared expert its parts are empty
        let shared_tokens = if width > 0 { max_tokens } else { 0 };
        let mut workspace = Self {
            max_tokens,
            bytes: 0,
            permutation: permutation(rows, experts)?,
            identity: permutation(shared_tokens, 1)?,
            zeros: Scratch { memory: memory(shared_tokens, 1)?, dtype: DType::U32 },
            logits: floats(max_tokens, experts)?,
            d_logits: floats(max_tokens, experts)?,
            d_weights: floats(max_tokens, top_k)?,
            n: floats(max_tokens, hidden)?,
            d_n: floats(max_tokens, hidden)?,
            tokens: floats(max_tokens, hidden)?,
            ones: Scratch { memory: ones, dtype: DType::F32 },
            factors: floats(rows, 1)?,
            a: floats(rows, intermediate)?,
            d_a: floats(rows, intermediate)?,
            d_z: floats(rows, config.gate_up_rows())?,
            rows: floats(rows, hidden)?,
            shared: SharedScratch {
                a: floats(shared_tokens, width)?,
                d_a: floats(shared_tokens, width)?,
                d_z: floats(shared_tokens, height)?,
                y: floats(shared_tokens, hidden)?,
                d_y: floats(shared_tokens, hidden)?,
                logit: floats(shared_tokens, 1)?,
                d_logit: floats(shared_tokens, 1)?,
            },
        };
        workspace.bytes = total.get();
        Ok(workspace)
    }

    /// Bytes of its memory.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn check(&self, operation: &'static str, tokens: usize) -> Result<()> {
        if tokens <= self.max_tokens {
            return Ok(());
        }
        Err(Error::Value {
            operation,
            parameter: "x",
            expected: "no more tokens than the workspace was made for",
            actual: format!("{tokens} of {}", self.max_tokens),
        })
    }
}
