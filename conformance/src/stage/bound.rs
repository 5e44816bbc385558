//! What a layer's result may be off by.

use super::combine::norm_errors;
use super::magnitudes;
use fused_moe_core::config::{LayerConfig, RmsNorm, WeightOn, ZeroOutput};
use fused_moe_core::reference::{
    Combine, Copies, Down, GateUp, Gather, Input, Layer, Linear, Output, PreActivation, activation, combine, down,
    gate_up, linear, rms_norm, sigmoid,
};

/// Numbers, and what each may be off by.
struct Rows {
    values: Vec<f64>,
    errors: Vec<f64>,
}

/// What each element of y may be off by, `[T, H]`: `part` of the magnitudes that add up to it, from the activations as they
/// are. What comes behind a sum of the experts' takes its error along: a projection as it adds up, a norm as
/// [`tolerance::normed`](crate::tolerance::normed) says.
pub(super) fn of(config: &LayerConfig, layer: &Layer<'_>, input: &Input<'_>, output: &Output, part: f64) -> Vec<f64> {
    let (hidden, width) = (config.hidden, config.expert_width());
    let norm = config.gate.norm.filter(|norm| norm.feeds_experts);
    let normed = norm.map(|norm| rms_norm(input.x, layer.router_norm, f64::from(norm.eps), hidden));
    let x = normed.as_deref().unwrap_or(input.x);
    let latent = layer.latent.filter(|_| config.latent.is_some());

    let given = Rows { values: x.to_vec(), errors: vec![0.0; x.len()] };
    let read = match latent {
        Some(latent) => given.projected(latent.down, [hidden, width], part),
        None => given,
    };
    let read = read.normed(config.norms.experts_in, layer.norms.experts_in, width, part);
    let sum = routed(config, layer, &read, output, part);
    let projected = match latent {
        Some(latent) => sum.projected(latent.up, [width, hidden], part),
        None => sum,
    };
    let mut together = projected.normed(config.norms.routed_out, layer.norms.routed_out, hidden, part);
    if let Some((rows, factor)) = shared(config, layer, x, part) {
        for (i, (value, error)) in together.values.iter_mut().zip(&mut together.errors).enumerate() {
            *value += factor[i / hidden] * rows.values[i];
            *error += factor[i / hidden].abs() * rows.errors[i];
        }
    }
    let mut errors = together.normed(config.norms.out, layer.norms.out, hidden, part).errors;
    for (error, residual) in errors.iter_mut().zip(input.residual.unwrap_or(&[])) {
        *error += part * residual.abs();
    }
    errors
}

/// The weighted sum over the routed experts, `[T, L]` or `[T, H]`.
fn routed(config: &LayerConfig, layer: &Layer<'_>, read: &Rows, output: &Output, part: f64) -> Rows {
    let (width, intermediate, top_k) = (config.expert_width(), config.intermediate, config.top_k);
    let (tokens, slot_row) = (read.values.len() / width, Some(&output.permutation.slot_row[..]));
    let (offsets, weights) = (&output.permutation.offsets[..=config.experts], &output.routes.weights[..]);
    let on_input = config.weight_on == WeightOn::Input;
    let z = gate_up(&GateUp {
        x: &read.values,
        gather: Some(Gather { row_slot: &output.permutation.row_slot, top_k }),
        input_weights: on_input.then_some(weights),
        offsets,
        gate_up: layer.gate_up,
        bias: layer.gate_up_bias,
        rows: tokens * top_k,
        hidden: width,
        outputs: config.gate_up_rows(),
    });
    let a = activation(config.activation, PreActivation::Halves(&z), tokens * top_k, intermediate);
    let (matrices, bias, rows) = (layer.down, layer.down_bias, tokens * top_k);
    let op = Down { a: &a, offsets, down: matrices, bias, rows, hidden: width, intermediate };
    let values = down(&op);
    let (a, matrices, bias) = (magnitudes(&a), magnitudes(matrices), bias.map(magnitudes));
    let magnitude = down(&Down { a: &a, down: &matrices, bias: bias.as_deref(), ..op });
    let y = Rows { values, errors: magnitude.into_iter().map(|m| part * m).collect() };
    let y = y.normed(config.norms.expert_out, layer.norms.expert_out, width, part);

    let copying = config.zero_experts.filter(|zero| zero.output == ZeroOutput::Copy);
    let copies =
        |x| copying.map(|_| Copies { x, ids: &output.routes.experts, first: config.experts, end: config.choices() });
    let (weights, routed_scale) = ((!on_input).then_some(weights), f64::from(config.routed_scale));
    let op = Combine {
        y: &y.values,
        slot_row,
        weights,
        copies: copies(&read.values),
        routed_scale,
        shared: None,
        residual: None,
        norm: None,
        tokens,
        hidden: width,
        top_k,
    };
    let values = combine(&op).out;
    let (weights, copied) = (weights.map(magnitudes), read.with(part).errors);
    let (weights, copies) = (weights.as_deref(), copies(&copied));
    let op = Combine { y: &y.errors, weights, copies, routed_scale: routed_scale.abs(), ..op };
    Rows { values, errors: combine(&op).out }
}

/// The shared expert's rows, and the factor of each.
fn shared(config: &LayerConfig, layer: &Layer<'_>, x: &[f64], part: f64) -> Option<(Rows, Vec<f64>)> {
    let (shared, weights) = (config.shared?, layer.shared?);
    let (hidden, width, tokens) = (config.hidden, shared.intermediate, x.len() / config.hidden);
    let outputs = shared.activation.gate_up_rows(width);
    let given = Rows { values: x.to_vec(), errors: vec![0.0; x.len()] };
    let read = given.normed(config.norms.shared_in, layer.norms.shared_in, hidden, part);
    let (weight, bias) = (weights.gate_up, weights.gate_up_bias);
    let z = linear(&Linear { x: &read.values, weight, bias, rows: tokens, inputs: hidden, outputs });
    let values = activation(shared.activation, PreActivation::Halves(&z), tokens, width);
    let a = Rows { errors: vec![0.0; values.len()], values };
    let mut y = a.projected(weights.down, [width, hidden], part);
    for (i, bias) in
        weights.down_bias.into_iter().flat_map(|bias| bias.iter().cycle().take(tokens * hidden)).enumerate()
    {
        y.values[i] += bias;
        y.errors[i] += part * bias.abs();
    }
    let y = y.normed(config.norms.shared_out, layer.norms.shared_out, hidden, part);
    let scale = f64::from(shared.scale);
    let factor = match weights.gate.filter(|_| shared.gated) {
        Some(weight) => linear(&Linear { x, weight, bias: None, rows: tokens, inputs: hidden, outputs: 1 })
            .into_iter()
            .map(|logit| scale * sigmoid(logit))
            .collect(),
        None => vec![scale; tokens],
    };
    Some((y, factor))
}

impl Rows {
    /// Off by `part` of themselves besides.
    fn with(&self, part: f64) -> Self {
        let errors = self.errors.iter().zip(&self.values).map(|(error, value)| error + part * value.abs()).collect();
        Self { values: self.values.clone(), errors }
    }

    /// Their product with a matrix.
    fn projected(&self, weight: &[f64], [inputs, outputs]: [usize; 2], part: f64) -> Self {
        let rows = self.values.len() / inputs;
        let op = Linear { x: &self.values, weight, bias: None, rows, inputs, outputs };
        let (magnitude, carried) = (magnitudes(&self.values), magnitudes(weight));
        let x: Vec<f64> = magnitude.iter().zip(&self.errors).map(|(value, error)| part * value + error).collect();
        Self { values: linear(&op), errors: linear(&Linear { x: &x, weight: &carried, ..op }) }
    }

    /// Their norm, if there is one.
    fn normed(self, norm: Option<RmsNorm>, weight: Option<&[f64]>, width: usize, part: f64) -> Self {
        let Some(norm) = norm else { return self };
        let offset = if norm.unit_offset { 1.0 } else { 0.0 };
        let weight: Option<Vec<f64>> = weight.map(|weight| weight.iter().map(|w| w + offset).collect());
        let (rows, weight) = match &weight {
            Some(weight) if norm.scaled_first => (self.scaled(weight, part), None),
            _ => (self, weight.as_deref()),
        };
        let values = rms_norm(&rows.values, weight, f64::from(norm.eps), width);
        let errors = norm_errors(&rows.values, &values, &rows.errors, width);
        Self { values, errors }.with(part)
    }

    /// Each column times its weight, stored.
    fn scaled(self, weight: &[f64], part: f64) -> Self {
        let times = |rows: &[f64], of: fn(f64) -> f64| -> Vec<f64> {
            rows.iter().enumerate().map(|(i, x)| x * of(weight[i % weight.len()])).collect()
        };
        Self { values: times(&self.values, |w| w), errors: times(&self.errors, f64::abs) }.with(part)
    }
}
