use crate::backend::{Backend, In, Out};

/// `out[t] = residual[t] + routed_scale * sum_k weights[t,k] * y[t,k] + shared`, and the next norm of it.
///
/// The sum runs in slot order. A slot without a row contributes nothing.
pub struct Combine<'a, B: Backend> {
    /// The experts' outputs.
    pub rows: SlotRows<'a, B>,
    /// f32 `[T, K]`; absent where the weights acted on the input: every slot counts once.
    pub weights: Option<In<'a, B>>,
    /// Slots whose part is the token itself.
    pub copies: Option<Copies<'a, B>>,
    /// Factor on the sum over k.
    pub routed_scale: f32,
    /// The shared expert's output.
    pub shared: Option<Shared<'a, B>>,
    /// What the result is added to.
    pub residual: Option<Residual<'a, B>>,
    /// RMSNorm of the finished `out`, in the same launch.
    pub norm: Option<NextNorm<'a, B>>,
    /// Written: `[T, H]`.
    pub out: Out<'a, B>,
}

impl<'a, B: Backend> Combine<'a, B> {
    /// The weighted sum alone.
    pub fn new(rows: SlotRows<'a, B>, weights: In<'a, B>, out: Out<'a, B>) -> Self {
        Self {
            rows,
            weights: Some(weights),
            copies: None,
            routed_scale: 1.0,
            shared: None,
            residual: None,
            norm: None,
            out,
        }
    }

    /// A residual plus no rows at all: a copy, or a norm by itself. `nothing` is `[0, H]`; `out` gets, or has, the
    /// residual.
    pub fn residual_alone(
        nothing: In<'a, B>,
        of: Residual<'a, B>,
        norm: Option<NextNorm<'a, B>>,
        out: Out<'a, B>,
    ) -> Self {
        Self {
            rows: SlotRows::Slots(nothing),
            weights: None,
            copies: None,
            routed_scale: 1.0,
            shared: None,
            residual: Some(of),
            norm,
            out,
        }
    }
}

/// The outputs of the experts, a row a slot.
pub enum SlotRows<'a, B: Backend> {
    /// `[T, K, H]`: slot r is row r.
    Slots(In<'a, B>),
    /// Grouped by expert: slot r is row `slot_row[r]`.
    Permuted {
        /// `[R, H]`.
        y: In<'a, B>,
        /// u32 `[R]`.
        slot_row: In<'a, B>,
    },
}

/// Slots of experts without weights: where `experts[t,k]` lies in `first .. end`, `x[t]` stands in place of `y[t,k]`,
/// whatever its row.
pub struct Copies<'a, B: Backend> {
    /// `[T, H]`.
    pub x: In<'a, B>,
    /// u32 `[T, K]`.
    pub experts: In<'a, B>,
    /// The first of them: E.
    pub first: usize,
    /// One past the last.
    pub end: usize,
}

/// `scale * s[t] * y[t]`.
pub struct Shared<'a, B: Backend> {
    /// `[T, H]`.
    pub y: In<'a, B>,
    /// `[T]`: s itself. At most one of `factor` and `logit`; s is 1 without either.
    pub factor: Option<In<'a, B>>,
    /// `[T]`: s is its sigmoid.
    pub logit: Option<In<'a, B>>,
    /// A constant factor.
    pub scale: f32,
}

impl<'a, B: Backend> Shared<'a, B> {
    /// `y[t]` as it is.
    pub fn new(y: In<'a, B>) -> Self {
        Self { y, factor: None, logit: None, scale: 1.0 }
    }
}

/// What a result is added to.
pub enum Residual<'a, B: Backend> {
    /// Another buffer, `[T, H]`.
    Of(In<'a, B>),
    /// What `out` holds already.
    InPlace,
}

/// `normed[t] = out[t] * rsqrt(mean(out[t]^2) + eps) * weight`, of `out` before it is rounded.
pub struct NextNorm<'a, B: Backend> {
    /// `[H]`; ones if absent.
    pub weight: Option<In<'a, B>>,
    /// Added to the mean square.
    pub eps: f32,
    /// Written: `[T, H]`.
    pub out: Out<'a, B>,
}
