//! The magnitudes that a layer's result is made of.

use super::magnitudes;
use fused_moe_core::config::{LayerConfig, WeightOn};
use fused_moe_core::reference::{
    Combine, Down, GateUp, Gather, Input, Layer, Linear, Output, PreActivation, Shared, SharedGate, activation,
    combine, down, gate_up, linear, rms_norm, sigmoid,
};

/// The magnitudes that add up to each element of y, `[T, H]`: the second matrix and everything after it on absolute
/// values, from the activations as they are.
pub(super) fn of(config: &LayerConfig, layer: &Layer<'_>, input: &Input<'_>, output: &Output) -> Vec<f64> {
    let (hidden, intermediate, top_k, tokens) = (config.hidden, config.intermediate, config.top_k, input.tokens);
    let rows = tokens * top_k;
    let norm = config.gate.norm.filter(|norm| norm.feeds_experts);
    let normed = norm.map(|norm| rms_norm(input.x, layer.router_norm, f64::from(norm.eps), hidden));
    let x = normed.as_deref().unwrap_or(input.x);
    let (offsets, weights) = (&output.permutation.offsets[..], magnitudes(&output.routes.weights));
    let z = gate_up(&GateUp {
        x,
        gather: Some(Gather { row_slot: &output.permutation.row_slot, top_k }),
        input_weights: (config.weight_on == WeightOn::Input).then_some(&output.routes.weights),
        offsets,
        gate_up: layer.gate_up,
        bias: layer.gate_up_bias,
        rows,
        hidden,
        outputs: config.gate_up_rows(),
    });
    let a = magnitudes(&activation(config.activation, PreActivation::Halves(&z), rows, intermediate));
    let (matrices, bias) = (magnitudes(layer.down), layer.down_bias.map(magnitudes));
    let y = down(&Down { a: &a, offsets, down: &matrices, bias: bias.as_deref(), rows, hidden, intermediate });
    let shared = shared(config, layer, x, tokens);
    let residual = input.residual.map(magnitudes);
    combine(&Combine {
        y: &y,
        slot_row: Some(&output.permutation.slot_row),
        weights: (config.weight_on == WeightOn::Output).then_some(&weights),
        copies: None,
        routed_scale: f64::from(config.routed_scale.abs()),
        shared: shared.as_ref().map(|(y, factor)| Shared { y, gate: SharedGate::Factor(factor), scale: 1.0 }),
        residual: residual.as_deref(),
        norm: None,
        tokens,
        hidden,
        top_k,
    })
    .out
}

fn shared(config: &LayerConfig, layer: &Layer<'_>, x: &[f64], tokens: usize) -> Option<(Vec<f64>, Vec<f64>)> {
    let (shared, weights) = (config.shared?, layer.shared?);
    let (hidden, width) = (config.hidden, shared.intermediate);
    let outputs = shared.activation.gate_up_rows(width);
    let product = |weight, bias, outputs| linear(&Linear { x, weight, bias, rows: tokens, inputs: hidden, outputs });
    let z = product(weights.gate_up, weights.gate_up_bias, outputs);
    let a = magnitudes(&activation(shared.activation, PreActivation::Halves(&z), tokens, width));
    let (matrix, bias) = (magnitudes(weights.down), weights.down_bias.map(magnitudes));
    let bias = bias.as_deref();
    let y = linear(&Linear { x: &a, weight: &matrix, bias, rows: tokens, inputs: width, outputs: hidden });
    let scale = f64::from(shared.scale.abs());
    let factor = match weights.gate.filter(|_| shared.gated) {
        Some(gate) => product(gate, None, 1).into_iter().map(|logit| scale * sigmoid(logit)).collect(),
        None => vec![scale; tokens],
    };
    Some((y, factor))
}
