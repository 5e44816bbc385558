//! A few rows of the gradients of a layer, held against f64: for layers too large to be worked out whole.

use super::{matrix_row, past_the_end, product, row};
use crate::compare::{self, Comparison};
use crate::tolerance;
use fused_moe_core::config::LayerConfig;
use fused_moe_core::reference::{RouteBackward, activate, activate_backward, route_backward};
use fused_moe_core::weights::{ExpertMatrices, LayerWeights, Matrix};
use fused_moe_core::{DType, HostView, Shape};
use rayon::prelude::*;
use std::ops::Range;

/// A backward pass of a layer of a router and experts alone: what went in, the routes that were taken, what came out. The
/// gradients were assigned.
#[derive(Clone, Copy, Debug)]
pub struct BackwardCall<'a> {
    /// `[T, H]`.
    pub x: HostView<'a>,
    /// `[T, K]`.
    pub experts: &'a [u32],
    /// `[T, K]`.
    pub weights: &'a [f32],
    /// `[T, E]`, where the routes were made of them and not of the router's.
    pub logits: Option<HostView<'a>>,
    /// `[T, H]`.
    pub d_y: HostView<'a>,
    /// `[T, H]`.
    pub d_x: HostView<'a>,
    /// `[T, E]`.
    pub d_logits: HostView<'a>,
    /// `[E, H]`, where the logits are the router's.
    pub d_router: Option<HostView<'a>>,
    /// `[E, N, H]`, N being 2I, gate rows first, or I without gate; where matrices are looked at.
    pub d_gate_up: Option<HostView<'a>>,
    /// `[E, H, I]`, likewise.
    pub d_down: Option<HostView<'a>>,
}

/// What is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// Tokens, whose rows of `d_x` and `d_logits` are worked out.
    pub tokens: &'a [usize],
    /// Experts and numbers below I: the rows of `d_gate_up` and the column of `d_down` that this number has in the expert,
    /// and the expert's row of `d_router`, for which `d_logits` are taken as they were found.
    pub matrices: &'a [[usize; 2]],
}

/// Compares a sample of the gradients with what the routes and the weights say, in f64, on all processors.
///
/// The layer has no biases but the router's, no norm, no soft-cap, no shared expert, and weighs outputs. Costs `9 K H I`
/// products a token and `5 H` for each row of an expert.
pub fn check_backward(
    config: &LayerConfig,
    weights: &LayerWeights<'_>,
    call: &BackwardCall<'_>,
    sample: &Sample<'_>,
) -> Comparison {
    let check = Check { config, weights, call };
    let tokens = sample.tokens.par_iter().map(|&t| check.token(t).unwrap_or_else(|| past_the_end(t)));
    let missing = |e: usize| Comparison::wrong(format!("expert {e} is past the end"));
    let experts = sample.matrices.par_iter().map(|&[e, i]| check.expert(e, i).unwrap_or_else(|| missing(e)));
    let verdicts: Vec<Comparison> = tokens.chain(experts).collect();
    verdicts.into_iter().fold(Comparison::default(), Comparison::worse)
}

struct Check<'a> {
    config: &'a LayerConfig,
    weights: &'a LayerWeights<'a>,
    call: &'a BackwardCall<'a>,
}

impl Check<'_> {
    fn matrices(&self, expert: usize) -> Option<&ExpertMatrices<'_>> {
        self.weights.experts.iter().nth(expert)
    }

    /// `d_x` and `d_logits` of a token.
    fn token(&self, t: usize) -> Option<Comparison> {
        let LayerConfig { hidden, experts, top_k, activation, routed_scale, routing, .. } = *self.config;
        let slots = t.checked_mul(top_k)?..t.checked_add(1)?.checked_mul(top_k)?;
        let (ids, factors) = (self.call.experts.get(slots.clone())?, self.call.weights.get(slots)?);
        let (x, d_y) = (row(&self.call.x, t)?, row(&self.call.d_y, t)?);
        let (mut d_x, mut d_weights) = (vec![0.0; hidden], vec![0.0; top_k]);
        for ((&id, &factor), d_weight) in ids.iter().zip(factors).zip(&mut d_weights) {
            let Some(expert) = self.matrices(id as usize) else { continue };
            let scale = f64::from(routed_scale);
            let gate = expert.gate.map_or(Vec::new(), |gate| product(&gate, None, &x));
            let up = product(&expert.up, None, &x);
            let d_a = transposed(&expert.down, &d_y);
            let gates = gate.into_iter().chain(std::iter::repeat(0.0));
            let mut d_z = Vec::with_capacity(up.len());
            for ((g, u), d) in gates.zip(up).zip(d_a) {
                *d_weight += scale * d * activate(activation, g, u);
                d_z.push(activate_backward(activation, g, u).map(|slope| scale * f64::from(factor) * d * slope));
            }
            let part = |n: usize| d_z.iter().map(|d| d[n]).collect::<Vec<f64>>();
            let of_gate = expert.gate.map(|gate| transposed(&gate, &part(0)));
            add(&mut d_x, &of_gate.unwrap_or_default());
            add(&mut d_x, &transposed(&expert.up, &part(1)));
        }
        let logits = match (&self.call.logits, &self.weights.router) {
            (Some(logits), _) => row(logits, t)?,
            (None, Some(router)) => {
                let bias = self.weights.router_bias.as_ref().and_then(|bias| row(bias, 0));
                let scale = f64::from(self.config.gate.scale);
                let bias = |e: usize| bias.as_ref().and_then(|bias| bias.get(e)).copied().unwrap_or(0.0);
                let logit = |e: usize| Some(scale * dot(&row(router, e)?, &x) + bias(e));
                (0..experts).map(logit).collect::<Option<Vec<f64>>>()?
            }
            (None, None) => return None,
        };
        let of_weights = |d_weights: &[f64]| {
            let (rule, expert_scale, tokens) = (routing, None, 1);
            route_backward(&RouteBackward {
                logits: &logits,
                ids,
                d_weights,
                rule,
                expert_scale,
                tokens,
                experts,
                top_k,
            })
            .logits
        };
        let d_logits = of_weights(&d_weights);
        // these are differences of the weights' gradients, whose errors do not cancel where they do
        let error = self.part(&d_weights);
        let mut carried = vec![0.0; experts];
        for k in 0..top_k {
            let alone: Vec<f64> = (0..top_k).map(|other| if other == k { error } else { 0.0 }).collect();
            add(&mut carried, &of_weights(&alone).iter().map(|d| d.abs()).collect::<Vec<f64>>());
        }
        if let (None, Some(router)) = (&self.call.logits, &self.weights.router) {
            for (e, d) in d_logits.iter().enumerate().filter(|(_, d)| **d != 0.0) {
                let d = d * f64::from(self.config.gate.scale);
                add(&mut d_x, &row(router, e)?.iter().map(|w| d * w).collect::<Vec<f64>>());
            }
        }
        let found = row(&self.call.d_logits, t)?;
        let part = self.part(&d_logits);
        let allowed: Vec<f64> = d_logits
            .iter()
            .zip(carried)
            .map(|(v, carried)| tolerance::stored(DType::F32, *v, part.max(carried)))
            .collect();
        let shape = Shape::from([experts]);
        let verdict = compare::floats(&format!("d_logits of token {t} "), shape, [&d_logits, &allowed, &found]);
        let found = row(&self.call.d_x, t)?;
        Some(verdict.worse(self.compare(&format!("d_x of token {t} "), &d_x, (&found, self.call.d_x.dtype()))))
    }

    /// What number i of an expert has of the gradients of its matrices, and its row of the router's.
    fn expert(&self, e: usize, i: usize) -> Option<Comparison> {
        let LayerConfig { hidden, intermediate, top_k, activation, routed_scale, .. } = *self.config;
        let expert = self.matrices(e)?;
        let column: Vec<f64> = (0..hidden).map(|h| at(&expert.down, h, i)).collect();
        let of = |matrix: &Matrix<'_>| matrix_row(matrix, i, &mut Vec::new());
        let (gate, up) = (expert.gate.as_ref().map(of), of(&expert.up));
        let [mut d_gate, mut d_up, mut d_down] = [(); 3].map(|()| vec![0.0; hidden]);
        for (slot, _) in self.call.experts.iter().enumerate().filter(|(_, id)| **id as usize == e) {
            let t = slot.checked_div(top_k)?;
            let (x, d_y) = (row(&self.call.x, t)?, row(&self.call.d_y, t)?);
            let (g, u) = (gate.as_ref().map_or(0.0, |gate| dot(gate, &x)), dot(&up, &x));
            let weight = f64::from(routed_scale) * f64::from(*self.call.weights.get(slot)?);
            let d_z = activate_backward(activation, g, u).map(|slope| weight * dot(&d_y, &column) * slope);
            let a = weight * activate(activation, g, u);
            for (sum, factor, row) in [(&mut d_gate, d_z[0], &x), (&mut d_up, d_z[1], &x), (&mut d_down, a, &d_y)] {
                add(sum, &row.iter().map(|v| factor * v).collect::<Vec<f64>>());
            }
        }
        let rows = self.config.gate_up_rows();
        let (d_rows, down) = (self.call.d_gate_up.as_ref()?, self.call.d_down.as_ref()?);
        let dtype = d_rows.dtype();
        let mut verdict = Comparison::default();
        if expert.gate.is_some() {
            let found = row(d_rows, e * rows + i)?;
            verdict = verdict.worse(self.compare(&format!("d_gate {i} of expert {e} "), &d_gate, (&found, dtype)));
        }
        let found = row(d_rows, e * rows + rows - intermediate + i)?;
        verdict = verdict.worse(self.compare(&format!("d_up {i} of expert {e} "), &d_up, (&found, dtype)));
        let found = (0..hidden).map(|h| row(down, e * hidden + h)?.get(i).copied()).collect::<Option<Vec<f64>>>()?;
        verdict = verdict.worse(self.compare(&format!("d_down {i} of expert {e} "), &d_down, (&found, down.dtype())));
        let Some(d_router) = &self.call.d_router else { return Some(verdict) };
        let mut sum = vec![0.0; hidden];
        for t in 0..self.call.x.rows() {
            let d = f64::from(self.config.gate.scale) * row(&self.call.d_logits, t)?.get(e)?;
            if d != 0.0 {
                add(&mut sum, &row(&self.call.x, t)?.iter().map(|x| d * x).collect::<Vec<f64>>());
            }
        }
        let name = format!("d_router of expert {e} ");
        Some(verdict.worse(self.compare(&name, &sum, (&row(d_router, e)?, d_router.dtype()))))
    }

    /// What sums and intermediates in the format of x may be off by, as a part of the largest.
    fn part(&self, of: &[f64]) -> f64 {
        let LayerConfig { hidden, intermediate, top_k, experts, .. } = *self.config;
        let inner = hidden + intermediate + top_k + experts + self.call.x.rows();
        let largest = of.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        tolerance::layer(inner, self.call.x.dtype(), 0.0) * largest
    }

    /// Each within [`part`](Self::part) of them.
    fn compare(&self, name: &str, expected: &[f64], (found, dtype): (&[f64], DType)) -> Comparison {
        let part = self.part(expected);
        let allowed: Vec<f64> = expected.iter().map(|v| tolerance::stored(dtype, *v, part)).collect();
        compare::floats(name, Shape::from([expected.len()]), [expected, &allowed, found])
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(sum: &mut [f64], values: &[f64]) {
    sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
}

fn at(matrix: &Matrix<'_>, row: usize, col: usize) -> f64 {
    matrix_row(matrix, row, &mut Vec::new()).get(col).copied().unwrap_or(0.0)
}

/// `sum_m v[m] * matrix[m]`.
fn transposed(matrix: &Matrix<'_>, v: &[f64]) -> Vec<f64> {
    /// Rows that are added up together: the order of the sum does not depend on the threads.
    const ROWS: usize = 64;
    let part = |rows: Range<usize>| {
        let mut sum = vec![0.0; matrix.cols()];
        let mut buffer = Vec::new();
        for m in rows {
            let factor = v.get(m).copied().unwrap_or(0.0);
            add(&mut sum, &matrix_row(matrix, m, &mut buffer).iter().map(|w| factor * w).collect::<Vec<f64>>());
        }
        sum
    };
    let rows = matrix.rows();
    let parts: Vec<Vec<f64>> =
        (0..rows.div_ceil(ROWS)).into_par_iter().map(|n| part(n * ROWS..rows.min((n + 1) * ROWS))).collect();
    let mut sum = vec![0.0; matrix.cols()];
    parts.iter().for_each(|part| add(&mut sum, part));
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Data, Tensor};
    use fused_moe_core::config::{Activation, Function};
    use fused_moe_core::reference::{Input, Layer, LayerBackward, Source, backward, forward_saving};
    use fused_moe_core::weights::{ExpertWeights, StackLayout};

    const F32: DType = DType::F32;
    const TOKENS: usize = 7;

    /// The verdict where one element of a gradient, or none, is wrong.
    fn verdict(config: &LayerConfig, from_router: bool, wrong: Option<(&str, usize)>) -> Option<String> {
        let LayerConfig { hidden: h, intermediate: i, experts: e, top_k: k, .. } = *config;
        let n = config.gate_up_rows();
        let data = Data::new("rows_backward");
        let normal = |name: &str, rows, cols| data.of(name).normal(F32, [rows, cols], 0.3);
        let (x, d_y, router) = (normal("x", TOKENS, h), normal("d_y", TOKENS, h), normal("router", e, h));
        let logits = normal("logits", TOKENS, e);
        let (gate_up, down) =
            (data.of("gate_up").normal(F32, [e, n, h], 0.3), data.of("down").normal(F32, [e, h, i], 0.3));
        let layer = Layer {
            router: router.as_floats(),
            gate_up: gate_up.as_floats(),
            down: down.as_floats(),
            ..Layer::default()
        };
        let input = Input { x: x.as_floats(), tokens: TOKENS, ..Input::default() };
        let source = if from_router { Source::Router } else { Source::Logits(logits.as_floats()) };
        let (_, saved) = forward_saving(config, &layer, &input, source);
        let op = LayerBackward {
            d_y: d_y.as_floats(),
            d_logits: None,
            x: x.as_floats(),
            source,
            saved: &saved,
            tokens: TOKENS,
        };
        let d = backward(config, &layer, &op);
        let found = |name: &str, shape: [usize; 2], values: &[f64]| {
            let mut values = values.to_vec();
            if let Some((_, at)) = wrong.filter(|(wrong, _)| *wrong == name) {
                values[at] += 0.3;
            }
            Tensor::floats(F32, shape, values)
        };
        let d_x = found("x", [TOKENS, h], &d.x);
        let d_logits = found("logits", [TOKENS, e], &d.logits);
        let d_router = found("router", [e, h], &d.router);
        let (d_gate_up, d_down) = (found("gate_up", [e * n, h], &d.gate_up), found("down", [e * h, i], &d.down));
        let (rows, layout) = (gate_up.view().unwrap(), StackLayout::default());
        let experts = if config.activation.is_gated() {
            ExpertWeights::stacked(rows, down.view().unwrap(), layout)
        } else {
            ExpertWeights::stacked_apart(None, rows, down.view().unwrap(), layout)
        };
        let weights = LayerWeights::new(router.view().unwrap(), experts.unwrap());
        let factors: Vec<f32> = saved.weights.iter().map(|&w| w as f32).collect();
        let call = BackwardCall {
            x: x.view().unwrap(),
            experts: &saved.experts,
            weights: &factors,
            logits: (!from_router).then(|| logits.view().unwrap()),
            d_y: d_y.view().unwrap(),
            d_x: d_x.view().unwrap(),
            d_logits: d_logits.view().unwrap(),
            d_router: from_router.then(|| d_router.view().unwrap()),
            d_gate_up: Some(d_gate_up.view().unwrap()),
            d_down: Some(d_down.view().unwrap()),
        };
        let sample = Sample { tokens: &[0, 6], matrices: &[[0, 0], [1, 3], [4, 4]] };
        assert_eq!(saved.experts.len(), TOKENS * k);
        check_backward(config, &weights, &call, &sample).failure
    }

    #[test]
    fn agrees_with_the_reference_and_notices_a_wrong_element() {
        let plain = Activation::Plain(Function::ReluSquared);
        let gated = LayerConfig { routed_scale: 2.5, ..LayerConfig::new(12, 5, 6, 2) };
        for config in [LayerConfig { activation: plain, ..gated.clone() }, gated] {
            let rows = config.gate_up_rows();
            for from_router in [true, false] {
                assert_eq!(verdict(&config, from_router, None), None);
                // of token 6; of its logits; of expert 1, number 3
                let places =
                    [("x", 6 * 12 + 11), ("logits", 6 * 6 + 1), ("gate_up", (2 * rows - 2) * 12), ("down", 17 * 5 + 3)];
                for (name, at) in places.into_iter().chain(from_router.then_some(("router", 12 + 4))) {
                    let failure = verdict(&config, from_router, Some((name, at)));
                    assert!(failure.is_some_and(|text| text.contains("d_")), "{name}");
                }
            }
        }
    }

    #[test]
    fn what_does_not_exist_is_a_failure() {
        let (empty, ids) = ([0f32; 0], [0u32; 0]);
        let none = HostView::of(&empty, [0, 4]).unwrap();
        let call = BackwardCall {
            x: none,
            experts: &ids,
            weights: &empty,
            logits: None,
            d_y: none,
            d_x: none,
            d_logits: none,
            d_router: None,
            d_gate_up: None,
            d_down: None,
        };
        let numbers = [0.5f32; 48];
        let stack = |shape: [usize; 3]| HostView::of(&numbers, shape).unwrap();
        let experts = ExpertWeights::stacked(stack([2, 6, 4]), stack([2, 4, 3]), StackLayout::default()).unwrap();
        let weights = LayerWeights::new(HostView::of(&numbers, [2, 4]).unwrap(), experts);
        let config = LayerConfig::new(4, 3, 2, 1);
        for sample in [Sample { tokens: &[0], matrices: &[] }, Sample { tokens: &[], matrices: &[[2, 0]] }] {
            assert!(check_backward(&config, &weights, &call, &sample).failure.is_some());
        }
    }
}
