//! The whole layer: the stages in order.

use super::{
    Combine, Combined, Down, Gate, GateUp, Gather, Linear, Norm, Permutation, Permute, PreActivation, Route, Routes,
    Shared, SharedGate, Table, activation, combine, down, gate, gate_up, linear, permute, rms_norm, route,
};
use crate::config::{LayerConfig, WeightOn};
use crate::{Statistics, Status};

/// The weights of a layer. An absent bias is zeros, an absent scale or norm weight is ones.
#[derive(Clone, Copy, Debug, Default)]
pub struct Layer<'a> {
    /// `[E, H]`. Read by [`forward`] alone.
    pub router: &'a [f64],
    /// `[E]`.
    pub router_bias: Option<&'a [f64]>,
    /// `[H]`, the weight of the norm before the router.
    pub router_norm: Option<&'a [f64]>,
    /// `[E]`, added to the keys of the choice.
    pub correction_bias: Option<&'a [f64]>,
    /// `[E]`, multiplies the weights.
    pub expert_scale: Option<&'a [f64]>,
    /// `[V, K]`, experts by token id.
    pub table: Option<&'a [u32]>,
    /// `[E, 2I, H]`, gate rows first; `[E, I, H]` without gate.
    pub gate_up: &'a [f64],
    /// `[E, 2I]` or `[E, I]`.
    pub gate_up_bias: Option<&'a [f64]>,
    /// `[E, H, I]`.
    pub down: &'a [f64],
    /// `[E, H]`.
    pub down_bias: Option<&'a [f64]>,
    /// The expert that every token goes to; used if the configuration has one.
    pub shared: Option<SharedExpert<'a>>,
}

/// The weights of the shared expert.
#[derive(Clone, Copy, Debug)]
pub struct SharedExpert<'a> {
    /// `[2S, H]`, gate rows first; `[S, H]` without gate.
    pub gate_up: &'a [f64],
    /// `[2S]` or `[S]`, or absent for zeros.
    pub gate_up_bias: Option<&'a [f64]>,
    /// `[H, S]`.
    pub down: &'a [f64],
    /// `[H]`, or absent for zeros.
    pub down_bias: Option<&'a [f64]>,
    /// `[H]`; used if the configuration says `gated`.
    pub gate: Option<&'a [f64]>,
}

/// What goes into a layer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Input<'a> {
    /// `[T, H]`.
    pub x: &'a [f64],
    /// `[T]`, for a table of experts.
    pub token_ids: Option<&'a [u32]>,
    /// `[T, H]`, added to the result.
    pub residual: Option<&'a [f64]>,
    /// The norm that follows.
    pub norm: Option<Norm<'a>>,
    /// T.
    pub tokens: usize,
}

/// What comes out of a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// `[T, H]`.
    pub y: Vec<f64>,
    /// `[T, H]`, if a norm was asked for.
    pub normed: Option<Vec<f64>>,
    /// `[T, E]`; empty where the routes were given.
    pub logits: Vec<f64>,
    /// The routes taken. Given routes are returned as they came, without a witness.
    pub routes: Routes,
    /// The slots by expert.
    pub permutation: Permutation,
    /// How the slots spread over the experts.
    pub statistics: Statistics,
    /// What was noticed, anywhere.
    pub status: Status,
}

/// The layer, from x:
///
/// ```text
/// n, logits         = gate(x)
/// experts, weights  = route(logits)
/// rows              = permute(experts)
/// a                 = activation(gate_up(s[rows]))            s = n if the gate's norm feeds the experts, else x
/// y                 = residual + routed_scale * sum_k w[t,k] * down(a)[t,k] + shared_scale * shared_gate * Shared(s)
/// normed            = rmsnorm(y)
/// ```
///
/// The shared expert and its gate read `s` like the routed experts; `shared_gate = sigmoid(gate . s)` if gated, else 1.
/// With [`WeightOn::Input`] a weight multiplies the expert's input, and the sum over the slots is plain.
pub fn forward(config: &LayerConfig, layer: &Layer<'_>, input: &Input<'_>) -> Output {
    let gated = gate(&Gate {
        x: input.x,
        router: layer.router,
        bias: layer.router_bias,
        norm_weight: layer.router_norm,
        config: config.gate,
        tokens: input.tokens,
        hidden: config.hidden,
        experts: config.experts,
    });
    forward_from_logits(config, layer, input, &gated.logits)
}

/// The layer, from logits that were made elsewhere: [`forward`] without the router's product, scale, bias and softcap.
/// The experts still read the normalised token where the configuration says so.
///
/// - `logits`: `[T, E]`
pub fn forward_from_logits(config: &LayerConfig, layer: &Layer<'_>, input: &Input<'_>, logits: &[f64]) -> Output {
    let table = match (layer.table, input.token_ids) {
        (Some(experts), Some(token_ids)) => Some(Table { experts, token_ids }),
        _ => None,
    };
    let routes = route(
        logits,
        &Route {
            rule: config.routing,
            correction_bias: layer.correction_bias,
            expert_scale: layer.expert_scale,
            table,
            tokens: input.tokens,
            experts: config.experts,
            top_k: config.top_k,
        },
    );
    Output { logits: logits.to_vec(), ..experts(config, layer, input, routes) }
}

/// The layer, from routes that were made elsewhere. The weights are used as they are. A slot with id
/// [`NO_EXPERT`](crate::NO_EXPERT) or `>= E` contributes nothing; the latter raises
/// [`Status::EXPERT_OUT_OF_RANGE`].
///
/// - `ids`, `weights`: `[T, K]`
pub fn forward_from_routes(
    config: &LayerConfig,
    layer: &Layer<'_>,
    input: &Input<'_>,
    ids: &[u32],
    weights: &[f64],
) -> Output {
    let routes = Routes { experts: ids.to_vec(), weights: weights.to_vec(), witness: Vec::new(), status: Status::OK };
    experts(config, layer, input, routes)
}

/// Everything after the routes.
fn experts(config: &LayerConfig, layer: &Layer<'_>, input: &Input<'_>, routes: Routes) -> Output {
    let (hidden, intermediate, top_k) = (config.hidden, config.intermediate, config.top_k);
    let normed = match config.gate.norm {
        Some(norm) if norm.feeds_experts => Some(rms_norm(input.x, layer.router_norm, f64::from(norm.eps), hidden)),
        _ => None,
    };
    let x = normed.as_deref().unwrap_or(input.x);
    let rows = input.tokens * top_k;
    let (input_weights, output_weights) = match config.weight_on {
        WeightOn::Input => (Some(&routes.weights[..]), None),
        WeightOn::Output => (None, Some(&routes.weights[..])),
    };

    let permutation = permute(&Permute { ids: &routes.experts, experts: config.experts, local: 0..config.experts });
    let pre_activation = gate_up(&GateUp {
        x,
        gather: Some(Gather { row_slot: &permutation.row_slot, top_k }),
        input_weights,
        offsets: &permutation.offsets,
        gate_up: layer.gate_up,
        bias: layer.gate_up_bias,
        rows,
        hidden,
        outputs: config.gate_up_rows(),
    });
    let a = activation(config.activation, PreActivation::Halves(&pre_activation), rows, intermediate);
    let y = down(&Down {
        a: &a,
        offsets: &permutation.offsets,
        down: layer.down,
        bias: layer.down_bias,
        rows,
        hidden,
        intermediate,
    });
    let shared = shared_expert(config, layer, x, input.tokens);
    let Combined { out, normed } = combine(&Combine {
        y: &y,
        slot_row: Some(&permutation.slot_row),
        weights: output_weights,
        routed_scale: f64::from(config.routed_scale),
        shared: shared.as_ref().map(SharedRows::part),
        residual: input.residual,
        norm: input.norm,
        tokens: input.tokens,
        hidden,
        top_k,
    });
    Output {
        y: out,
        normed,
        logits: Vec::new(),
        statistics: Statistics::from_counts(&permutation.counts()),
        status: routes.status | permutation.status,
        routes,
        permutation,
    }
}

/// What the shared expert made of the tokens.
struct SharedRows {
    y: Vec<f64>,
    gate_logits: Option<Vec<f64>>,
    scale: f64,
}

impl SharedRows {
    fn part(&self) -> Shared<'_> {
        let gate = self.gate_logits.as_deref().map_or(SharedGate::None, SharedGate::Logit);
        Shared { y: &self.y, gate, scale: self.scale }
    }
}

fn shared_expert(config: &LayerConfig, layer: &Layer<'_>, x: &[f64], tokens: usize) -> Option<SharedRows> {
    let (shared, weights) = (config.shared?, layer.shared?);
    let (rows, hidden, intermediate) = (tokens, config.hidden, shared.intermediate);
    let outputs = shared.activation.gate_up_rows(intermediate);
    let (weight, bias) = (weights.gate_up, weights.gate_up_bias);
    let pre_activation = linear(&Linear { x, weight, bias, rows, inputs: hidden, outputs });
    let a = activation(shared.activation, PreActivation::Halves(&pre_activation), rows, intermediate);
    let (weight, bias) = (weights.down, weights.down_bias);
    let down = Linear { x: &a, weight, bias, rows, inputs: intermediate, outputs: hidden };
    let gate = weights.gate.filter(|_| shared.gated);
    Some(SharedRows {
        y: linear(&down),
        gate_logits: gate.map(|weight| linear(&Linear { x, weight, bias: None, rows, inputs: hidden, outputs: 1 })),
        scale: f64::from(shared.scale),
    })
}
