use crate::backend::{Backend, In, Out};
use crate::config::Activation;
use crate::routing::Permutation;

/// Each row times its expert's gate_up: `p[r] = gate_up[e] x[row] + bias[e]`, and `act(p)` of it if asked for.
pub struct GateUp<'a, B: Backend> {
    /// Tokens `[T, H]` or rows `[R, H]`, as `rows` says.
    pub x: In<'a, B>,
    /// What x holds.
    pub rows: RowSource,
    /// Which rows belong to which expert.
    pub permutation: Permutation<'a, B>,
    /// f32 `[T, K]` or `[R]`: multiplies each row of x before the product, where routing weights act on the input. With
    /// [`RowSource::Tokens`] a row takes the weight of its slot, with [`RowSource::Rows`] the weight of its own number.
    pub input_weights: Option<In<'a, B>>,
    /// `[E, 2I, H]`, gate rows first; `[E, I, H]` for an activation without gate.
    pub matrices: Matrices<'a, B>,
    /// `[E, 2I]` or `[E, I]`.
    pub bias: Option<In<'a, B>>,
    /// The activation; it says whether there is a gate even where it is not applied.
    pub activation: Activation,
    /// What is written.
    pub output: GateUpOutput,
    /// Written: `[R, I]` or `[R, 2I]`; rows past the last expert's are left alone.
    pub out: Out<'a, B>,
}

/// What an operand of rows holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowSource {
    /// A row a token: row r reads token `row_slot[r] / top_k`.
    Tokens {
        /// K.
        top_k: usize,
    },
    /// A row a row, already grouped by expert.
    Rows,
}

/// What gate_up writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateUpOutput {
    /// `act(g) * u`, `[R, I]`.
    Activated,
    /// g then u, `[R, 2I]` (u alone, `[R, I]`, without a gate).
    PreActivation,
}

/// The matrices of all experts.
pub enum Matrices<'a, B: Backend> {
    /// A canonical stack in the backend's memory, read as it lies.
    Stack(In<'a, B>),
    /// What [`Backend::pack`] made. Biases inside it are used; the operand's `bias` must then be absent.
    Packed(&'a B::Experts),
}

impl<B: Backend> Clone for Matrices<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend> Copy for Matrices<'_, B> {}
