use super::Gate;
use crate::backend::{Backend, In, Out};
use crate::config::RoutingRule;

/// Logits to routes: which K experts each token goes to, and with what weights.
pub struct Route<'a, B: Backend> {
    /// `[T, E]`.
    pub logits: In<'a, B>,
    /// How they are chosen and where they are written.
    pub choice: Choice<'a, B>,
}

/// [`Gate`] and [`Route`] in one.
pub struct GateRoute<'a, B: Backend> {
    /// How the logits are made; they are written too.
    pub gate: Gate<'a, B>,
    /// How experts are chosen and where they are written.
    pub choice: Choice<'a, B>,
}

/// How experts are chosen from logits, and where the result goes. K is the width of `experts`.
pub struct Choice<'a, B: Backend> {
    /// Score, selection, weight rule.
    pub rule: RoutingRule,
    /// `[E]`, where the selection asks for it.
    pub correction_bias: Option<In<'a, B>>,
    /// `[E]`, where the weight rule asks for it.
    pub expert_scale: Option<In<'a, B>>,
    /// Where the selection is by token id.
    pub table: Option<TokenTable<'a, B>>,
    /// Written: u32 `[T, K]`, best first, equal keys by expert id; those of a table in its order.
    pub experts: Out<'a, B>,
    /// Written: f32 `[T, K]`.
    pub weights: Out<'a, B>,
    /// Written if asked for: how close the choice was. For top-K selection only.
    pub witness: Option<Witness<'a, B>>,
}

impl<'a, B: Backend> Choice<'a, B> {
    /// A rule without correction bias, scale or table.
    pub fn new(rule: RoutingRule, experts: Out<'a, B>, weights: Out<'a, B>) -> Self {
        Self { rule, correction_bias: None, expert_scale: None, table: None, experts, weights, witness: None }
    }
}

/// Experts by token id.
pub struct TokenTable<'a, B: Backend> {
    /// u32 `[T]`, each below V.
    pub token_ids: In<'a, B>,
    /// u32 `[V, K]`.
    pub experts: In<'a, B>,
}

/// The K-th and the (K+1)-th key of each token and their experts: tells a near-tie from a mistake.
/// Where K = E the second is `-inf` and `NO_EXPERT`.
pub struct Witness<'a, B: Backend> {
    /// Written: f32 `[T, 2]`.
    pub keys: Out<'a, B>,
    /// Written: u32 `[T, 2]`.
    pub experts: Out<'a, B>,
}

/// `w[t,k] = p[t,id] / sum_j p[t,id_j] * scale[id]` for ids chosen elsewhere; a zero sum gives zero weights, an id out
/// of range raises the status and gets weight zero.
pub struct GatherWeights<'a, B: Backend> {
    /// `[T, E]`.
    pub scores: In<'a, B>,
    /// u32 `[T, K]`.
    pub experts: In<'a, B>,
    /// `[E]`.
    pub expert_scale: Option<In<'a, B>>,
    /// Written: f32 `[T, K]`.
    pub weights: Out<'a, B>,
}
