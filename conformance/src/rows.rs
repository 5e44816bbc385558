//! A few tokens of a result, held against the reference: for layers too large to be worked out whole.

mod backward;

pub use backward::{BackwardCall, Sample, check_backward};

use crate::compare::{self, Comparison};
use crate::data::{Tensor, Values, decode};
use crate::operands::{Expected, Prepared};
use crate::stage::choice::Choice;
use crate::stage::gate::gated;
use crate::tolerance;
use fused_moe_core::config::{Activation, LayerConfig, Selection, WeightOn};
use fused_moe_core::reference::{Gate, activate, rms_norm, sigmoid};
use fused_moe_core::weights::{ExpertMatrices, LayerWeights, Matrix};
use fused_moe_core::{DType, HostView, Shape};
use rayon::prelude::*;

/// A call of a layer: what went in, the routes that were taken, what came out.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// `[T, H]`.
    pub x: HostView<'a>,
    /// `[T, K]`.
    pub experts: &'a [u32],
    /// `[T, K]`.
    pub weights: &'a [f32],
    /// `[T, E]`, where the routes were made of them and not of the router's.
    pub logits: Option<HostView<'a>>,
    /// `[T, H]`, without residual.
    pub y: HostView<'a>,
}

impl<'a> Call<'a> {
    /// Experts and weights of a token.
    fn slots(&self, config: &LayerConfig, token: usize) -> Option<(&'a [u32], &'a [f32])> {
        let slots = token.checked_mul(config.top_k)?..token.checked_add(1)?.checked_mul(config.top_k)?;
        Some((self.experts.get(slots.clone())?, self.weights.get(slots)?))
    }
}

/// Up to `count` tokens of `tokens`, from the first to the last.
pub fn sample(tokens: usize, count: usize) -> Vec<usize> {
    let steps = count.saturating_sub(1).max(1);
    let mut sample: Vec<usize> = (0..count).map(|i| i * tokens.saturating_sub(1) / steps).collect();
    sample.dedup();
    sample.retain(|&token| token < tokens);
    sample
}

/// Compares the rows of `tokens` with what the routes and the weights say, in f64, on all processors.
///
/// Costs `3 K H I` products a token, and memory for a few rows of a matrix. An expert that does not exist contributes
/// nothing; a token that does not exist is a failure.
pub fn check(config: &LayerConfig, weights: &LayerWeights<'_>, call: &Call<'_>, tokens: &[usize]) -> Comparison {
    let mut verdict = Comparison::default();
    for &token in tokens {
        let (Some(x), Some(y), Some((experts, factors))) =
            (row(&call.x, token), row(&call.y, token), call.slots(config, token))
        else {
            return past_the_end(token);
        };
        let sums = Sums::of(config, weights, &x, experts, factors);
        let inner = config.hidden + config.intermediate + config.top_k;
        let part = tolerance::layer(inner, call.x.dtype(), 0.0);
        // rounding errors of long sums cancel: the magnitudes of thousands of terms would allow nearly anything
        let largest = sums.values.iter().fold(0.0f64, |m, y| m.max(y.abs()));
        let bound =
            |(value, magnitude): (&f64, &f64)| tolerance::stored(call.y.dtype(), *value, part * magnitude.min(largest));
        let allowed: Vec<f64> = sums.values.iter().zip(&sums.magnitudes).map(bound).collect();
        let name = format!("y of token {token} ");
        verdict = verdict.worse(compare::floats(&name, Shape::from([y.len()]), [&sums.values, &allowed, &y]));
    }
    verdict
}

/// Compares the routes of `tokens` with what the rule makes of the call's logits, or of the router's product with x in
/// f64; experts that are nearly tied may change places. Routes by token id are taken as they are, and so are those of a
/// layer with neither logits nor a router.
///
/// Costs `E H` products a token without logits. The layer is one that a backend has prepared; a token that does not exist is a failure.
pub fn check_routes(config: &LayerConfig, weights: &LayerWeights<'_>, call: &Call<'_>, tokens: &[usize]) -> Comparison {
    let LayerConfig { hidden, experts, top_k, .. } = *config;
    if config.routing.selection == Selection::Table || (weights.router.is_none() && call.logits.is_none()) {
        return Comparison::default();
    }
    let router = weights.router.filter(|_| call.logits.is_none());
    let router: Option<Vec<f64>> =
        router.map(|router| (0..router.rows()).flat_map(|e| row(&router, e).unwrap_or_default()).collect());
    let vector = |view: &Option<HostView<'_>>| view.as_ref().and_then(|view| row(view, 0));
    let (bias, norm_weight) = (vector(&weights.router_bias), vector(&weights.router_norm));
    let (correction_bias, expert_scale) = (vector(&weights.correction_bias), vector(&weights.expert_scale));
    let (gate_config, rule) = (config.gate, config.routing);
    let mut verdict = Comparison::default();
    for &token in tokens {
        let (Some(x), Some((ids, factors))) = (row(&call.x, token), call.slots(config, token)) else {
            return past_the_end(token);
        };
        let (logits, errors) = match (&router, &call.logits) {
            (Some(router), _) => {
                let (x, bias, norm_weight) = (&x[..], bias.as_deref(), norm_weight.as_deref());
                let gate = Gate { x, router, bias, norm_weight, config: gate_config, tokens: 1, hidden, experts };
                let (gated, errors) = gated(&gate);
                (gated.logits, errors)
            }
            (None, logits) => match logits.as_ref().and_then(|logits| row(logits, token)) {
                Some(logits) => (logits, vec![0.0; experts]),
                None => return past_the_end(token),
            },
        };
        let choice = Choice::new(rule);
        let (sizes, logits) = ([1, experts, top_k], [&logits[..], &errors[..]]);
        let mut prepared = Prepared::default();
        for (name, values) in [("correction_bias", &correction_bias), ("expert_scale", &expert_scale)] {
            let tensor = values.as_ref().map(|v| Tensor::floats(DType::F32, [experts], v.iter().copied()));
            prepared.input_if(name, tensor);
        }
        choice.outputs(sizes, logits, &mut prepared);
        choice.resolve(sizes, logits, &mut prepared, &[("experts", Values::Ids(ids.to_vec()))]);
        for output in &prepared.outputs {
            let name = format!("{} of token {token} ", output.name);
            verdict = verdict.worse(match &output.expected {
                Expected::Ids(expected) => compare::ids(&name, Shape::from([top_k]), [expected, ids]),
                Expected::Floats { values, allowed } => {
                    let factors: Vec<f64> = factors.iter().copied().map(f64::from).collect();
                    compare::floats(&name, Shape::from([top_k]), [values, allowed, &factors])
                }
                Expected::Anything => Comparison::default(),
            });
        }
    }
    verdict
}

fn past_the_end(token: usize) -> Comparison {
    Comparison::wrong(format!("token {token} is past the end"))
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
        let rows = products(&expert.down, expert.down_bias, &a);
        for (h, [value, magnitude]) in rows.into_iter().enumerate().take(self.values.len()) {
            self.values[h] += factor * value;
            self.magnitudes[h] += factor.abs() * magnitude;
        }
    }
}

/// `matrix x + bias`.
fn product(matrix: &Matrix<'_>, bias: Option<Matrix<'_>>, x: &[f64]) -> Vec<f64> {
    products(matrix, bias, x).into_iter().map(|[value, _]| value).collect()
}

/// The elements of `matrix x + bias`, and the magnitudes that add up to each.
fn products(matrix: &Matrix<'_>, bias: Option<Matrix<'_>>, x: &[f64]) -> Vec<[f64; 2]> {
    let of_row = |buffer: &mut Vec<u8>, row: usize| {
        let weights = matrix_row(matrix, row, buffer);
        let bias = bias.map_or(0.0, |bias| element(&bias, row));
        let terms = weights.iter().zip(x).map(|(w, x)| w * x);
        terms.fold([bias, bias.abs()], |[value, magnitude], term| [value + term, magnitude + term.abs()])
    };
    (0..matrix.rows()).into_par_iter().map_init(Vec::new, of_row).collect()
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
    let first = view.offset() + row.checked_mul(view.row_stride() * size)?;
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
    use crate::data::{Data, Spread};
    use fused_moe_core::config::SelectBy;
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
            let call = Call { x, experts: routes.as_ids(), weights: &factors, logits: None, y };
            super::check(&config, &weights, &call, tokens)
        };
        assert_eq!(check(&y, &[0, 4]).failure, None);
        assert!(check(&y, &[5]).failure.is_some());
        let mut wrong = y;
        wrong[4 * 24 + 7] += 0.3;
        assert_eq!(check(&wrong, &[0]).failure, None);
        assert!(check(&wrong, &[4]).failure.unwrap().starts_with("y of token 4 [7]"));
    }

    #[test]
    fn routes_are_those_of_the_router() {
        let mut config = LayerConfig::new(24, 10, 6, 2);
        let data = Data::new("routes of rows");
        let x = data.of("x").tokens(DType::BF16, [5, 24]);
        let router = data.of("router").normal(DType::BF16, [6, 24], 0.2);
        let bias = data.of("bias").normal(DType::F32, [6], 0.3);
        let matrices = data.of("matrices").normal(DType::BF16, [6, 20, 24], 0.2);
        let down = data.of("down").normal(DType::BF16, [6, 24, 10], 0.2);
        let layout = StackLayout::default();
        let experts = ExpertWeights::stacked(matrices.view().unwrap(), down.view().unwrap(), layout).unwrap();
        let mut weights = LayerWeights::new(router.view().unwrap(), experts);
        weights.correction_bias = Some(bias.view().unwrap());
        config.routing.selection = Selection::TopK { by: SelectBy::Score, bias: true, groups: None };
        let logits = reference::gate(&Gate {
            x: x.as_floats(),
            router: router.as_floats(),
            bias: None,
            norm_weight: None,
            config: config.gate,
            tokens: 5,
            hidden: 24,
            experts: 6,
        });
        let routes = reference::route(
            &logits.logits,
            &reference::Route {
                rule: config.routing,
                correction_bias: Some(bias.as_floats()),
                expert_scale: None,
                table: None,
                tokens: 5,
                experts: 6,
                top_k: 2,
            },
        );
        let factors: Vec<f32> = routes.weights.iter().map(|&w| w as f32).collect();
        let given: Vec<f32> = logits.logits.iter().map(|&logit| logit as f32).collect();
        let given = HostView::of(&given, [5, 6]).unwrap();
        let check_from = |logits, experts: &[u32], factors: &[f32], token| {
            let x = x.view().unwrap();
            check_routes(&config, &weights, &Call { x, experts, weights: factors, logits, y: x }, &[token]).failure
        };
        let check = |experts: &[u32], factors: &[f32], token| check_from(None, experts, factors, token);
        for token in 0..5 {
            assert_eq!(check(&routes.experts, &factors, token), None);
            assert_eq!(check_from(Some(given), &routes.experts, &factors, token), None);
        }
        let others = HostView::of(&[-9f32, -9.0, 0.3, 0.4, 5.0, 6.0], [1, 6]).unwrap();
        assert!(check_from(Some(others), &[0, 1], &factors, 0).unwrap().starts_with("experts of token 0 [0]"));
        assert!(check_from(Some(others), &routes.experts, &factors, 1).is_some());
        let mut other = routes.experts.clone();
        other.swap(4, 5);
        assert!(check(&other, &factors, 2).unwrap().starts_with("experts of token 2 [0]"));
        let mut heavy = factors.clone();
        heavy[5] *= 1.001;
        assert!(check(&routes.experts, &heavy, 2).unwrap().starts_with("weights of token 2 [1]"));
        assert!(check(&routes.experts, &factors, 5).is_some());
    }

    #[test]
    fn samples() {
        assert!(sample(0, 3).is_empty());
        assert_eq!(sample(1, 3), [0]);
        assert_eq!(sample(2, 3), [0, 1]);
        assert_eq!(sample(9, 3), [0, 4, 8]);
        assert_eq!((sample(9, 1), sample(9, 0)), (vec![0], vec![]));
    }
}
