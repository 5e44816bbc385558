//! The whole layer backward: the stages in reverse order.

use super::norm_backward::{NormBackward, rms_norm_backward};
use super::{
    DownBackward, DownBias, GateBackward, GateUp, GateUpBackward, Gather, Input, Layer, Linear, LinearBackward, Output,
    Permute, PreActivation, RouteBackward, SharedExpert, WeightsBackward, activation, activation_backward,
    down_backward, forward, forward_from_logits, forward_from_routes, gate, gate_backward, gate_up, gate_up_backward,
    linear, linear_backward, permute, rms_norm, route_backward, sigmoid, weights_backward,
};
use crate::config::{Activation, LayerConfig, SharedConfig, WeightOn};
use crate::{NO_ROW, reference::Gate};

/// Where the routes of a layer come from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// Its router.
    Router,
    /// Logits that were made elsewhere, `[T, E]`.
    Logits(&'a [f64]),
    /// Routes that were made elsewhere.
    Routes {
        /// `[T, K]`.
        ids: &'a [u32],
        /// `[T, K]`.
        weights: &'a [f64],
    },
}

/// What a forward pass keeps for the backward one, besides x.
#[derive(Clone, Debug, PartialEq)]
pub struct Saved {
    /// `[R, N]`, sorted by expert: what the activation read.
    pub pre_activation: Vec<f64>,
    /// What the shared expert's activation read, `[T, 2S]` or `[T, S]`; empty without one.
    pub shared_pre_activation: Vec<f64>,
    /// `[T, K]`.
    pub experts: Vec<u32>,
    /// `[T, K]`.
    pub weights: Vec<f64>,
}

/// The gradients of a layer. Each lies as its operand does, and is there whether the operand is or what stands in its
/// place (zeros for a bias, ones for a scale or a norm weight).
#[derive(Clone, Debug, PartialEq)]
pub struct LayerGradients {
    /// `[T, H]`.
    pub x: Vec<f64>,
    /// Of the routing weights, `[T, K]`.
    pub weights: Vec<f64>,
    /// `[T, E]`; empty where the routes were given.
    pub logits: Vec<f64>,
    /// `[E, H]`; empty unless the routes are the router's.
    pub router: Vec<f64>,
    /// `[E]`; empty unless the routes are the router's.
    pub router_bias: Vec<f64>,
    /// `[H]`; empty without a norm.
    pub router_norm: Vec<f64>,
    /// `[E]`; empty where the routes were given.
    pub expert_scale: Vec<f64>,
    /// `[E, N, H]`.
    pub gate_up: Vec<f64>,
    /// `[E, N]`.
    pub gate_up_bias: Vec<f64>,
    /// `[E, H, I]`.
    pub down: Vec<f64>,
    /// `[E, H]`.
    pub down_bias: Vec<f64>,
    /// Of the shared expert, if there is one.
    pub shared: Option<SharedGradients>,
}

/// The gradients of the shared expert.
#[derive(Clone, Debug, PartialEq)]
pub struct SharedGradients {
    /// `[2S, H]` or `[S, H]`.
    pub gate_up: Vec<f64>,
    /// `[2S]` or `[S]`.
    pub gate_up_bias: Vec<f64>,
    /// `[H, S]`.
    pub down: Vec<f64>,
    /// `[H]`.
    pub down_bias: Vec<f64>,
    /// `[H]`; empty without a gate.
    pub gate: Vec<f64>,
}

/// The layer and what its backward pass needs: [`forward`], [`forward_from_logits`] or [`forward_from_routes`], as
/// `source` says, and its pre-activations.
pub fn forward_saving(
    config: &LayerConfig,
    layer: &Layer<'_>,
    input: &Input<'_>,
    source: Source<'_>,
) -> (Output, Saved) {
    let output = match source {
        Source::Router => forward(config, layer, input),
        Source::Logits(logits) => forward_from_logits(config, layer, input, logits),
        Source::Routes { ids, weights } => forward_from_routes(config, layer, input, ids, weights),
    };
    let normed = expert_input(config, layer, input.x);
    let x = normed.as_deref().unwrap_or(input.x);
    let pre_activation = gate_up(&GateUp {
        x,
        gather: Some(Gather { row_slot: &output.permutation.row_slot, top_k: config.top_k }),
        input_weights: (config.weight_on == WeightOn::Input).then_some(&output.routes.weights),
        offsets: &output.permutation.offsets,
        gate_up: layer.gate_up,
        bias: layer.gate_up_bias,
        rows: input.tokens * config.top_k,
        hidden: config.hidden,
        outputs: config.gate_up_rows(),
    });
    let shared_pre_activation = config.shared.zip(layer.shared).map_or(Vec::new(), |(shared, weights)| {
        let (weight, bias, inputs) = (weights.gate_up, weights.gate_up_bias, config.hidden);
        let outputs = shared.activation.gate_up_rows(shared.intermediate);
        linear(&Linear { x, weight, bias, rows: input.tokens, inputs, outputs })
    });
    let (experts, weights) = (output.routes.experts.clone(), output.routes.weights.clone());
    (output, Saved { pre_activation, shared_pre_activation, experts, weights })
}

/// What goes into [`backward`].
#[derive(Clone, Copy, Debug)]
pub struct LayerBackward<'a> {
    /// The gradient of y, `[T, H]`.
    pub d_y: &'a [f64],
    /// More of the logits' gradient, `[T, E]`: that of losses that read them.
    pub d_logits: Option<&'a [f64]>,
    /// What went into the forward pass: `[T, H]`.
    pub x: &'a [f64],
    /// Where its routes came from.
    pub source: Source<'a>,
    /// What it kept.
    pub saved: &'a Saved,
    /// T.
    pub tokens: usize,
}

/// The gradients of [`forward`], the stages in reverse order:
///
/// ```text
/// d_a, d_w            = through down, with and without the weights     (combine and down)
/// d_z                 = activation_backward(z, d_a)
/// d_s, d_gate_up      = gate_up_backward(d_z)                           s is what the experts read: x or its norm
/// d_s                += through the shared expert and its gate
/// d_logits            = route_backward(d_w) + d_logits
/// d_x, d_router       = gate_backward(d_logits, d_s)
/// ```
///
/// y of the experts is not needed: `d_w[t,k] = routed_scale * (a[r] . d_a[r] + bias[e] . d_y[t])` with `d_a` of weight one
/// ([`weights_backward`]). The residual's gradient is `d_y`. The next norm is not part of this: its gradient
/// ([`rms_norm_backward`]) belongs into `d_y`.
///
/// A slot without a row, and a token whose logits are none, has gradient 0 everywhere. The layer is one that
/// [`TrainingLayer`](crate::training::TrainingLayer) takes: norms, projections and an MLP around the experts, experts
/// without weights and a capacity are not looked at.
pub fn backward(config: &LayerConfig, layer: &Layer<'_>, op: &LayerBackward<'_>) -> LayerGradients {
    let (hidden, top_k) = (config.hidden, config.top_k);
    let normed = expert_input(config, layer, op.x);
    let x = normed.as_deref().unwrap_or(op.x);
    let (mut d, mut d_x) = through_experts(config, layer, op, x);
    if let (Some(shared), Some(weights)) = (config.shared, layer.shared) {
        let (gradients, d_shared) = through_shared(config, &shared, &weights, op, x);
        d.shared = Some(gradients);
        d_x.iter_mut().zip(d_shared).for_each(|(d, more)| *d += more);
    }
    let logits = match op.source {
        Source::Router => gate(&gate_of(config, layer, op)).logits,
        Source::Logits(logits) => logits.to_vec(),
        Source::Routes { .. } => Vec::new(),
    };
    if !matches!(op.source, Source::Routes { .. }) {
        let routes = route_backward(&RouteBackward {
            logits: &logits,
            ids: &op.saved.experts,
            d_weights: &d.weights,
            rule: config.routing,
            expert_scale: layer.expert_scale,
            tokens: op.tokens,
            experts: config.experts,
            top_k,
        });
        (d.logits, d.expert_scale) = (routes.logits, routes.expert_scale);
        if let Some(more) = op.d_logits {
            d.logits.iter_mut().zip(more).for_each(|(d, more)| *d += more);
        }
    }
    let fed = normed.is_some();
    if matches!(op.source, Source::Router) {
        let Gate { x, router, bias, norm_weight, config, tokens, hidden, experts } = gate_of(config, layer, op);
        let (d_logits, d_normed) = (&d.logits[..], fed.then_some(&d_x[..]));
        let op = GateBackward { d_logits, d_normed, x, router, bias, norm_weight, config, tokens, hidden, experts };
        let gate = gate_backward(&op);
        if fed {
            d_x = gate.x;
        } else {
            d_x.iter_mut().zip(gate.x).for_each(|(d, more)| *d += more);
        }
        (d.router, d.router_bias, d.router_norm) = (gate.router, gate.bias, gate.norm_weight);
    } else if let (true, Some(norm)) = (fed, config.gate.norm) {
        let (weight, eps) = (layer.router_norm, f64::from(norm.eps));
        let norm = rms_norm_backward(&NormBackward { x: op.x, weight, eps, d_n: &d_x, hidden });
        (d_x, d.router_norm) = (norm.x, norm.weight);
    }
    LayerGradients { x: d_x, ..d }
}

fn gate_of<'a>(config: &LayerConfig, layer: &Layer<'a>, op: &LayerBackward<'a>) -> Gate<'a> {
    Gate {
        x: op.x,
        router: layer.router,
        bias: layer.router_bias,
        norm_weight: layer.router_norm,
        config: config.gate,
        tokens: op.tokens,
        hidden: config.hidden,
        experts: config.experts,
    }
}

/// The normalised tokens, where the experts read these.
fn expert_input(config: &LayerConfig, layer: &Layer<'_>, x: &[f64]) -> Option<Vec<f64>> {
    let norm = config.gate.norm.filter(|norm| norm.feeds_experts)?;
    Some(rms_norm(x, layer.router_norm, f64::from(norm.eps), config.hidden))
}

/// Through the routed experts: the gradients of their parts and of the routing weights, and that of what they read.
fn through_experts(
    config: &LayerConfig,
    layer: &Layer<'_>,
    op: &LayerBackward<'_>,
    x: &[f64],
) -> (LayerGradients, Vec<f64>) {
    let (hidden, intermediate, top_k) = (config.hidden, config.intermediate, config.top_k);
    let (rows, scale) = (op.tokens * top_k, f64::from(config.routed_scale));
    let saved = op.saved;
    let on_input = config.weight_on == WeightOn::Input;
    let permutation = permute(&Permute { ids: &saved.experts, experts: config.experts, local: 0..config.experts });
    let offsets = &permutation.offsets;
    let z = PreActivation::Halves(&saved.pre_activation);
    let a = activation(config.activation, z, rows, intermediate);
    // The rows' gradients with weight one, and with their weights.
    let (mut d_one, mut d_y) = (vec![0.0; rows * hidden], vec![0.0; rows * hidden]);
    for (slot, &row) in permutation.slot_row.iter().enumerate().filter(|(_, row)| **row != NO_ROW) {
        let weight = if on_input { 1.0 } else { saved.weights[slot] };
        for h in 0..hidden {
            let d_out = op.d_y[slot / top_k * hidden + h];
            d_one[row as usize * hidden + h] = d_out;
            d_y[row as usize * hidden + h] = scale * weight * d_out;
        }
    }
    let down = DownBackward { d_y: &d_y, a: &a, offsets, down: layer.down, rows, hidden, intermediate };
    let d_down = down_backward(&down);
    let d_z = activation_backward(config.activation, z, &d_down.a, intermediate).halves(intermediate);
    let d_gate_up = gate_up_backward(&GateUpBackward {
        d_z: &d_z,
        x,
        gather: Some(Gather { row_slot: &permutation.row_slot, top_k }),
        input_weights: on_input.then_some(&saved.weights),
        offsets,
        gate_up: layer.gate_up,
        rows,
        hidden,
        outputs: config.gate_up_rows(),
    });
    let weights = if on_input {
        d_gate_up.input_weights
    } else {
        let bias = layer.down_bias.map(|bias| DownBias { bias, experts: &saved.experts, d_out: op.d_y, top_k, hidden });
        let d_a = down_backward(&DownBackward { d_y: &d_one, ..down }).a;
        let slot_row = &permutation.slot_row;
        weights_backward(&WeightsBackward { a: &a, d_a: &d_a, slot_row, bias, routed_scale: scale, intermediate })
    };
    let gradients = LayerGradients {
        x: Vec::new(),
        weights,
        logits: Vec::new(),
        router: Vec::new(),
        router_bias: Vec::new(),
        router_norm: Vec::new(),
        expert_scale: Vec::new(),
        gate_up: d_gate_up.gate_up,
        gate_up_bias: d_gate_up.bias,
        down: d_down.down,
        down_bias: d_down.bias,
        shared: None,
    };
    (gradients, d_gate_up.x)
}

/// Through the shared expert and its gate: their gradients, and that of what they read.
fn through_shared(
    config: &LayerConfig,
    shared: &SharedConfig,
    weights: &SharedExpert<'_>,
    op: &LayerBackward<'_>,
    x: &[f64],
) -> (SharedGradients, Vec<f64>) {
    let SharedConfig { intermediate, activation: act, gated, scale } = *shared;
    let (rows, hidden, scale) = (op.tokens, config.hidden, f64::from(scale));
    let outputs = Activation::gate_up_rows(act, intermediate);
    let z = PreActivation::Halves(&op.saved.shared_pre_activation);
    let a = activation(act, z, rows, intermediate);
    let gate = weights.gate.filter(|_| gated);
    let logits = gate.map(|weight| linear(&Linear { x, weight, bias: None, rows, inputs: hidden, outputs: 1 }));
    let (mut d_y, mut d_s) = (Vec::with_capacity(rows * hidden), Vec::new());
    for (t, row) in op.d_y.chunks_exact(hidden).enumerate() {
        let factor = logits.as_ref().map_or(1.0, |logits| sigmoid(logits[t]));
        d_y.extend(row.iter().map(|d| scale * factor * d));
    }
    let down = LinearBackward { x: &a, weight: weights.down, d_y: &d_y, rows, inputs: intermediate, outputs: hidden };
    let d_down = linear_backward(&down);
    let d_z = activation_backward(act, z, &d_down.x, intermediate).halves(intermediate);
    let d_up =
        linear_backward(&LinearBackward { x, weight: weights.gate_up, d_y: &d_z, rows, inputs: hidden, outputs });
    let mut d_x = d_up.x;
    let mut d_gate = Vec::new();
    if let (Some(gate), Some(logits)) = (gate, logits) {
        let down = Linear {
            x: &a,
            weight: weights.down,
            bias: weights.down_bias,
            rows,
            inputs: intermediate,
            outputs: hidden,
        };
        for (t, y) in linear(&down).chunks_exact(hidden).enumerate() {
            let sum: f64 = y.iter().zip(&op.d_y[t * hidden..]).map(|(y, d)| y * d).sum();
            d_s.push(scale * sum * sigmoid(logits[t]) * sigmoid(-logits[t]));
        }
        let d = linear_backward(&LinearBackward { x, weight: gate, d_y: &d_s, rows, inputs: hidden, outputs: 1 });
        d_x.iter_mut().zip(d.x).for_each(|(d, more)| *d += more);
        d_gate = d.weight;
    }
    let gradients = SharedGradients {
        gate_up: d_up.weight,
        gate_up_bias: d_up.bias,
        down: d_down.weight,
        down_bias: d_down.bias,
        gate: d_gate,
    };
    (gradients, d_x)
}
