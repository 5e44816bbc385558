//! From the gradient of the routing weights to that of the logits.

use super::route::score;
use super::sigmoid;
use crate::NO_EXPERT;
use crate::config::{ExpertScale, Normalize, RoutingRule, Score, Selection, WeightRule, WeightValue};

/// Operands of [`route_backward`].
#[derive(Clone, Copy, Debug)]
pub struct RouteBackward<'a> {
    /// `[T, E]`.
    pub logits: &'a [f64],
    /// The experts that were chosen, `[T, K]`.
    pub ids: &'a [u32],
    /// The gradient of the weights, `[T, K]`.
    pub d_weights: &'a [f64],
    /// Score, selection, weight rule.
    pub rule: RoutingRule,
    /// `[E]`, or absent for ones.
    pub expert_scale: Option<&'a [f64]>,
    /// T.
    pub tokens: usize,
    /// E.
    pub experts: usize,
    /// K.
    pub top_k: usize,
}

/// What [`route_backward`] returns.
#[derive(Clone, Debug, PartialEq)]
pub struct RouteGradients {
    /// `[T, E]`.
    pub logits: Vec<f64>,
    /// `[E]`; zeros where the weight rule has no such scale.
    pub expert_scale: Vec<f64>,
}

/// The gradients of [`route`](fn@super::route)'s weights. Each token is treated alone, but for the sum over tokens in
/// `d_expert_scale`.
///
/// **Selection is a constant**: which experts are chosen does not change, so the correction bias, a group's worth and a
/// table have no gradient, experts that are always chosen have that of the others, and the mask of a
/// [`Selection::SparseMixer`] is a constant too: each of its weights is the softmax over the logits of its pass.
///
/// With `v`, `n = norm(v)` and `w` as [`WeightRule`] has them, `g[k] = d_w[k] * scale` (times `expert_scale[e]` if after):
///
/// | normalize | `d_v[k]` |
/// |---|---|
/// | `None` | `g[k]` |
/// | `Sum` | `g[k]/n - sum_j g[j] v[j] / n^2` |
/// | `SumAtLeast` | the same where the sum is at least `min`, on it included; else `g[k]/min` |
/// | `Lp` | `g[k]/n - sum_j g[j] v[j] / n^2 * sign(v[k]) abs(v[k])^(p-1) n^(1-p)`; the last factor 0 where `v[k] = 0` |
///
/// 0 where `n = 0`. Then (times `expert_scale[e]` if before) through the score `s` of the chosen:
///
/// | score | `d_l[e]` |
/// |---|---|
/// | `Softmax` | `s[e] * (d_s[e] - sum_j d_s[j] s[j])` |
/// | `Sigmoid` | `d_s[e] * s[e] * (1 - s[e])` |
/// | `SqrtSoftplus` | `d_s[e] * sigmoid(l[e]) / (2 s[e])`; 0 where `s[e] = 0` |
/// | `Logit` | `d_s[e]` |
/// | [`SoftmaxOfChosen`](WeightValue) | as `Softmax`, over the K chosen |
///
/// An expert that a table names twice has the sum of both gradients. A slot whose id names no expert, a NaN logit, and a
/// token without a finite logit have gradient 0.
///
/// ```
/// use fused_moe_core::{config::*, reference::{RouteBackward, route_backward}};
/// let weights = WeightRule { normalize: Normalize::Sum { eps: 0.0 }, ..WeightRule::default() };
/// let rule = RoutingRule { score: Score::Logit, weights, ..RoutingRule::default() };
/// // w = (3, 1) / 4
/// let d = route_backward(&RouteBackward { logits: &[3.0, 0.0, 1.0], ids: &[0, 2], d_weights: &[1.0, 0.0], rule,
///                                         expert_scale: None, tokens: 1, experts: 3, top_k: 2 });
/// assert_eq!(d.logits, [0.25 - 3.0 / 16.0, 0.0, -3.0 / 16.0]);
/// ```
pub fn route_backward(op: &RouteBackward<'_>) -> RouteGradients {
    let mut d = RouteGradients { logits: vec![0.0; op.tokens * op.experts], expert_scale: vec![0.0; op.experts] };
    for t in 0..op.tokens {
        let logits = &op.logits[t * op.experts..(t + 1) * op.experts];
        let slots = t * op.top_k..(t + 1) * op.top_k;
        if !logits.iter().any(|l| l.is_finite()) {
            continue;
        }
        // an id that names no expert is as good as none
        let named = |&id: &u32| if (id as usize) < op.experts { id } else { NO_EXPERT };
        let ids = &op.ids[slots.clone()].iter().map(named).collect::<Vec<_>>();
        let values = values(logits, ids, &op.rule);
        let d_values = through_weights(op, ids, &values, &op.d_weights[slots], &mut d.expert_scale);
        let d_logits = &mut d.logits[t * op.experts..(t + 1) * op.experts];
        through_values(logits, ids, &op.rule, &d_values, d_logits);
    }
    d
}

/// What the weights of a token's slots started as, `[K]`; 0 for a slot with [`NO_EXPERT`], which is the only id of none.
fn values(logits: &[f64], ids: &[u32], rule: &RoutingRule) -> Vec<f64> {
    if let Selection::SparseMixer { jitter } = rule.selection {
        return (0..ids.len())
            .map(|pass| match ids[pass] {
                NO_EXPERT => 0.0,
                id => score::softmax(&masked(logits, ids, pass, f64::from(jitter)))[id as usize],
            })
            .collect();
    }
    match rule.weights.value {
        WeightValue::Score => {
            let scores = score::scores(logits, rule.score);
            ids.iter().map(|&id| if id == NO_EXPERT { 0.0 } else { scores[id as usize] }).collect()
        }
        WeightValue::SoftmaxOfChosen => score::softmax(&chosen(logits, ids)),
    }
}

fn chosen(logits: &[f64], ids: &[u32]) -> Vec<f64> {
    ids.iter().map(|&id| if id == NO_EXPERT { f64::NEG_INFINITY } else { logits[id as usize] }).collect()
}

/// The logits that a pass of the sparse mixer takes its softmax over, -inf in place of the others.
fn masked(logits: &[f64], ids: &[u32], pass: usize, jitter: f64) -> Vec<f64> {
    let max = logits[ids[pass] as usize];
    let mut masked = logits.to_vec();
    for (e, logit) in masked.iter_mut().enumerate() {
        let near = *logit == max || max - *logit <= 2.0 * jitter * logit.abs().max(max);
        if ids[..pass].contains(&(e as u32)) || !near {
            *logit = f64::NEG_INFINITY;
        }
    }
    masked
}

/// Through the weight rule: the gradient of `values`, and what the token adds to that of the expert scale.
fn through_weights(
    op: &RouteBackward<'_>,
    ids: &[u32],
    values: &[f64],
    d_weights: &[f64],
    d_scale: &mut [f64],
) -> Vec<f64> {
    let rule = &op.rule.weights;
    let scale_of = |id: u32, when: ExpertScale| match op.expert_scale {
        Some(scale) if rule.expert_scale == Some(when) && id != NO_EXPERT => scale[id as usize],
        _ => 1.0,
    };
    let (before, after) = (ExpertScale::BeforeNormalize, ExpertScale::AfterNormalize);
    let v: Vec<f64> = values.iter().zip(ids).map(|(value, &id)| value * scale_of(id, before)).collect();
    let (divisor, slopes) = divisor(&v, rule);
    if divisor == 0.0 {
        return vec![0.0; v.len()];
    }
    let mut g = vec![0.0; v.len()];
    let mut along = 0.0;
    for k in 0..v.len() {
        if ids[k] == NO_EXPERT {
            continue;
        }
        let d_weight = d_weights[k] * f64::from(rule.scale);
        g[k] = d_weight * scale_of(ids[k], after);
        along += g[k] * v[k];
        if rule.expert_scale == Some(after) {
            d_scale[ids[k] as usize] += d_weight * v[k] / divisor;
        }
    }
    for k in 0..v.len() {
        if ids[k] == NO_EXPERT {
            continue;
        }
        let d_v = g[k] / divisor - along / (divisor * divisor) * slopes[k];
        if rule.expert_scale == Some(before) {
            d_scale[ids[k] as usize] += d_v * values[k];
        }
        g[k] = d_v * scale_of(ids[k], before);
    }
    g
}

/// `norm(v)` and its derivatives, `[K]`.
fn divisor(v: &[f64], rule: &WeightRule) -> (f64, Vec<f64>) {
    let sum: f64 = v.iter().sum();
    match rule.normalize {
        Normalize::None => (1.0, vec![0.0; v.len()]),
        Normalize::Sum { eps } => (sum + f64::from(eps), vec![1.0; v.len()]),
        Normalize::SumAtLeast { min } if sum < f64::from(min) => (f64::from(min), vec![0.0; v.len()]),
        Normalize::SumAtLeast { .. } => (sum, vec![1.0; v.len()]),
        Normalize::Lp { p } => {
            let p = f64::from(p);
            let norm = v.iter().map(|v| v.abs().powf(p)).sum::<f64>().powf(1.0 / p);
            let slope = |v: f64| if v == 0.0 { 0.0 } else { v.signum() * (v.abs() / norm).powf(p - 1.0) };
            (norm, v.iter().map(|&v| slope(v)).collect())
        }
    }
}

/// Through the scores, the softmax of the chosen or the two passes: adds to the gradient of the logits.
fn through_values(logits: &[f64], ids: &[u32], rule: &RoutingRule, d_values: &[f64], d_logits: &mut [f64]) {
    if let Selection::SparseMixer { jitter } = rule.selection {
        for pass in (0..ids.len()).filter(|&pass| ids[pass] != NO_EXPERT) {
            let mut d_scores = vec![0.0; logits.len()];
            d_scores[ids[pass] as usize] = d_values[pass];
            let masked = masked(logits, ids, pass, f64::from(jitter));
            through_softmax(&score::softmax(&masked), &d_scores, d_logits);
        }
        return;
    }
    let valid = |k: &usize| ids[*k] != NO_EXPERT;
    if rule.weights.value == WeightValue::SoftmaxOfChosen {
        let mut d_chosen = vec![0.0; ids.len()];
        through_softmax(&score::softmax(&chosen(logits, ids)), d_values, &mut d_chosen);
        (0..ids.len()).filter(valid).for_each(|k| d_logits[ids[k] as usize] += d_chosen[k]);
        return;
    }
    let mut d_scores = vec![0.0; logits.len()];
    (0..ids.len()).filter(valid).for_each(|k| d_scores[ids[k] as usize] += d_values[k]);
    through_scores(logits, rule.score, &d_scores, d_logits);
}

/// Through the scores of one token: adds to the gradient of its logits.
pub(super) fn through_scores(logits: &[f64], score: Score, d_scores: &[f64], d_logits: &mut [f64]) {
    if score == Score::Softmax {
        return through_softmax(&score::scores(logits, score), d_scores, d_logits);
    }
    let scores = score::scores(logits, score);
    for e in 0..logits.len() {
        d_logits[e] += d_scores[e]
            * match score {
                _ if logits[e].is_nan() => 0.0,
                Score::Sigmoid => sigmoid(logits[e]) * sigmoid(-logits[e]),
                Score::SqrtSoftplus if scores[e] == 0.0 => 0.0,
                Score::SqrtSoftplus => sigmoid(logits[e]) / (2.0 * scores[e]),
                Score::Softmax | Score::Logit => 1.0,
            };
    }
}

fn through_softmax(softmax: &[f64], d_softmax: &[f64], d_logits: &mut [f64]) {
    let along: f64 = softmax.iter().zip(d_softmax).map(|(s, d)| s * d).sum();
    for e in 0..softmax.len() {
        d_logits[e] += softmax[e] * (d_softmax[e] - along);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::*;
    use crate::reference::{Route, Table, route};

    const EXPERTS: usize = 6;
    const LOGITS: [f64; 12] = [0.3, -1.2, 0.7, 2.0, 0.1, -0.4, 1.1, 0.9, -0.2, 0.5, -2.0, 1.3];
    const SCALE: [f64; 6] = [1.2, 0.7, 1.9, 0.4, 1.0, 2.2];
    const BIAS: [f64; 6] = [0.02, -0.3, 0.1, 0.0, 0.4, -0.1];

    /// Every score, selection and weight rule.
    fn rules() -> Vec<RoutingRule> {
        let groups = Groups { count: 3, keep: 2, score: GroupScore::SumOfBestTwo, masked: Masked::NegInfinity };
        let top = |by, bias, groups| Selection::TopK { by, bias, groups };
        // and how many experts are always chosen
        let selections = [
            (top(SelectBy::Score, false, None), 0),
            (top(SelectBy::Score, true, None), 1),
            (top(SelectBy::Score, true, Some(groups)), 0),
            (top(SelectBy::Logit, true, None), 0),
            (Selection::SparseMixer { jitter: 0.4 }, 0),
            (Selection::Table, 0),
        ];
        let normalizers = [
            Normalize::None,
            Normalize::Sum { eps: 0.25 },
            Normalize::SumAtLeast { min: 0.05 },
            Normalize::SumAtLeast { min: 50.0 },
            Normalize::Lp { p: 2.0 },
            Normalize::Lp { p: 1.5 },
        ];
        let mut rules = Vec::new();
        for score in [Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus, Score::Logit] {
            for (selection, always) in selections {
                for normalize in normalizers {
                    for value in [WeightValue::Score, WeightValue::SoftmaxOfChosen] {
                        for expert_scale in
                            [None, Some(ExpertScale::BeforeNormalize), Some(ExpertScale::AfterNormalize)]
                        {
                            let weights = WeightRule { value, expert_scale, normalize, scale: 1.5 };
                            rules.push(RoutingRule { score, selection, always, weights });
                        }
                    }
                }
            }
        }
        rules
    }

    fn op(rule: RoutingRule) -> Route<'static> {
        // token 1 names expert 4 twice, and one that does not exist
        let table = Table { experts: &[0, 3, 2, 5, 1, 0, 4, 4, 6], token_ids: &[1, 2] };
        let top_k = if rule.selection == (Selection::SparseMixer { jitter: 0.4 }) { 2 } else { 3 };
        let table = (rule.selection == Selection::Table).then_some(table);
        let (correction_bias, expert_scale) = (Some(&BIAS[..EXPERTS - rule.always]), Some(&SCALE[..]));
        Route { rule, correction_bias, expert_scale, table, tokens: 2, experts: EXPERTS, top_k }
    }

    fn backward<'a>(op: &Route<'a>, logits: &'a [f64], ids: &'a [u32], d_weights: &'a [f64]) -> RouteBackward<'a> {
        let Route { rule, expert_scale, tokens, experts, top_k, .. } = *op;
        RouteBackward { logits, ids, d_weights, rule, expert_scale, tokens, experts, top_k }
    }

    #[test]
    fn central_differences() {
        let (step, c) = (1e-5, [0.7, -1.1, 0.4, 0.9, 0.3, -0.6]);
        for rule in rules() {
            let op = op(rule);
            let chosen = route(&LOGITS, &op).experts;
            let c = &c[..chosen.len()];
            let loss = |logits: &[f64], expert_scale: &[f64]| {
                let routes = route(logits, &Route { expert_scale: Some(expert_scale), ..op });
                assert_eq!(routes.experts, chosen);
                routes.weights.iter().zip(c).map(|(w, c)| w * c).sum::<f64>()
            };
            let d = route_backward(&backward(&op, &LOGITS, &chosen, c));
            let moved = |of: &[f64], i: usize, by: f64| {
                let mut moved = of.to_vec();
                moved[i] += by;
                moved
            };
            for i in 0..LOGITS.len() {
                let at = |by| loss(&moved(&LOGITS, i, by), &SCALE);
                let expected = (at(step) - at(-step)) / (2.0 * step);
                assert!((d.logits[i] - expected).abs() < 1e-8, "{rule:?} {i}: {} {expected}", d.logits[i]);
            }
            for e in 0..EXPERTS {
                let at = |by| loss(&LOGITS, &moved(&SCALE, e, by));
                let expected = (at(step) - at(-step)) / (2.0 * step);
                assert!((d.expert_scale[e] - expected).abs() < 1e-8, "{rule:?} scale {e}");
            }
        }
    }

    #[test]
    fn what_has_no_gradient() {
        let rule = RoutingRule { score: Score::Sigmoid, ..RoutingRule::default() };
        let route = Route { rule, tokens: 1, ..op(rule) };
        let d = |logits: &[f64], ids: &[u32]| route_backward(&backward(&route, logits, ids, &[1.0; 3])).logits;
        assert_eq!(d(&[f64::NAN, f64::INFINITY, f64::NAN, f64::NAN, f64::NAN, f64::NAN], &[0, 1, 2]), [0.0; 6]);
        let some = d(&[0.0, f64::NAN, f64::NEG_INFINITY, 1.0, 1.0, 1.0], &[0, 1, NO_EXPERT]);
        assert_eq!(some, [0.25, 0.0, 0.0, 0.0, 0.0, 0.0]);
        let far = d(&[0.0, f64::NAN, f64::NEG_INFINITY, 1.0, 1.0, 1.0], &[0, 1, 6]);
        assert_eq!(far, some);
        // a divisor of zero makes the weights a constant
        let weights = WeightRule { normalize: Normalize::Sum { eps: 0.0 }, ..WeightRule::default() };
        let rule = RoutingRule { score: Score::Logit, weights, ..RoutingRule::default() };
        let zero = RouteBackward { rule, ..backward(&route, &[1.0, -1.0, 0.0, 0.0, 0.0, 0.0], &[0, 1, 2], &[1.0; 3]) };
        assert_eq!(route_backward(&zero).logits, [0.0; 6]);
        // a pass of the sparse mixer goes on without the other
        let rule = RoutingRule { selection: Selection::SparseMixer { jitter: 0.4 }, ..RoutingRule::default() };
        let logits = [1.0, 0.9, 0.0, 0.0, 0.0, 0.0];
        let mixer = |ids: &[u32]| {
            let op = RouteBackward { rule, top_k: 2, ..backward(&route, &logits, ids, &[1.0; 2]) };
            route_backward(&op).logits
        };
        for none in [NO_EXPERT, 6] {
            assert_eq!(mixer(&[none, none]), [0.0; 6]);
            assert!(mixer(&[0, none])[0] > 0.0 && mixer(&[none, 0])[0] > 0.0);
        }
    }
}
