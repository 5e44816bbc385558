use super::{Gradient, RowSource, RowWeights};
use crate::backend::{Backend, In, Out};
use crate::routing::Permutation;

/// The gradients of [`Down`](super::Down), each optional: with `d_y[r] = w[r] * d_out[row(r)]` for every row r of every
/// expert e,
///
/// ```text
/// d_a[r]    = d_y[r] . down[e]
/// d_down[e] = sum_r d_y[r]^T a[r]           r over the rows of e
/// d_bias[e] = sum_r d_y[r]
/// ```
pub struct DownBackward<'a, B: Backend> {
    /// `[T, H]` or `[R, H]`, as `rows` says.
    pub d_out: In<'a, B>,
    /// What `d_out` holds: with [`RowSource::Tokens`] no row is ever copied.
    pub rows: RowSource,
    /// Which rows belong to which expert.
    pub permutation: Permutation<'a, B>,
    /// w; ones if absent. Its `row_slot` must be absent: with [`RowSource::Tokens`] a row takes the weight of its slot,
    /// with [`RowSource::Rows`] that of its own number.
    pub row_weights: Option<RowWeights<'a, B>>,
    /// `[R, I]`, grouped by expert, for `d_down`.
    pub a: Option<In<'a, B>>,
    /// The stack `[E, H, I]`.
    pub matrices: In<'a, B>,
    /// Written: `[R, I]`; rows past the last expert's are left alone.
    pub d_a: Option<Out<'a, B>>,
    /// `[E, H, I]`.
    pub d_down: Option<Gradient<'a, B>>,
    /// `[E, H]`.
    pub d_bias: Option<Gradient<'a, B>>,
}
