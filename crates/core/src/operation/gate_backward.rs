use super::Gradient;
use crate::backend::{Backend, In};

/// The gradients of [`Gate`](super::Gate)'s product, each optional: with `d_l = d_logits`, times `1 - (logits / c)^2` where
/// there is a soft-cap c,
///
/// ```text
/// d_n[t]      = scale * d_l[t] . router
/// d_router[e] = scale * sum_t d_l[t,e] * n[t]
/// d_bias[e]   = sum_t d_l[t,e]
/// ```
///
/// n is what the product read: x, or its norm, whose gradient [`NormBackward`] takes on to x. With E = 1 this is the
/// gradient of any product with a vector, such as the shared expert's gate.
pub struct GateBackward<'a, B: Backend> {
    /// The gradient of the logits, f32 `[T, E]`.
    pub d_logits: In<'a, B>,
    /// The logits, f32 `[T, E]`, where there is a soft-cap.
    pub logits: Option<In<'a, B>>,
    /// c of the soft-cap.
    pub softcap: Option<f32>,
    /// Factor on the product.
    pub scale: f32,
    /// n, `[T, H]`, for `d_router`.
    pub n: Option<In<'a, B>>,
    /// `[E, H]`.
    pub router: In<'a, B>,
    /// `[T, H]`.
    pub d_n: Option<Gradient<'a, B>>,
    /// `[E, H]`.
    pub d_router: Option<Gradient<'a, B>>,
    /// `[E]`.
    pub d_bias: Option<Gradient<'a, B>>,
}

/// The gradients of `n = x * rsqrt(mean(x^2) + eps) * weight`, each optional;
/// [`rms_norm_backward`](crate::reference::rms_norm_backward) has them.
pub struct NormBackward<'a, B: Backend> {
    /// `[T, H]`.
    pub x: In<'a, B>,
    /// `[H]`; ones if absent.
    pub weight: Option<In<'a, B>>,
    /// Added to the mean square.
    pub eps: f32,
    /// The gradient of n, `[T, H]`.
    pub d_n: In<'a, B>,
    /// `[T, H]`.
    pub d_x: Option<Gradient<'a, B>>,
    /// `[H]`.
    pub d_weight: Option<Gradient<'a, B>>,
}
