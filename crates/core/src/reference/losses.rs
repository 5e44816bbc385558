//! What is added to a model's loss so that the router behaves.

use super::route::score;
use super::route_backward::through_scores;
use crate::config::Score;

/// Operands of [`load_balance_loss`].
#[derive(Clone, Copy, Debug)]
pub struct LoadBalance<'a> {
    /// `[T, E]`.
    pub logits: &'a [f64],
    /// `[T, K]`; an id `>= E` counts for no expert.
    pub ids: &'a [u32],
    /// What makes probabilities of the logits.
    pub score: Score,
    /// `[N + 1]`, ascending: the tokens of sequence s are `sequences[s]..sequences[s+1]`. An end below one before it counts
    /// as that one, an end above T as T. Absent: all tokens are one sequence.
    pub sequences: Option<&'a [u32]>,
    /// Factor on the loss.
    pub coefficient: f64,
    /// T.
    pub tokens: usize,
    /// E.
    pub experts: usize,
    /// K.
    pub top_k: usize,
}

/// A loss and what it does to the logits.
#[derive(Clone, Debug, PartialEq)]
pub struct Loss {
    /// The loss.
    pub value: f64,
    /// Its gradient, `[T, E]`.
    pub logits: Vec<f64>,
}

/// The load-balancing loss, the mean over N sequences of L tokens each (N = 1 and L = T for the whole batch):
///
/// ```text
/// p[t,e]  = s[t,e] / sum_j s[t,j]                       the probabilities; a softmax is one already
/// f[e]    = (slots of e in the sequence) / (K * L)      a constant: it has no gradient
/// P[e]    = mean over the sequence of p[t,e]
/// loss    = coefficient / N * sum over sequences of E * sum_e f[e] * P[e]
/// ```
///
/// Evenly spread slots or probabilities give `coefficient`. A sequence without tokens adds nothing, but counts in N. A
/// token of no sequence (before the first end or behind the last) adds nothing. A
/// token whose scores add up to 0, or without a finite logit, has probabilities 0 and no gradient. Meant for scores that
/// are not negative; [`Score::Logit`] is taken as it is.
///
/// Sources: Fedus, Zoph, Shazeer, "Switch Transformers", arXiv:2101.03961, (4) to (6), for K = 1; the sequence-wise form
/// is DeepSeek-V3's, arXiv:2412.19437, (17) to (20). Implementations that divide `f` by L alone have K times this.
///
/// ```
/// use fused_moe_core::{config::Score, reference::{LoadBalance, load_balance_loss}};
/// let op = LoadBalance { logits: &[0.0; 4], ids: &[0, 0], score: Score::Softmax, sequences: None, coefficient: 0.5,
///                        tokens: 2, experts: 2, top_k: 1 };
/// let loss = load_balance_loss(&op);
/// assert_eq!((loss.value, loss.logits), (0.5, vec![0.125, -0.125, 0.125, -0.125]));
/// ```
pub fn load_balance_loss(op: &LoadBalance<'_>) -> Loss {
    let experts = op.experts;
    let whole = [0, op.tokens as u32];
    let sequences = op.sequences.unwrap_or(&whole);
    let count = sequences.len().saturating_sub(1);
    let mut loss = Loss { value: 0.0, logits: vec![0.0; op.tokens * experts] };
    let mut done = 0;
    let mut ends = sequences.iter().map(|&end| {
        done = op.tokens.min(end as usize).max(done);
        done
    });
    let mut begin = ends.next().unwrap_or(0);
    for end in ends {
        let tokens = begin..end;
        begin = end;
        if tokens.is_empty() {
            continue;
        }
        let length = tokens.len() as f64;
        let mut counts = vec![0.0; experts];
        for &id in &op.ids[tokens.start * op.top_k..tokens.end * op.top_k] {
            if let Some(count) = counts.get_mut(id as usize) {
                *count += 1.0;
            }
        }
        // what the loss has for each unit of a token's probability
        let factor = op.coefficient * experts as f64 / (op.top_k as f64 * length * length * count as f64);
        for t in tokens {
            let logits = &op.logits[t * experts..(t + 1) * experts];
            let scores = score::scores(logits, op.score);
            let sum: f64 = scores.iter().sum();
            if sum == 0.0 || !logits.iter().any(|l| l.is_finite()) {
                continue;
            }
            let mean = scores.iter().zip(&counts).map(|(s, count)| s / sum * count).sum::<f64>();
            loss.value += factor * mean;
            let d_scores: Vec<f64> = counts.iter().map(|count| factor * (count - mean) / sum).collect();
            through_scores(logits, op.score, &d_scores, &mut loss.logits[t * experts..(t + 1) * experts]);
        }
    }
    loss
}

/// The router z-loss: `coefficient * mean_t(z[t]^2)` with `z[t] = ln(sum_e exp(l[t,e]))`. Its gradient is
/// `coefficient * 2/T * z[t] * softmax(l[t])[e]`.
///
/// - `logits`: `[T, E]`
///
/// A NaN logit is an absent term. A token without a finite logit adds nothing, but counts in T.
///
/// Source: Zoph et al., "ST-MoE", arXiv:2202.08906, (5).
///
/// ```
/// use fused_moe_core::reference::z_loss;
/// let ln2 = 2f64.ln();
/// let loss = z_loss(&[0.0, 0.0], 2, 3.0);
/// assert!((loss.value - 3.0 * ln2 * ln2).abs() < 1e-15 && (loss.logits[0] - 3.0 * ln2).abs() < 1e-15);
/// ```
pub fn z_loss(logits: &[f64], experts: usize, coefficient: f64) -> Loss {
    let tokens = logits.len() / experts.max(1);
    let mut loss = Loss { value: 0.0, logits: Vec::with_capacity(logits.len()) };
    for logits in logits.chunks_exact(experts.max(1)) {
        if !logits.iter().any(|l| l.is_finite()) {
            loss.logits.extend(vec![0.0; experts]);
            continue;
        }
        let max = logits.iter().fold(f64::NEG_INFINITY, |max, &l| if l > max { l } else { max });
        let terms = logits.iter().filter(|l| !l.is_nan()).map(|l| (l - max).exp());
        let z = max + terms.sum::<f64>().ln();
        let factor = coefficient / tokens as f64;
        loss.value += factor * z * z;
        loss.logits.extend(score::softmax(logits).iter().map(|p| 2.0 * factor * z * p));
    }
    loss
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NO_EXPERT;

    const LOGITS: [f64; 12] = [0.3, -1.2, 0.7, 2.0, 0.1, -0.4, 1.1, 0.9, -0.2, 0.5, -2.0, 1.3];

    fn balance(score: Score, sequences: Option<&'static [u32]>) -> LoadBalance<'static> {
        let (ids, tokens, experts, top_k) = (&[3, 2, 0, 2, 3, 1, 9, NO_EXPERT][..], 4, 3, 2);
        LoadBalance { logits: &LOGITS, ids, score, sequences, coefficient: 0.7, tokens, experts, top_k }
    }

    fn central(loss: impl Fn(&[f64]) -> Loss, logits: &[f64]) {
        let (found, step) = (loss(logits).logits, 1e-5);
        for i in 0..logits.len() {
            let at = |d: f64| {
                let mut moved = logits.to_vec();
                moved[i] += d;
                loss(&moved).value
            };
            let expected = (at(step) - at(-step)) / (2.0 * step);
            assert!((found[i] - expected).abs() < 1e-9, "{i}: {} {expected}", found[i]);
        }
    }

    #[test]
    fn load_balance_by_central_differences() {
        for score in [Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus] {
            for sequences in [None, Some(&[0, 1, 1, 4][..])] {
                central(|logits| load_balance_loss(&LoadBalance { logits, ..balance(score, sequences) }), &LOGITS);
            }
        }
    }

    #[test]
    fn load_balance_by_hand() {
        // two tokens, two experts, both to expert 0: f = (1, 0), P = (p, 1 - p)
        let op = LoadBalance {
            logits: &[3f64.ln(), 0.0, 3f64.ln(), 0.0],
            ids: &[0, 0],
            score: Score::Softmax,
            sequences: None,
            coefficient: 1.0,
            tokens: 2,
            experts: 2,
            top_k: 1,
        };
        assert!((load_balance_loss(&op).value - 1.5).abs() < 1e-15);
        let each = LoadBalance { sequences: Some(&[0, 1, 2]), ..op };
        assert!((load_balance_loss(&each).value - 1.5).abs() < 1e-15);
        // balanced over the batch, not over each sequence
        let apart = LoadBalance { ids: &[0, 1], ..op };
        assert!((load_balance_loss(&apart).value - 1.0).abs() < 1e-15);
        let apart = LoadBalance { ids: &[0, 1], ..each };
        assert!((load_balance_loss(&apart).value - 1.0).abs() < 1e-15);
        assert_eq!(load_balance_loss(&LoadBalance { logits: &[], ids: &[], tokens: 0, ..op }).value, 0.0);
    }

    #[test]
    fn ends_that_do_not_ascend_count_as_those_before() {
        let of = |sequences| load_balance_loss(&balance(Score::Softmax, Some(sequences)));
        assert_eq!(of(&[0, 3, 1, 4]), of(&[0, 3, 3, 4]));
        assert_eq!(of(&[1, 3, 9]), of(&[1, 3, 4]));
        assert_eq!(of(&[9, 3]), of(&[4, 4]));
        // tokens of no sequence
        let zeros = |d: &[f64]| d.iter().all(|&d| d == 0.0);
        let (first, last) = (of(&[0, 1]), of(&[2, 4]));
        assert!(first.value != 0.0 && !zeros(&first.logits[..3]) && zeros(&first.logits[3..]));
        assert!(last.value != 0.0 && zeros(&last.logits[..6]) && !zeros(&last.logits[6..]));
        assert_eq!(of(&[2]).value, 0.0);
    }

    #[test]
    fn z_loss_by_central_differences() {
        central(|logits| z_loss(logits, 3, 0.3), &LOGITS);
        let large = z_loss(&[1000.0, 1000.0], 2, 1.0);
        assert!((large.value - (1000.0 + 2f64.ln()).powi(2)).abs() < 1e-6);
    }

    #[test]
    fn tokens_without_a_finite_logit_add_nothing() {
        let logits = [f64::NAN, f64::INFINITY, f64::NAN, 1.0, f64::NAN, 2.0];
        let z = z_loss(&logits, 3, 1.0);
        assert_eq!(z.logits[..3], [0.0; 3]);
        assert_eq!(z.logits[4], 0.0);
        assert!(z.value.is_finite() && z.logits[3] > 0.0);
        let op = LoadBalance {
            logits: &logits,
            ids: &[0, 1],
            tokens: 2,
            experts: 3,
            top_k: 1,
            ..balance(Score::Softmax, None)
        };
        let loss = load_balance_loss(&op);
        assert!(loss.value.is_finite() && loss.logits.iter().all(|d| d.is_finite()));
        assert_eq!(loss.logits[..3], [0.0; 3]);
    }
}
