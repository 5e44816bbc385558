//! What a logit becomes.

use crate::config::Score;
use crate::reference::sigmoid;

/// The scores of one token, `[E]`.
pub(in crate::reference) fn scores(logits: &[f64], score: Score) -> Vec<f64> {
    if score == Score::Softmax {
        return softmax(logits);
    }
    let mut scores = Vec::with_capacity(logits.len());
    for &logit in logits {
        scores.push(match score {
            _ if logit.is_nan() => 0.0,
            Score::Sigmoid => sigmoid(logit),
            Score::SqrtSoftplus => softplus(logit).sqrt(),
            Score::Softmax | Score::Logit => logit,
        });
    }
    scores
}

/// `exp(l[i] - max) / sum_j exp(l[j] - max)`; NaN counts as an absent term, a term equal to the maximum as `exp(0)`.
/// Zeros where nothing is above -inf.
pub(in crate::reference) fn softmax(logits: &[f64]) -> Vec<f64> {
    let mut max = f64::NEG_INFINITY;
    for &logit in logits {
        if logit > max {
            max = logit;
        }
    }
    let mut terms = Vec::with_capacity(logits.len());
    let mut sum = 0.0;
    for &logit in logits {
        let term = if logit.is_nan() || logit == f64::NEG_INFINITY {
            0.0
        } else if logit == max {
            1.0
        } else {
            (logit - max).exp()
        };
        sum += term;
        terms.push(term);
    }
    for term in &mut terms {
        *term = if sum == 0.0 { 0.0 } else { *term / sum };
    }
    terms
}

/// `ln(1 + exp(x))` without overflow.
fn softplus(x: f64) -> f64 {
    (-x.abs()).exp().ln_1p() + if x > 0.0 { x } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAN: f64 = f64::NAN;
    const INF: f64 = f64::INFINITY;

    #[test]
    fn softmax_by_hand() {
        let ln = f64::ln;
        let s = scores(&[ln(1.0), ln(2.0), ln(5.0)], Score::Softmax);
        for (s, expected) in s.iter().zip([0.125, 0.25, 0.625]) {
            assert!((s - expected).abs() < 1e-15);
        }
        assert_eq!(scores(&[1e6, 1e6, -1e6], Score::Softmax), [0.5, 0.5, 0.0]);
    }

    #[test]
    fn softmax_of_what_is_not_finite() {
        assert_eq!(softmax(&[0.0, NAN, 0.0, -INF]), [0.5, 0.0, 0.5, 0.0]);
        assert_eq!(softmax(&[3.0, INF, 2.0, INF]), [0.0, 0.5, 0.0, 0.5]);
        assert_eq!(softmax(&[-INF, NAN]), [0.0, 0.0]);
        assert!(softmax(&[]).is_empty());
    }

    #[test]
    fn sigmoid_and_logit() {
        assert_eq!(scores(&[0.0, INF, -INF, NAN], Score::Sigmoid), [0.5, 1.0, 0.0, 0.0]);
        assert_eq!(scores(&[-3.0, INF, NAN], Score::Logit), [-3.0, INF, 0.0]);
    }

    #[test]
    fn sqrt_softplus() {
        let s = scores(&[0.0, 1000.0, -1000.0, NAN, -700.0], Score::SqrtSoftplus);
        assert!((s[0] - 2f64.ln().sqrt()).abs() < 1e-16);
        assert_eq!(s[1], 1000f64.sqrt());
        assert_eq!((s[2], s[3]), (0.0, 0.0));
        assert!((s[4] / (-350f64).exp() - 1.0).abs() < 1e-12);
    }
}
