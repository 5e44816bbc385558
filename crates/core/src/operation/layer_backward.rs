use super::{Gradient, NextNorm, Residual, RoutesOut, Source};
use crate::backend::{Backend, In, Out};
use crate::routing::Routing;

/// The weights of a layer in a backend's memory, canonical, where an optimizer updates them: read as they lie in every
/// call, so that a step of training costs no copy and no packing.
pub struct LayerParameters<'a, B: Backend> {
    /// `[E, H]`; without it the layer runs from given logits or given routes.
    pub router: Option<In<'a, B>>,
    /// `[E]`, added to the logits.
    pub router_bias: Option<In<'a, B>>,
    /// `[H]`, weight of the RMSNorm before the router.
    pub router_norm: Option<In<'a, B>>,
    /// `[E - A]`, A experts being always chosen, where the selection asks for it. It has no gradient.
    pub correction_bias: Option<In<'a, B>>,
    /// `[E]`, where the weight rule asks for it.
    pub expert_scale: Option<In<'a, B>>,
    /// Experts by token id, u32 `[V, K]`.
    pub table: Option<In<'a, B>>,
    /// `[E, 2I, H]`, gate rows first; `[E, I, H]` without gate.
    pub gate_up: In<'a, B>,
    /// `[E, 2I]` or `[E, I]`.
    pub gate_up_bias: Option<In<'a, B>>,
    /// `[E, H, I]`.
    pub down: In<'a, B>,
    /// `[E, H]`.
    pub down_bias: Option<In<'a, B>>,
    /// The expert that every token goes to, where the configuration has one.
    pub shared: Option<SharedParameters<'a, B>>,
}

impl<'a, B: Backend> LayerParameters<'a, B> {
    /// A router and experts, nothing else.
    pub fn new(router: In<'a, B>, gate_up: In<'a, B>, down: In<'a, B>) -> Self {
        Self {
            router: Some(router),
            router_bias: None,
            router_norm: None,
            correction_bias: None,
            expert_scale: None,
            table: None,
            gate_up,
            gate_up_bias: None,
            down,
            down_bias: None,
            shared: None,
        }
    }
}

/// The weights of the shared expert.
pub struct SharedParameters<'a, B: Backend> {
    /// `[2S, H]`, gate rows first; `[S, H]` without gate.
    pub gate_up: In<'a, B>,
    /// `[2S]` or `[S]`.
    pub gate_up_bias: Option<In<'a, B>>,
    /// `[H, S]`.
    pub down: In<'a, B>,
    /// `[H]`.
    pub down_bias: Option<In<'a, B>>,
    /// `[H]`, where it is gated.
    pub gate: Option<In<'a, B>>,
}

/// One call of a layer that is trained: [`Forward`](super::Forward) that keeps what its backward pass needs.
pub struct ForwardSaving<'a, 'p, B: Backend> {
    /// `[T, H]`; the backward pass reads it again.
    pub x: In<'a, B>,
    /// The weights.
    pub parameters: &'a LayerParameters<'p, B>,
    /// Where the routes come from.
    pub source: Source<'a, B>,
    /// u32 `[T]`, where experts are chosen by token id; else absent.
    pub token_ids: Option<In<'a, B>>,
    /// What the result is added to.
    pub residual: Option<Residual<'a, B>>,
    /// RMSNorm of the finished y.
    pub norm: Option<NextNorm<'a, B>>,
    /// Written: `[R, 2I]`, or `[R, I]` without gate, grouped by expert: what the activation reads.
    pub pre_activation: Out<'a, B>,
    /// Written: `[T, 2S]` or `[T, S]`, where there is a shared expert.
    pub shared_pre_activation: Option<Out<'a, B>>,
    /// Written: the routes that were taken; absent where the source is routes, which are read again then.
    pub routes: Option<RoutesOut<'a, B>>,
    /// Written: `[T, H]`.
    pub y: Out<'a, B>,
}

/// The gradients of a [`ForwardSaving`].
pub struct LayerBackward<'a, 'p, B: Backend> {
    /// The gradient of y, `[T, H]`. It is also the residual's. That of a next norm
    /// ([`NormBackward`](super::NormBackward)) is part of it.
    pub d_y: In<'a, B>,
    /// More of the logits' gradient, f32 `[T, E]`: that of losses that read them; not where the routes were the caller's.
    pub d_logits: Option<In<'a, B>>,
    /// What the forward pass read.
    pub x: In<'a, B>,
    /// The weights, as the forward pass read them.
    pub parameters: &'a LayerParameters<'p, B>,
    /// Where the routes came from.
    pub source: RoutesFrom<'a, B>,
    /// The routes that were taken.
    pub routing: Routing<'a, B>,
    /// What the forward pass wrote.
    pub pre_activation: In<'a, B>,
    /// Likewise, where there is a shared expert.
    pub shared_pre_activation: Option<In<'a, B>>,
    /// Where the gradients go.
    pub gradients: LayerGradients<'a, B>,
}

/// Where the routes of a forward pass came from, for its backward pass.
pub enum RoutesFrom<'a, B: Backend> {
    /// The layer's router: its logits are made once more.
    Router,
    /// Logits `[T, E]` of the caller's.
    Logits(In<'a, B>),
    /// The caller: the routing weights are the end.
    Routes,
}

/// Where the gradients of a layer go. Each is optional and lies as its operand does; one whose operand is absent, or is not
/// read since the routes came from elsewhere, must be absent too.
pub struct LayerGradients<'a, B: Backend> {
    /// `[T, H]`.
    pub x: Option<Gradient<'a, B>>,
    /// Of the routing weights, f32 `[T, K]`.
    pub weights: Option<Gradient<'a, B>>,
    /// f32 `[T, E]`, the sum with `d_logits`; not where the routes were the caller's.
    pub logits: Option<Gradient<'a, B>>,
    /// `[E, H]`; where the routes are the router's, as the next one.
    pub router: Option<Gradient<'a, B>>,
    /// `[E]`.
    pub router_bias: Option<Gradient<'a, B>>,
    /// `[H]`; where the routes are the router's, or the experts read the norm.
    pub router_norm: Option<Gradient<'a, B>>,
    /// `[E]`; not where the routes were the caller's.
    pub expert_scale: Option<Gradient<'a, B>>,
    /// `[E, 2I, H]` or `[E, I, H]`.
    pub gate_up: Option<Gradient<'a, B>>,
    /// `[E, 2I]` or `[E, I]`.
    pub gate_up_bias: Option<Gradient<'a, B>>,
    /// `[E, H, I]`.
    pub down: Option<Gradient<'a, B>>,
    /// `[E, H]`.
    pub down_bias: Option<Gradient<'a, B>>,
    /// Of the shared expert.
    pub shared: SharedGradients<'a, B>,
}

/// Where the gradients of the shared expert go.
pub struct SharedGradients<'a, B: Backend> {
    /// `[2S, H]` or `[S, H]`.
    pub gate_up: Option<Gradient<'a, B>>,
    /// `[2S]` or `[S]`.
    pub gate_up_bias: Option<Gradient<'a, B>>,
    /// `[H, S]`.
    pub down: Option<Gradient<'a, B>>,
    /// `[H]`.
    pub down_bias: Option<Gradient<'a, B>>,
    /// `[H]`.
    pub gate: Option<Gradient<'a, B>>,
}

impl<B: Backend> Default for LayerGradients<'_, B> {
    fn default() -> Self {
        Self {
            x: None,
            weights: None,
            logits: None,
            router: None,
            router_bias: None,
            router_norm: None,
            expert_scale: None,
            gate_up: None,
            gate_up_bias: None,
            down: None,
            down_bias: None,
            shared: SharedGradients::default(),
        }
    }
}

impl<B: Backend> Default for SharedGradients<'_, B> {
    fn default() -> Self {
        Self { gate_up: None, gate_up_bias: None, down: None, down_bias: None, gate: None }
    }
}
