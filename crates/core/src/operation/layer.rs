use super::{NextNorm, Residual};
use crate::backend::{Backend, In, Out};
use crate::routing::Routing;

/// One call of a layer: `y[t] = residual[t] + routed_scale * sum_k w[t,k] * Expert_e(x[t]) + shared(x[t])`.
pub struct Forward<'a, B: Backend> {
    /// `[T, H]`.
    pub x: In<'a, B>,
    /// Where the routes come from.
    pub source: Source<'a, B>,
    /// u32 `[T]`, where experts are chosen by token id.
    pub token_ids: Option<In<'a, B>>,
    /// u32 `[N+1]`, ascending, where the layer has a capacity: the tokens of sequence n are `sequences[n] ..
    /// sequences[n+1]`, those before the first belong to it, those behind the last to that. Absent, all are one sequence.
    pub sequences: Option<In<'a, B>>,
    /// Where the router has an MLP: its state, from block to block.
    pub router_state: RouterState<'a, B>,
    /// What the result is added to.
    pub residual: Option<Residual<'a, B>>,
    /// RMSNorm of the finished y.
    pub norm: Option<NextNorm<'a, B>>,
    /// Written if asked for: the routes that were taken.
    pub routes: Option<RoutesOut<'a, B>>,
    /// Written if asked for: u32 `[E]`, slots of each expert that were carried out here, for
    /// [`Statistics`](crate::Statistics).
    pub counts: Option<Out<'a, B>>,
    /// Written: `[T, H]`.
    pub y: Out<'a, B>,
}

impl<'a, B: Backend> Forward<'a, B> {
    /// From x through the layer's own router.
    pub fn new(x: In<'a, B>, y: Out<'a, B>) -> Self {
        Self {
            x,
            source: Source::Router,
            token_ids: None,
            sequences: None,
            router_state: RouterState { previous: None, next: None },
            residual: None,
            norm: None,
            routes: None,
            counts: None,
            y,
        }
    }
}

/// Where routes come from.
pub enum Source<'a, B: Backend> {
    /// The layer's router.
    Router,
    /// Logits `[T, E]` of the caller's; the layer's rule chooses.
    Logits(In<'a, B>),
    /// Routes of the caller's, used as they are.
    Routes(Routing<'a, B>),
}

/// Where the routes that were taken go.
pub struct RoutesOut<'a, B: Backend> {
    /// Written: u32 `[T, K]`.
    pub experts: Out<'a, B>,
    /// Written: f32 `[T, K]`.
    pub weights: Out<'a, B>,
}

/// What the routers of successive blocks hand on, see [`RouterMlp`](crate::config::RouterMlp).
pub struct RouterState<'a, B: Backend> {
    /// f32 `[T, M]`: the state of the block before; absent for the first.
    pub previous: Option<In<'a, B>>,
    /// Written if asked for: f32 `[T, M]`, this block's state.
    pub next: Option<Out<'a, B>>,
}
