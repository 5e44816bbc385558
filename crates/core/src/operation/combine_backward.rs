use super::{Gradient, SlotRows};
use crate::backend::{Backend, In, Out};

/// The gradients of [`Combine`](super::Combine): of the experts' rows, of the weights, of the shared expert's part. Each
/// is optional. The residual's gradient is `d_out` itself; the next norm's is [`NormBackward`](super::NormBackward)'s and
/// belongs into `d_out`.
pub struct CombineBackward<'a, B: Backend> {
    /// The gradient of the result, `[T, H]`.
    pub d_out: In<'a, B>,
    /// K.
    pub top_k: usize,
    /// f32 `[T, K]`, for `d_rows`; absent where the weights acted on the input.
    pub weights: Option<In<'a, B>>,
    /// Factor on the sum over k.
    pub routed_scale: f32,
    /// `d_y[t,k] = routed_scale * weights[t,k] * d_out[t]`.
    pub d_rows: Option<RowsGradient<'a, B>>,
    /// `d_w[t,k] = routed_scale * sum_h y[t,k,h] * d_out[t,h]`.
    pub d_weights: Option<WeightsGradient<'a, B>>,
    /// The shared expert's part.
    pub shared: Option<SharedBackward<'a, B>>,
}

impl<'a, B: Backend> CombineBackward<'a, B> {
    /// Of nothing yet.
    pub fn new(d_out: In<'a, B>, top_k: usize) -> Self {
        Self { d_out, top_k, weights: None, routed_scale: 1.0, d_rows: None, d_weights: None, shared: None }
    }
}

/// Where the gradients of the experts' rows go.
pub enum RowsGradient<'a, B: Backend> {
    /// Written: `[T, K, H]`.
    Slots(Out<'a, B>),
    /// Grouped by expert.
    Permuted {
        /// Written: `[R, H]`; rows that no slot has are left alone.
        d_y: Out<'a, B>,
        /// u32 `[R]`.
        slot_row: In<'a, B>,
    },
}

/// The gradient of the weights.
pub struct WeightsGradient<'a, B: Backend> {
    /// What it is made from.
    pub from: WeightsFrom<'a, B>,
    /// f32 `[T, K]`; 0 where a slot has no row.
    pub out: Gradient<'a, B>,
}

/// What the gradient of the weights is made from.
pub enum WeightsFrom<'a, B: Backend> {
    /// The experts' outputs.
    Rows(SlotRows<'a, B>),
    /// What went into down and its gradient, so that the outputs need not be kept:
    /// `d_w[t,k] = routed_scale * (sum_i a[r,i] * d_a[r,i] + sum_h bias[e,h] * d_out[t,h])`, `r = slot_row[t*K + k]`.
    Intermediate {
        /// `[R, I]`.
        a: In<'a, B>,
        /// `[R, I]`: its gradient where every row has weight one and no scale, `d_out[t] . down[e]`.
        d_a: In<'a, B>,
        /// u32 `[R]`.
        slot_row: In<'a, B>,
        /// The bias of down.
        bias: Option<DownBias<'a, B>>,
    },
}

/// The bias of down, which is part of every output.
pub struct DownBias<'a, B: Backend> {
    /// `[E, H]`.
    pub bias: In<'a, B>,
    /// u32 `[T, K]`: the expert of a slot.
    pub experts: In<'a, B>,
}

/// The gradients of [`Shared`](super::Shared): `d_y[t] = scale * s[t] * d_out[t]`,
/// `d_s[t] = scale * sum_h y[t,h] * d_out[t,h]`, times `s * (1 - s)` for a logit.
pub struct SharedBackward<'a, B: Backend> {
    /// `[T, H]`, for `d_gate`.
    pub y: Option<In<'a, B>>,
    /// `[T]`: s itself. At most one of `factor` and `logit`.
    pub factor: Option<In<'a, B>>,
    /// `[T]`: s is its sigmoid.
    pub logit: Option<In<'a, B>>,
    /// A constant factor.
    pub scale: f32,
    /// Written: `[T, H]`.
    pub d_y: Option<Out<'a, B>>,
    /// f32 `[T]`: of the factor, or of the logit.
    pub d_gate: Option<Gradient<'a, B>>,
}
