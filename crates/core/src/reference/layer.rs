//! The whole layer: the stages in order.

use super::around::{self, RoutedSum};
use super::{
    Combine, Copies, Down, DropOverflow, Gate, GateUp, Gather, Latent, Norm, NormVectors, Permutation, Permute,
    PreActivation, Route, RouterMlp, Routes, SharedExpert, Table, activation, combine, down, drop_overflow, gate,
    gate_up, permute, rms_norm, route,
};
use crate::config::{Capacity, CapacityOrder, LayerConfig, WeightOn, ZeroOutput};
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
    /// The projections around the experts; used if the configuration has them.
    pub latent: Option<Latent<'a>>,
    /// The weights of the norms.
    pub norms: NormVectors<'a>,
    /// What comes before the router's matrix; used if the configuration has it.
    pub router_mlp: Option<RouterMlp<'a>>,
}

/// What goes into a layer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Input<'a> {
    /// `[T, H]`.
    pub x: &'a [f64],
    /// `[T]`, for a table of experts.
    pub token_ids: Option<&'a [u32]>,
    /// `[N + 1]`, for a capacity: where sequences begin.
    pub sequences: Option<&'a [u32]>,
    /// `[T, M]`: the state of the router before this one.
    pub router_state: Option<&'a [f64]>,
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
    /// `[T, M]`: the state of the router, where it has an MLP and was asked.
    pub router_state: Option<Vec<f64>>,
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
/// n, logits         = gate(router_mlp(x))
/// experts, weights  = route(logits), without what overflows the capacity
/// rows              = permute(experts)
/// read              = n if the gate's norm feeds the experts, else experts_in(latent_down . x)
/// a                 = activation(gate_up(read[rows]))
/// sum               = routed_scale * sum_k w[t,k] * expert_out(down(a)[t,k])                    copies: w[t,k] * read[t]
/// together          = routed_out(latent_up . sum) + shared_scale * shared_gate * shared_out(Shared(shared_in(s)))
/// y                 = residual + out(together)
/// normed            = rmsnorm(y)
/// ```
///
/// Parts that the configuration has not are left out; `s = n` if the gate's norm feeds the experts, else x, which the shared
/// expert's gate reads too: `shared_gate = sigmoid(gate . s)` if gated, else 1.
/// With [`WeightOn::Input`] a weight multiplies the expert's input, and the sum over the slots is plain.
pub fn forward(config: &LayerConfig, layer: &Layer<'_>, input: &Input<'_>) -> Output {
    let router_state = around::router_state(config, layer, input);
    let hidden_layers = router_state.as_ref().map(|state| around::router_hidden(config, layer, state));
    let gated = gate(&Gate {
        x: hidden_layers.as_deref().unwrap_or(input.x),
        router: layer.router,
        bias: layer.router_bias,
        norm_weight: layer.router_norm,
        config: config.gate,
        tokens: input.tokens,
        hidden: config.router_width(),
        experts: config.choices(),
    });
    Output { router_state, ..forward_from_logits(config, layer, input, &gated.logits) }
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
    let mut routes = route(
        logits,
        &Route {
            rule: config.routing,
            correction_bias: layer.correction_bias,
            expert_scale: layer.expert_scale,
            table,
            tokens: input.tokens,
            experts: config.choices(),
            top_k: config.top_k,
        },
    );
    if let Some(capacity) = config.capacity {
        let importance = (capacity.order == CapacityOrder::Score).then(|| importance(config, logits, input.tokens));
        let choices = config.choices();
        let (experts, weights) = drop_overflow(&DropOverflow {
            capacity,
            ids: &routes.experts,
            weights: &routes.weights,
            slot_row: &permute(&Permute { ids: &routes.experts, experts: choices, local: 0..choices }).slot_row,
            importance: importance.as_deref(),
            sequences: input.sequences,
            experts: choices,
            tokens: input.tokens,
            top_k: config.top_k,
        });
        routes = Routes { experts, weights, ..routes };
    }
    Output { logits: logits.to_vec(), ..experts(config, layer, input, routes) }
}

/// The largest softmax of each token's logits, `[T]`.
fn importance(config: &LayerConfig, logits: &[f64], tokens: usize) -> Vec<f64> {
    let rule = Capacity::importance();
    let (experts, top_k) = (config.choices(), 1);
    route(logits, &Route { rule, correction_bias: None, expert_scale: None, table: None, tokens, experts, top_k })
        .weights
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
    let (width, intermediate, top_k) = (config.expert_width(), config.intermediate, config.top_k);
    let normed = match config.gate.norm {
        Some(norm) if norm.feeds_experts => {
            Some(rms_norm(input.x, layer.router_norm, f64::from(norm.eps), config.hidden))
        }
        _ => None,
    };
    let x = normed.as_deref().unwrap_or(input.x);
    let read = around::expert_input(config, layer, x);
    let rows = input.tokens * top_k;
    let (input_weights, output_weights) = match config.weight_on {
        WeightOn::Input => (Some(&routes.weights[..]), None),
        WeightOn::Output => (None, Some(&routes.weights[..])),
    };

    let choices = config.choices();
    let permutation = permute(&Permute { ids: &routes.experts, experts: choices, local: 0..config.experts });
    let pre_activation = gate_up(&GateUp {
        x: &read,
        gather: Some(Gather { row_slot: &permutation.row_slot, top_k }),
        input_weights,
        offsets: &permutation.offsets[..=config.experts],
        gate_up: layer.gate_up,
        bias: layer.gate_up_bias,
        rows,
        hidden: width,
        outputs: config.gate_up_rows(),
    });
    let a = activation(config.activation, PreActivation::Halves(&pre_activation), rows, intermediate);
    let y = down(&Down {
        a: &a,
        offsets: &permutation.offsets[..=config.experts],
        down: layer.down,
        bias: layer.down_bias,
        rows,
        hidden: width,
        intermediate,
    });
    let y = around::normed(config.norms.expert_out, layer.norms.expert_out, y, width);
    let copy = config.zero_experts.filter(|zero| zero.output == ZeroOutput::Copy);
    let copies = copy.map(|_| Copies { x: &read, ids: &routes.experts, first: config.experts, end: choices });
    let sum = combine(&Combine {
        y: &y,
        slot_row: Some(&permutation.slot_row),
        weights: output_weights,
        copies,
        routed_scale: f64::from(config.routed_scale),
        shared: None,
        residual: None,
        norm: None,
        tokens: input.tokens,
        hidden: width,
        top_k,
    });
    let routed = RoutedSum(sum.out);
    let (y, normed) = routed.finish(config, layer, x, input);
    let counts = permutation.counts();
    Output {
        y,
        normed,
        logits: Vec::new(),
        router_state: None,
        statistics: Statistics::from_counts(&counts[..config.experts]),
        status: routes.status | permutation.status,
        routes,
        permutation,
    }
}
