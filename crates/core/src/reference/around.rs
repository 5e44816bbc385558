//! What stands around the experts of a layer: a router's own layers, projections, norms, the shared expert, the residual.

use super::{
    Combine, Input, Layer, Linear, PreActivation, Shared, SharedGate, activate, activation, combine, linear, rms_norm,
};
use crate::config::{Activation, LayerConfig, RmsNorm};

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

/// The projections of experts that work in a width L of their own.
#[derive(Clone, Copy, Debug)]
pub struct Latent<'a> {
    /// `[L, H]`.
    pub down: &'a [f64],
    /// `[H, L]`.
    pub up: &'a [f64],
}

/// The weights of the norms, as [`Norms`](crate::config::Norms) names them; an absent one is ones, or zeros where the factor
/// is `1 + weight`.
#[derive(Clone, Copy, Debug, Default)]
pub struct NormVectors<'a> {
    /// `[L]` or `[H]`.
    pub experts_in: Option<&'a [f64]>,
    /// `[L]` or `[H]`.
    pub expert_out: Option<&'a [f64]>,
    /// `[H]`.
    pub routed_out: Option<&'a [f64]>,
    /// `[H]`.
    pub shared_in: Option<&'a [f64]>,
    /// `[H]`.
    pub shared_out: Option<&'a [f64]>,
    /// `[H]`.
    pub out: Option<&'a [f64]>,
}

/// The layers before the router's matrix, M wide. Absent biases are zeros, an absent scale or norm weight is ones.
#[derive(Clone, Copy, Debug)]
pub struct RouterMlp<'a> {
    /// `[M, H]`.
    pub down: &'a [f64],
    /// `[M]`.
    pub down_bias: Option<&'a [f64]>,
    /// `[M]`: what the previous state is multiplied by.
    pub state_scale: Option<&'a [f64]>,
    /// `[M]`.
    pub norm: Option<&'a [f64]>,
    /// `[M, M]`.
    pub fc1: &'a [f64],
    /// `[M]`.
    pub fc1_bias: Option<&'a [f64]>,
    /// `[M, M]`.
    pub fc2: &'a [f64],
    /// `[M]`.
    pub fc2_bias: Option<&'a [f64]>,
}

/// `down . x + down_bias + state_scale * previous`, `[T, M]`; where the configuration has a router of several layers.
pub(super) fn router_state(config: &LayerConfig, layer: &Layer<'_>, input: &Input<'_>) -> Option<Vec<f64>> {
    let (mlp, weights) = (config.router_mlp?, layer.router_mlp?);
    let mut state = linear(&Linear {
        x: input.x,
        weight: weights.down,
        bias: weights.down_bias,
        rows: input.tokens,
        inputs: config.hidden,
        outputs: mlp.width,
    });
    if let Some(previous) = input.router_state {
        for (i, value) in state.iter_mut().enumerate() {
            *value += weights.state_scale.map_or(1.0, |scale| scale[i % mlp.width]) * previous[i];
        }
    }
    Some(state)
}

/// What the router's matrix reads, `[T, M]`.
pub(super) fn router_hidden(config: &LayerConfig, layer: &Layer<'_>, state: &[f64]) -> Vec<f64> {
    let (Some(mlp), Some(weights)) = (config.router_mlp, layer.router_mlp) else { return state.to_vec() };
    let mut hidden = rms_norm(state, weights.norm, f64::from(mlp.eps), mlp.width);
    for (weight, bias) in [(weights.fc1, weights.fc1_bias), (weights.fc2, weights.fc2_bias)] {
        let (rows, inputs, outputs) = (hidden.len() / mlp.width, mlp.width, mlp.width);
        let sums = linear(&Linear { x: &hidden, weight, bias, rows, inputs, outputs });
        hidden = sums.into_iter().map(|sum| activate(Activation::Plain(mlp.function), 0.0, sum)).collect();
    }
    hidden
}

/// What the routed experts read, `[T, L]` or `[T, H]`.
pub(super) fn expert_input(config: &LayerConfig, layer: &Layer<'_>, x: &[f64]) -> Vec<f64> {
    let width = config.expert_width();
    let projected = match layer.latent.filter(|_| config.latent.is_some()) {
        Some(latent) => project(x, latent.down, [config.hidden, width]),
        None => x.to_vec(),
    };
    normed(config.norms.experts_in, layer.norms.experts_in, projected, width)
}

fn project(x: &[f64], weight: &[f64], [inputs, outputs]: [usize; 2]) -> Vec<f64> {
    linear(&Linear { x, weight, bias: None, rows: x.len() / inputs, inputs, outputs })
}

/// The norm of every row, or the rows as they are.
pub(super) fn normed(norm: Option<RmsNorm>, weight: Option<&[f64]>, rows: Vec<f64>, width: usize) -> Vec<f64> {
    let Some(norm) = norm else { return rows };
    let offset = if norm.unit_offset { 1.0 } else { 0.0 };
    let weight: Option<Vec<f64>> = weight.map(|weight| weight.iter().map(|w| w + offset).collect());
    match &weight {
        Some(weight) if norm.scaled_first => {
            let scaled: Vec<f64> = rows.iter().enumerate().map(|(i, x)| x * weight[i % width]).collect();
            rms_norm(&scaled, None, f64::from(norm.eps), width)
        }
        _ => rms_norm(&rows, weight.as_deref(), f64::from(norm.eps), width),
    }
}

/// `routed_scale * sum_k w[t,k] * ..`, `[T, L]` or `[T, H]`.
pub(super) struct RoutedSum(pub(super) Vec<f64>);

impl RoutedSum {
    /// y, and its norm if one was asked for. The shared expert reads `x`.
    pub(super) fn finish(
        self,
        config: &LayerConfig,
        layer: &Layer<'_>,
        x: &[f64],
        input: &Input<'_>,
    ) -> (Vec<f64>, Option<Vec<f64>>) {
        let (hidden, tokens) = (config.hidden, input.tokens);
        let projected = match layer.latent.filter(|_| config.latent.is_some()) {
            Some(latent) => project(&self.0, latent.up, [config.expert_width(), hidden]),
            None => self.0,
        };
        let routed = normed(config.norms.routed_out, layer.norms.routed_out, projected, hidden);
        let shared = shared_expert(config, layer, x, tokens);
        let sum = |y: &[f64], shared, residual, norm| {
            let (weights, copies, slot_row, routed_scale, top_k) = (None, None, None, 1.0, 1);
            combine(&Combine {
                y,
                slot_row,
                weights,
                copies,
                routed_scale,
                shared,
                residual,
                norm,
                tokens,
                hidden,
                top_k,
            })
        };
        let together = sum(&routed, shared.as_ref().map(SharedRows::part), None, None).out;
        let together = normed(config.norms.out, layer.norms.out, together, hidden);
        let finished = sum(&together, None, input.residual, input.norm);
        (finished.out, finished.normed)
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
    let read = normed(config.norms.shared_in, layer.norms.shared_in, x.to_vec(), hidden);
    let (weight, bias) = (weights.gate_up, weights.gate_up_bias);
    let pre_activation = linear(&Linear { x: &read, weight, bias, rows, inputs: hidden, outputs });
    let a = activation(shared.activation, PreActivation::Halves(&pre_activation), rows, intermediate);
    let (weight, bias) = (weights.down, weights.down_bias);
    let down = Linear { x: &a, weight, bias, rows, inputs: intermediate, outputs: hidden };
    let gate = weights.gate.filter(|_| shared.gated);
    Some(SharedRows {
        y: normed(config.norms.shared_out, layer.norms.shared_out, linear(&down), hidden),
        gate_logits: gate.map(|weight| linear(&Linear { x, weight, bias: None, rows, inputs: hidden, outputs: 1 })),
        scale: f64::from(shared.scale),
    })
}
