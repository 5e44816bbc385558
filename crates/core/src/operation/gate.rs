use crate::backend::{Backend, In, Out};
use crate::config::GateConfig;

/// `logits = softcap(scale * (n . router^T) + bias)` with `n = x`, or `x * rsqrt(mean(x^2) + eps) * norm_weight`.
///
/// Source of the norm: Zhang and Sennrich, arXiv:1910.07467.
pub struct Gate<'a, B: Backend> {
    /// Tokens `[T, H]`.
    pub x: In<'a, B>,
    /// `[E, H]`.
    pub router: In<'a, B>,
    /// `[E]`.
    pub bias: Option<In<'a, B>>,
    /// `[H]`; absent, the norm (if `config.norm` asks for one) has weight one.
    pub norm_weight: Option<In<'a, B>>,
    /// Norm, scale and soft-cap; `feeds_experts` has no meaning here.
    pub config: GateConfig,
    /// The normalised tokens `[T, H]`, for experts that read them; needs `config.norm`.
    pub normed: Option<Out<'a, B>>,
    /// Written: f32 `[T, E]`.
    pub logits: Out<'a, B>,
}

impl<'a, B: Backend> Gate<'a, B> {
    /// The plain product.
    pub fn new(x: In<'a, B>, router: In<'a, B>, logits: Out<'a, B>) -> Self {
        Self { x, router, bias: None, norm_weight: None, config: GateConfig::default(), normed: None, logits }
    }
}
