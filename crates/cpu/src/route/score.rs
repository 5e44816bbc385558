//! What a logit becomes: in f32 for all experts, to compare them; in f64 for the chosen ones, whose weights may be
//! quotients of scores that f32 has no numbers for.

use crate::arch::Kernels;
use crate::plan::SOFTMAX_TERMS as TERMS;
use fused_moe_core::config::Score;

/// What a softmax is made with.
#[derive(Clone, Copy)]
pub(super) struct Softmax {
    max: f32,
    sum: f64,
}

impl Softmax {
    /// The softmax of logits, one of them finite at least; writes `terms[e] = exp(l[e] - max)`: 0 for NaN, 1 for the
    /// maximum.
    pub(super) fn of(kernels: Kernels, logits: &[f32], terms: &mut [f32]) -> Self {
        let max = max(logits);
        let mut sum = 0.0;
        if max == f32::INFINITY {
            for (term, &logit) in terms.iter_mut().zip(logits) {
                *term = if logit == max { 1.0 } else { 0.0 };
                sum += f64::from(*term);
            }
            return Self { max, sum };
        }
        for (terms, logits) in terms.chunks_mut(TERMS).zip(logits.chunks(TERMS)) {
            for (term, &logit) in terms.iter_mut().zip(logits) {
                *term = if logit.is_nan() { f32::NEG_INFINITY } else { logit };
            }
            sum += f64::from(kernels.exp_sum(terms, max));
        }
        Self { max, sum }
    }

    fn value(self, logit: f32) -> f64 {
        if logit == self.max { 1.0 / self.sum } else { (f64::from(logit) - f64::from(self.max)).exp() / self.sum }
    }
}

/// The largest; -inf where there is none but NaN.
fn max(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 8];
    let (eights, rest) = values.as_chunks::<8>();
    for values in eights {
        for (lane, &value) in lanes.iter_mut().zip(values) {
            *lane = if value > *lane { value } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, &value| if value > max { value } else { max })
}

/// The scores of all experts. For a softmax `scores` holds its terms already.
pub(super) fn scores(kernels: Kernels, score: Score, softmax: Option<Softmax>, logits: &[f32], scores: &mut [f32]) {
    match (score, softmax) {
        (Score::Softmax, Some(softmax)) => {
            let factor = (1.0 / softmax.sum) as f32;
            scores.iter_mut().for_each(|score| *score *= factor);
        }
        (Score::Sigmoid, _) => {
            exp_of_negated_magnitudes(kernels, logits, scores);
            for (score, &logit) in scores.iter_mut().zip(logits) {
                *score = if logit < 0.0 { *score } else { 1.0 } / (1.0 + *score);
            }
        }
        (Score::SqrtSoftplus, _) => {
            exp_of_negated_magnitudes(kernels, logits, scores);
            for (score, &logit) in scores.iter_mut().zip(logits) {
                *score = (ln_1p(*score) + if logit > 0.0 { logit } else { 0.0 }).sqrt();
            }
        }
        (Score::Softmax, None) | (Score::Logit, _) => scores.copy_from_slice(logits),
    }
}

fn exp_of_negated_magnitudes(kernels: Kernels, logits: &[f32], out: &mut [f32]) {
    for (out, logit) in out.iter_mut().zip(logits) {
        *out = -logit.abs();
    }
    kernels.exp_sum(out, 0.0);
}

/// `ln(1 + x)` for x from 0 to 1: `2 artanh(z)` with `z = x / (2 + x)`, which is a third at most.
fn ln_1p(x: f32) -> f32 {
    let z = x / (2.0 + x);
    let s = z * z;
    let series = 1.0 / 3.0 + s * (1.0 / 5.0 + s * (1.0 / 7.0 + s * (1.0 / 9.0 + s * (1.0 / 11.0 + s * (1.0 / 13.0)))));
    2.0 * (z + z * s * series)
}

/// The score of a chosen expert; 0 for NaN.
pub(super) fn exact(score: Score, softmax: Option<Softmax>, logit: f32) -> f64 {
    let l = f64::from(logit);
    match (score, softmax) {
        _ if logit.is_nan() => 0.0,
        (Score::Softmax, Some(softmax)) => softmax.value(logit),
        (Score::Sigmoid, _) => {
            let e = (-l.abs()).exp();
            if l < 0.0 { e / (1.0 + e) } else { 1.0 / (1.0 + e) }
        }
        (Score::SqrtSoftplus, _) => ((-l.abs()).exp().ln_1p() + l.max(0.0)).sqrt(),
        (Score::Softmax, None) | (Score::Logit, _) => l,
    }
}

/// The softmax of a few logits in place. NaN counts as -inf; zeros where nothing is above that.
pub(super) fn softmax(values: &mut [f64]) {
    let max = values.iter().fold(f64::NEG_INFINITY, |max, &value| if value > max { value } else { max });
    let mut sum = 0.0;
    for value in values.iter_mut() {
        *value = term(*value, max);
        sum += *value;
    }
    if sum > 0.0 {
        values.iter_mut().for_each(|value| *value /= sum);
    }
}

fn term(logit: f64, max: f64) -> f64 {
    if logit.is_nan() || logit == f64::NEG_INFINITY {
        0.0
    } else if logit == max {
        1.0
    } else {
        (logit - max).exp()
    }
}

/// The softmax of the last of `chosen` among the logits near to it, the others of `chosen` left out.
pub(super) fn masked_softmax(logits: &[f32], chosen: &[u32], jitter: f32) -> f64 {
    let Some((&last, before)) = chosen.split_last() else { return 0.0 };
    let max = f64::from(logits.get(last as usize).copied().unwrap_or(f32::NAN));
    let mut sum = 0.0;
    for (e, &logit) in logits.iter().enumerate() {
        let logit = f64::from(logit);
        let near = max - logit <= 2.0 * f64::from(jitter) * logit.abs().max(max);
        if (near || logit == max) && !before.contains(&(e as u32)) {
            sum += term(logit, max);
        }
    }
    if sum > 0.0 { term(max, max) / sum } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithm_near_one() {
        for i in 0..=1000 {
            for x in [i as f32 / 1000.0, (i as f32 / 1000.0).powi(12)] {
                let expected = f64::from(x).ln_1p();
                assert!((f64::from(ln_1p(x)) - expected).abs() <= 3e-7 * expected, "{x}");
            }
        }
    }

    #[test]
    fn largest_of_any_number() {
        for n in 1..40 {
            for place in 0..n {
                let mut values = vec![f32::NAN; n];
                values[place] = -3.0;
                assert_eq!(max(&values), -3.0);
            }
        }
        assert_eq!(max(&[f32::NAN; 9]), f32::NEG_INFINITY);
    }
}
