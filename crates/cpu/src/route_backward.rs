//! From the gradient of the routing weights to that of the logits: each thread takes some tokens, and works in f64, since
//! quotients of small sums lose their digits.

use crate::Cpu;
use crate::arch::Kernels;
use crate::error::Result;
use crate::grouped_backward::Target;
use crate::plan::{CHUNK, RoutePlan};
use crate::rows::Floats;
use fused_moe_core::Rows;
use fused_moe_core::config::{ExpertScale, Normalize, RoutingRule, Score, Selection, WeightValue};
use fused_moe_core::operation::RouteBackward;
use fused_moe_core::problem::{MAX_EXPERTS, RouteBackwardProblem};

pub(crate) fn route_backward(cpu: &Cpu, operands: RouteBackward<'_, Cpu>) -> Result<()> {
    let RouteBackwardProblem { tokens, experts, top_k, rule } = operands.problem()?;
    let RouteBackward { logits, experts: ids, d_weights, expert_scale, d_logits, d_expert_scale, .. } = operands;
    let read = Read {
        kernels: cpu.kernels,
        rule,
        experts,
        top_k,
        logits: Floats::new(&logits)?,
        ids: ids.typed()?,
        d_weights: d_weights.typed()?,
        expert_scale: Floats::optional(&expert_scale)?,
    };
    if let Some(to) = d_logits.map(Target::new).transpose()? {
        let grain = RoutePlan::new(experts, top_k).rows.part(tokens, cpu.threads());
        cpu.pool.for_each(tokens.div_ceil(grain), 1, |part| {
            let mut token = Token::ZERO;
            for t in part * grain..tokens.min((part + 1) * grain) {
                read.token(t, &mut token, &mut |_, _| ());
                put(cpu.kernels, &to, t, &token.d_logits[..experts]);
            }
        });
    }
    if let Some(to) = d_expert_scale.map(Target::new).transpose()? {
        let (mut sums, mut token) = ([0.0; MAX_EXPERTS], Token::ZERO);
        for t in 0..tokens {
            read.token(t, &mut token, &mut |e, d| sums[e] += d);
        }
        for (e, &sum) in sums[..experts].iter().enumerate() {
            to.put(cpu.kernels, [0, e], &mut [sum as f32]);
        }
    }
    Ok(())
}

/// A row of f64, stored.
pub(crate) fn put(kernels: Kernels, to: &Target<'_>, row: usize, values: &[f64]) {
    let mut part = [0.0; CHUNK];
    for (n, values) in values.chunks(CHUNK).enumerate() {
        let part = &mut part[..values.len()];
        part.iter_mut().zip(values).for_each(|(to, &value)| *to = value as f32);
        to.put(kernels, [row, n * CHUNK], part);
    }
}

/// What is read.
struct Read<'a> {
    kernels: Kernels,
    rule: RoutingRule,
    experts: usize,
    top_k: usize,
    logits: Floats<'a>,
    ids: Rows<'a, u32>,
    d_weights: Rows<'a, f32>,
    expert_scale: Option<Floats<'a>>,
}

/// One token's numbers.
struct Token {
    logits: [f32; MAX_EXPERTS],
    /// The scores, or the softmax of a pass of the sparse mixer.
    scores: [f64; MAX_EXPERTS],
    /// Of the scores, then of the logits.
    d_logits: [f64; MAX_EXPERTS],
    /// `[K]`: what the weights started as, and after the scale before the norm.
    values: [f64; MAX_EXPERTS],
    scaled: [f64; MAX_EXPERTS],
    /// `[K]`.
    d_values: [f64; MAX_EXPERTS],
}

impl Token {
    const ZERO: Self = Self {
        logits: [0.0; MAX_EXPERTS],
        scores: [0.0; MAX_EXPERTS],
        d_logits: [0.0; MAX_EXPERTS],
        values: [0.0; MAX_EXPERTS],
        scaled: [0.0; MAX_EXPERTS],
        d_values: [0.0; MAX_EXPERTS],
    };
}

impl Read<'_> {
    /// Token t's `d_logits`; tells what it adds to each expert's scale.
    fn token(&self, t: usize, token: &mut Token, to_scale: &mut dyn FnMut(usize, f64)) {
        let (experts, ids) = (self.experts, self.ids.row(t));
        let Token { logits, scores, d_logits, values, scaled, d_values } = token;
        let (logits, scores, d_logits) = (&mut logits[..experts], &mut scores[..experts], &mut d_logits[..experts]);
        let (values, d_values) = (&mut values[..self.top_k], &mut d_values[..self.top_k]);
        self.logits.load(self.kernels, t, 0, logits);
        d_logits.fill(0.0);
        if !logits.iter().any(|l| l.is_finite()) {
            return;
        }
        let chosen = |k: usize| ids.get(k).map(|&id| id as usize).filter(|&e| e < experts);
        match (self.rule.selection, self.rule.weights.value) {
            (Selection::SparseMixer { jitter }, _) => {
                for (pass, value) in values.iter_mut().enumerate() {
                    *value = chosen(pass).map_or(0.0, |e| {
                        masked_softmax(logits, ids, pass, f64::from(jitter), scores);
                        scores[e]
                    });
                }
            }
            (_, WeightValue::Score) => {
                make_scores(logits, self.rule.score, scores);
                values.iter_mut().enumerate().for_each(|(k, value)| *value = chosen(k).map_or(0.0, |e| scores[e]));
            }
            (_, WeightValue::SoftmaxOfChosen) => {
                let of = |k: usize| chosen(k).map_or(f64::NEG_INFINITY, |e| f64::from(logits[e]));
                values.iter_mut().enumerate().for_each(|(k, value)| *value = of(k));
                softmax(values);
            }
        }
        self.through_weights(t, (&*values, &mut scaled[..self.top_k]), d_values, to_scale);
        match (self.rule.selection, self.rule.weights.value) {
            (Selection::SparseMixer { jitter }, _) => {
                for (pass, &d_value) in d_values.iter().enumerate() {
                    let Some(e) = chosen(pass) else { continue };
                    masked_softmax(logits, ids, pass, f64::from(jitter), scores);
                    let along = d_value * scores[e];
                    d_logits.iter_mut().zip(&*scores).for_each(|(d, s)| *d -= s * along);
                    d_logits[e] += scores[e] * d_value;
                }
            }
            (_, WeightValue::SoftmaxOfChosen) => {
                let along: f64 = values.iter().zip(&*d_values).map(|(v, d)| v * d).sum();
                for (k, (v, d)) in values.iter().zip(&*d_values).enumerate() {
                    if let Some(e) = chosen(k) {
                        d_logits[e] += v * (d - along);
                    }
                }
            }
            (_, WeightValue::Score) => {
                for (k, d) in d_values.iter().enumerate() {
                    if let Some(e) = chosen(k) {
                        d_logits[e] += d;
                    }
                }
                through_scores(logits, self.rule.score, scores, d_logits);
            }
        }
    }

    /// Through the weight rule: `d_values` of what the weights started as.
    fn through_weights(
        &self,
        t: usize,
        (values, scaled): (&[f64], &mut [f64]),
        d_values: &mut [f64],
        to_scale: &mut dyn FnMut(usize, f64),
    ) {
        let (rule, ids, d_weights) = (self.rule.weights, self.ids.row(t), self.d_weights.row(t));
        let chosen = |k: usize| ids.get(k).map(|&id| id as usize).filter(|&e| e < self.experts);
        let scale = |e: usize, when: ExpertScale| match &self.expert_scale {
            Some(scale) if rule.expert_scale == Some(when) => f64::from(scale.at(0, e)),
            _ => 1.0,
        };
        let (before, after) = (ExpertScale::BeforeNormalize, ExpertScale::AfterNormalize);
        for (k, v) in scaled.iter_mut().enumerate() {
            *v = values[k] * chosen(k).map_or(1.0, |e| scale(e, before));
        }
        let norm = Norm::new(scaled, rule.normalize);
        d_values.fill(0.0);
        if norm.divisor == 0.0 {
            return;
        }
        let mut along = 0.0;
        for (k, d) in d_values.iter_mut().enumerate() {
            let Some(e) = chosen(k) else { continue };
            let d_weight = f64::from(d_weights.get(k).copied().unwrap_or(0.0)) * f64::from(rule.scale);
            *d = d_weight * scale(e, after);
            along += *d * scaled[k];
            if rule.expert_scale == Some(after) {
                to_scale(e, d_weight * scaled[k] / norm.divisor);
            }
        }
        for (k, d) in d_values.iter_mut().enumerate() {
            let Some(e) = chosen(k) else { continue };
            let d_v = *d / norm.divisor - along / (norm.divisor * norm.divisor) * norm.slope(scaled[k]);
            if rule.expert_scale == Some(before) {
                to_scale(e, d_v * values[k]);
            }
            *d = d_v * scale(e, before);
        }
    }
}

/// What the weights of a token are divided by.
struct Norm {
    divisor: f64,
    /// The derivative of the divisor by each value, but for `Lp`.
    slope: f64,
    power: Option<f64>,
}

impl Norm {
    fn new(values: &[f64], normalize: Normalize) -> Self {
        let sum: f64 = values.iter().sum();
        let of = |divisor, slope| Self { divisor, slope, power: None };
        match normalize {
            Normalize::None => of(1.0, 0.0),
            Normalize::Sum { eps } => of(sum + f64::from(eps), 1.0),
            Normalize::SumAtLeast { min } if sum < f64::from(min) => of(f64::from(min), 0.0),
            Normalize::SumAtLeast { .. } => of(sum, 1.0),
            Normalize::Lp { p } => {
                let p = f64::from(p);
                let divisor = values.iter().map(|v| v.abs().powf(p)).sum::<f64>().powf(1.0 / p);
                Self { divisor, slope: 0.0, power: Some(p - 1.0) }
            }
        }
    }

    fn slope(&self, value: f64) -> f64 {
        match self.power {
            None => self.slope,
            Some(_) if value == 0.0 => 0.0,
            Some(power) => value.signum() * (value.abs() / self.divisor).powf(power),
        }
    }
}

/// In place; a NaN is an absent term, a term equal to the maximum counts 1.
pub(crate) fn softmax(values: &mut [f64]) {
    let max = values.iter().fold(f64::NEG_INFINITY, |max, &v| if v > max { v } else { max });
    let mut sum = 0.0;
    for v in values.iter_mut() {
        *v = match *v {
            v if v.is_nan() || v == f64::NEG_INFINITY => 0.0,
            v if v == max => 1.0,
            v => (v - max).exp(),
        };
        sum += *v;
    }
    values.iter_mut().for_each(|v| *v = if sum == 0.0 { 0.0 } else { *v / sum });
}

fn masked_softmax(logits: &[f32], ids: &[u32], pass: usize, jitter: f64, scores: &mut [f64]) {
    let max = ids.get(pass).and_then(|&id| logits.get(id as usize)).map_or(f64::NAN, |&l| f64::from(l));
    for (e, (score, &logit)) in scores.iter_mut().zip(logits).enumerate() {
        let logit = f64::from(logit);
        let near = logit == max || max - logit <= 2.0 * jitter * logit.abs().max(max);
        let taken = ids[..pass].contains(&(e as u32));
        *score = if near && !taken { logit } else { f64::NEG_INFINITY };
    }
    softmax(scores);
}

/// The scores of a token's logits; 0 of a NaN.
pub(crate) fn make_scores(logits: &[f32], score: Score, scores: &mut [f64]) {
    for (s, &logit) in scores.iter_mut().zip(logits) {
        let l = f64::from(logit);
        *s = match score {
            Score::Softmax => l,
            _ if l.is_nan() => 0.0,
            Score::Sigmoid => sigmoid(l),
            Score::SqrtSoftplus => ((-l.abs()).exp().ln_1p() + l.max(0.0)).sqrt(),
            Score::Logit => l,
        };
    }
    if score == Score::Softmax {
        softmax(scores);
    }
}

/// `d` is of the scores before and of the logits after.
pub(crate) fn through_scores(logits: &[f32], score: Score, scores: &[f64], d: &mut [f64]) {
    let along: f64 = if score == Score::Softmax { scores.iter().zip(&*d).map(|(s, d)| s * d).sum() } else { 0.0 };
    for ((d, &s), &logit) in d.iter_mut().zip(scores).zip(logits) {
        let l = f64::from(logit);
        *d = match score {
            Score::Softmax => s * (*d - along),
            _ if l.is_nan() => 0.0,
            Score::Sigmoid => *d * sigmoid(l) * sigmoid(-l),
            Score::SqrtSoftplus if s == 0.0 => 0.0,
            Score::SqrtSoftplus => *d * sigmoid(l) / (2.0 * s),
            Score::Logit => *d,
        };
    }
}

fn sigmoid(x: f64) -> f64 {
    let e = (-x.abs()).exp();
    if x < 0.0 { e / (1.0 + e) } else { 1.0 / (1.0 + e) }
}
