//! A few tokens of a result, held against the reference: for layers too large to be worked out whole.

use crate::compare::{self, Comparison};
use crate::data::{Values, decode};
use crate::tolerance;
use fused_moe_core::config::{Activation, LayerConfig, WeightOn};
use fused_moe_core::reference::activate;
use fused_moe_core::reference::{Linear, linear, rms_norm, sigmoid};
use fused_moe_core::weights::{ExpertMatrices, LayerWeights, Matrix};
use fused_moe_core::{DType, HostView, Shape};

/// A call of a layer: what went in, the routes that were taken, what came out.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// `[T, H]`.
    pub x: HostView<'a>,
    /// `[T, K]`.
    pub experts: &'a [u32],
    /// `[T, K]`.
    pub weights: &'a [f32],
    /// `[T, H]`, without residual.
    pub y: HostView<'a>,
}

/// Compares the rows of `tokens` with what the routes and the weights say, in f64.
///
/// Costs `3 K H I` products a token, and memory for one row of a matrix. An expert that does not exist contributes
/// nothing; a token that does not exist is a failure.
pub fn check(config: &LayerConfig, weights: &LayerWeights<'_>, call: &Call<'_>, tokens: &[usize]) -> Comparison {
    let mut verdict = Comparison::default();
    for &token in tokens {
        let slots = token * config.top_k..(token + 1) * config.top_k;
        let routes = (call.experts.get(slots.clone()), call.weights.get(slots));
        let (Some(x), Some(y), (Some(experts), Some(factors))) = (row(&call.x, token), row(&call.y, token), routes)
        else {
            return Comparison::wrong(format!("token {token} is past the end"));
        };
        let sums = Sums::of(config, weights, &x, experts, factors);
        let inner = config.hidden + config.intermediate + config.top_k;
        let part = tolerance::layer(inner, call.x.dtype(), 0.0);
        let bound = |(value, magnitude): (&f64, &f64)| tolerance::stored(call.y.dtype(), *value, part * magnitude);
        let allowed: Vec<f64> = sums.values.iter().zip(&sums.magnitudes).map(bound).collect();
        let name = format!("y of token {token} ");
        verdict = verdict.worse(compare::floats(&name, Shape::from([y.len()]), [&sums.values, &allowed, &y]));
    }
    verdict
}

/// A row of y, and the magnitudes that add up to it.
struct Sums {
    values: Vec<f64>,
    magnitudes: Vec<f64>,
}

impl Sums {
    fn of(config: &LayerConfig, weights: &LayerWeights<'_>, x: &[f64], experts: &[u32], factors: &[f32]) -> Self {
        let norm_weight = weights.router_norm.as_ref().and_then(|view| row(view, 0));
        let normed = config
            .gate
            .norm
            .filter(|norm| norm.feeds_experts)
            .map(|norm| rms_norm(x, norm_weight.as_deref(), f64::from(norm.eps), config.hidden));
        let x = normed.as_deref().unwrap_or(x);
        let mut sums = Self { values: vec![0.0; config.hidden], magnitudes: vec![0.0; config.hidden] };
        for (&id, &factor) in experts.iter().zip(factors) {
            let Some(expert) = weights.experts.iter().nth(id as usize) else { continue };
            let factor = f64::from(factor);
            let (input, output) = match config.weight_on {
                WeightOn::Input => (factor, 1.0),
                WeightOn::Output => (1.0, factor),
            };
            let x: Vec<f64> = x.iter().map(|x| input * x).collect();
            sums.add(expert, config.activation, &x, output * f64::from(config.routed_scale));
        }
        if let (Some(shared), Some(weights)) = (config.shared, &weights.shared) {
            let gate = weights.gate.as_ref().and_then(|view| row(view, 0));
            let gate = gate.map_or(1.0, |gate| sigmoid(gate.iter().zip(x).map(|(g, x)| g * x).sum()));
            sums.add(&weights.matrices, shared.activation, x, gate * f64::from(shared.scale));
        }
        sums
    }

    /// Adds `factor * Expert(x)`.
    fn add(&mut self, expert: &ExpertMatrices<'_>, activation: Activation, x: &[f64], factor: f64) {
        let gate = expert.gate.map_or(Vec::new(), |gate| product(&gate, expert.gate_bias, x));
        let up = product(&expert.up, expert.up_bias, x);
        let g = |i: usize| gate.get(i).copied().unwrap_or(0.0);
        let a: Vec<f64> = up.iter().enumerate().map(|(i, &u)| activate(activation, g(i), u)).collect();
        let mut buffer = Vec::new();
        for h in 0..self.values.len().min(expert.down.rows()) {
            let weight = matrix_row(&expert.down, h, &mut buffer);
            let bias = expert.down_bias.map_or(0.0, |bias| element(&bias, h));
            let terms = || weight.iter().zip(&a).map(|(w, a)| w * a);
            self.values[h] += factor * (terms().sum::<f64>() + bias);
            self.magnitudes[h] += factor.abs() * (terms().map(f64::abs).sum::<f64>() + bias.abs());
        }
    }
}

/// `matrix x + bias`, a row of the matrix at a time.
fn product(matrix: &Matrix<'_>, bias: Option<Matrix<'_>>, x: &[f64]) -> Vec<f64> {
    let mut buffer = Vec::new();
    let mut y = Vec::with_capacity(matrix.rows());
    for r in 0..matrix.rows() {
        let weight = matrix_row(matrix, r, &mut buffer);
        let bias = bias.map(|bias| [element(&bias, r)]);
        let bias = bias.as_ref().map(|bias| &bias[..]);
        y.extend(linear(&Linear { x, weight: &weight, bias, rows: 1, inputs: x.len().min(weight.len()), outputs: 1 }));
    }
    y
}

fn element(column: &Matrix<'_>, row: usize) -> f64 {
    matrix_row(column, row, &mut Vec::new()).first().copied().unwrap_or(0.0)
}

fn matrix_row(matrix: &Matrix<'_>, row: usize, buffer: &mut Vec<u8>) -> Vec<f64> {
    buffer.resize(matrix.cols() * matrix.dtype().size(), 0);
    matrix.copy_row(row, buffer);
    floats(matrix.dtype(), buffer)
}

/// A row of a view, if there is one.
fn row(view: &HostView<'_>, row: usize) -> Option<Vec<f64>> {
    let size = view.dtype().size();
    let first = view.offset() + row * view.row_stride() * size;
    let bytes = view.storage().get(first..first + view.cols() * size).filter(|_| row < view.rows())?;
    Some(floats(view.dtype(), bytes))
}

fn floats(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    match decode(dtype, bytes) {
        Values::Floats(values) => values,
        Values::Ids(_) => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Data, Spread, Tensor};
    use fused_moe_core::reference;
    use fused_moe_core::weights::{ExpertWeights, StackLayout};

    #[test]
    fn agrees_with_the_reference_and_notices_a_wrong_row() {
        let config = LayerConfig::new(24, 10, 6, 2);
        let data = Data::new("rows");
        let x = data.of("x").tokens(DType::BF16, [5, 24]);
        let router = data.of("router").normal(DType::BF16, [6, 24], 0.2);
        let gate_up = data.of("gate_up").normal(DType::BF16, [6, 20, 24], 0.2);
        let down = data.of("down").normal(DType::BF16, [6, 24, 10], 0.3);
        let routes = data.routes([5, 2, 6], Spread::Even);
        let factors = data.of("weights").between(DType::F32, [5, 2], 0.1, 0.9);
        let layer =
            reference::Layer { gate_up: gate_up.as_floats(), down: down.as_floats(), ..reference::Layer::default() };
        let input = reference::Input { x: x.as_floats(), tokens: 5, ..reference::Input::default() };
        let y = reference::forward_from_routes(&config, &layer, &input, routes.as_ids(), factors.as_floats()).y;

        let (up, down) = (gate_up.view().unwrap(), down.view().unwrap());
        let experts = ExpertWeights::stacked(up, down, StackLayout::default()).unwrap();
        let weights = LayerWeights::new(router.view().unwrap(), experts);
        let factors: Vec<f32> = factors.as_floats().iter().map(|&w| w as f32).collect();
        let check = |y: &[f64], tokens: &[usize]| {
            let y = Tensor::floats(DType::F32, [5, 24], y.to_vec());
            let (x, y) = (x.view().unwrap(), y.view().unwrap());
            let call = Call { x, experts: routes.as_ids(), weights: &factors, y };
            super::check(&config, &weights, &call, tokens)
        };
        assert_eq!(check(&y, &[0, 4]).failure, None);
        assert!(check(&y, &[5]).failure.is_some());
        let mut wrong = y;
        wrong[4 * 24 + 7] += 0.3;
        assert_eq!(check(&wrong, &[0]).failure, None);
        assert!(check(&wrong, &[4]).failure.unwrap().starts_with("y of token 4 [7]"));
    }
}
