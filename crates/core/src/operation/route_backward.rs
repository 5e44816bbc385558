use super::Gradient;
use crate::backend::{Backend, In};
use crate::config::RoutingRule;

/// The gradients of [`Route`](super::Route)'s weights; the selection is a constant.
/// [`route_backward`](fn@crate::reference::route_backward) has every weight rule.
pub struct RouteBackward<'a, B: Backend> {
    /// `[T, E]`.
    pub logits: In<'a, B>,
    /// u32 `[T, K]`: the experts that were chosen. An id that names no expert has no gradient.
    pub experts: In<'a, B>,
    /// The gradient of the weights, f32 `[T, K]`.
    pub d_weights: In<'a, B>,
    /// Score, selection, weight rule.
    pub rule: RoutingRule,
    /// `[E]`, where the weight rule asks for it.
    pub expert_scale: Option<In<'a, B>>,
    /// f32 `[T, E]`.
    pub d_logits: Option<Gradient<'a, B>>,
    /// `[E]`, where the weight rule has such a scale.
    pub d_expert_scale: Option<Gradient<'a, B>>,
}
