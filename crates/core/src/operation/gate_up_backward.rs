use super::{Gradient, RowSource};
use crate::backend::{Backend, In, Out};
use crate::routing::Permutation;

/// The gradients of [`GateUp`](super::GateUp), each optional: for every row r of every expert e,
///
/// ```text
/// d_rows[r]    = d_z[r] . gate_up[e]
/// d_gate_up[e] = sum_r d_z[r]^T (w[r] * x[row(r)])       r over the rows of e
/// d_bias[e]    = sum_r d_z[r]
/// ```
///
/// `d_rows` is the gradient of `w[r] * x[row(r)]`. That of x is [`Combine`](super::Combine) of `d_rows` with the weights;
/// that of the weights is [`CombineBackward`](super::CombineBackward)'s with `d_rows` for the rows and x for `d_out`.
pub struct GateUpBackward<'a, B: Backend> {
    /// The gradient of the pre-activation, `[R, N]`, grouped by expert; N is 2I, gate columns first, or I without gate.
    pub d_z: In<'a, B>,
    /// `[T, H]` or `[R, H]`, as `rows` says, for `d_gate_up`.
    pub x: Option<In<'a, B>>,
    /// What x holds.
    pub rows: RowSource,
    /// Which rows belong to which expert.
    pub permutation: Permutation<'a, B>,
    /// f32 `[T, K]` or `[R]`, as in [`GateUp`](super::GateUp); ones if absent.
    pub input_weights: Option<In<'a, B>>,
    /// The stack `[E, N, H]`.
    pub matrices: In<'a, B>,
    /// Written: `[R, H]`; rows past the last expert's are left alone.
    pub d_rows: Option<Out<'a, B>>,
    /// `[E, N, H]`.
    pub d_gate_up: Option<Gradient<'a, B>>,
    /// `[E, N]`.
    pub d_bias: Option<Gradient<'a, B>>,
}
