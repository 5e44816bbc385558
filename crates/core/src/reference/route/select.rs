//! Which K experts a token goes to.

use super::{Candidate, Witness, score::softmax};
use crate::NO_EXPERT;
use crate::config::{GroupScore, Groups, Masked};

/// The keys of one token's experts, `[E]`, and which of them yield to all others.
pub(super) struct Keys {
    pub(super) keys: Vec<f64>,
    pub(super) last_resort: Vec<bool>,
}

/// Keys are the values plus the bias; a NaN logit or a NaN key becomes -inf.
pub(super) fn keys(logits: &[f64], values: &[f64], bias: Option<&[f64]>) -> Keys {
    let mut keys = Vec::with_capacity(values.len());
    for e in 0..values.len() {
        let key = values[e] + bias.map_or(0.0, |bias| bias[e]);
        keys.push(if logits[e].is_nan() || key.is_nan() { f64::NEG_INFINITY } else { key });
    }
    Keys { last_resort: vec![false; keys.len()], keys }
}

/// Masks every group but the best `keep`.
pub(super) fn limit_to_groups(keys: &mut Keys, groups: Groups) {
    let size = keys.keys.len() / groups.count.max(1);
    let mut worth = Vec::with_capacity(groups.count);
    for g in 0..groups.count {
        let group = &keys.keys[g * size..(g + 1) * size];
        let order = descending(group, &vec![false; size], 2);
        let mut sum = order.first().map_or(f64::NEG_INFINITY, |&best| group[best]);
        if let (GroupScore::SumOfBestTwo, Some(&second)) = (groups.score, order.get(1)) {
            sum += group[second];
        }
        worth.push(if sum.is_nan() { f64::NEG_INFINITY } else { sum });
    }
    let kept = descending(&worth, &vec![false; groups.count], groups.keep);
    for g in 0..groups.count {
        if kept.contains(&g) {
            continue;
        }
        for e in g * size..(g + 1) * size {
            match groups.masked {
                Masked::Zero => keys.keys[e] = 0.0,
                Masked::NegInfinity => {
                    keys.keys[e] = f64::NEG_INFINITY;
                    keys.last_resort[e] = true;
                }
            }
        }
    }
}

/// The K best experts in descending order, and the witness.
pub(super) fn top_k(keys: &Keys, k: usize) -> (Vec<u32>, Witness) {
    let order = descending(&keys.keys, &keys.last_resort, k + 1);
    let candidate = |place: usize| match order.get(place) {
        Some(&e) => Candidate { expert: e as u32, key: keys.keys[e] },
        None => Candidate::NONE,
    };
    let witness = Witness { last: k.checked_sub(1).map_or(Candidate::NONE, candidate), next: candidate(k) };
    (order.iter().take(k).map(|&e| e as u32).collect(), witness)
}

/// Indices of the `n` largest values (fewer if there are fewer), equal ones by index, the last resort after all others.
/// The values hold no NaN.
fn descending(values: &[f64], last_resort: &[bool], n: usize) -> Vec<usize> {
    let mut taken = vec![false; values.len()];
    let mut order = Vec::new();
    for _ in 0..n.min(values.len()) {
        let mut best = None;
        for resort in [false, true] {
            for i in 0..values.len() {
                if !taken[i] && last_resort[i] == resort && best.is_none_or(|b: usize| values[i] > values[b]) {
                    best = Some(i);
                }
            }
            if best.is_some() {
                break;
            }
        }
        if let Some(best) = best {
            taken[best] = true;
            order.push(best);
        }
    }
    order
}

/// The two masked passes over one token's logits: experts, weight values, witness.
pub(super) fn sparse_mixer(logits: &[f64], jitter: f64, k: usize) -> (Vec<u32>, Vec<f64>, Witness) {
    let (experts, witness) = top_k(&keys(logits, logits, None), k);
    let mut values = Vec::with_capacity(k);
    for pass in 0..experts.len() {
        let chosen = experts[pass] as usize;
        let max = logits[chosen];
        let mut masked = logits.to_vec();
        for e in 0..logits.len() {
            let near = max - logits[e] <= 2.0 * jitter * logits[e].abs().max(max);
            if experts[..pass].contains(&(e as u32)) || !(near || logits[e] == max) {
                masked[e] = f64::NEG_INFINITY;
            }
        }
        values.push(softmax(&masked)[chosen]);
    }
    (experts, values, witness)
}

/// Experts of one token from its row of the table: the experts, and whether an entry named none that exists.
pub(super) fn from_table(row: &[u32], experts: usize) -> (Vec<u32>, bool) {
    let mut ids = Vec::with_capacity(row.len());
    let mut bad = false;
    for &id in row {
        let valid = (id as usize) < experts;
        bad |= !valid && id != NO_EXPERT;
        ids.push(if valid { id } else { NO_EXPERT });
    }
    (ids, bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    const INF: f64 = f64::INFINITY;

    fn chosen(keys: &Keys, k: usize) -> Vec<u32> {
        top_k(keys, k).0
    }

    fn grouped(values: &[f64], groups: Groups) -> Keys {
        let mut keys = keys(values, values, None);
        limit_to_groups(&mut keys, groups);
        keys
    }

    #[test]
    fn ties_go_to_the_lower_expert() {
        let keys = keys(&[1.0, 2.0, 2.0, 1.0], &[1.0, 2.0, 2.0, 1.0], None);
        assert_eq!(chosen(&keys, 3), [1, 2, 0]);
        let witness = top_k(&keys, 1).1;
        assert_eq!(witness.last, Candidate { expert: 1, key: 2.0 });
        assert_eq!(witness.next, Candidate { expert: 2, key: 2.0 });
        assert_eq!(top_k(&keys, 4).1.next, Candidate::NONE);
    }

    #[test]
    fn nan_never_wins() {
        let logits = [f64::NAN, -5.0, f64::NAN, -INF];
        assert_eq!(chosen(&keys(&logits, &logits, None), 1), [1]);
        assert_eq!(chosen(&keys(&logits, &logits, None), 4), [1, 0, 2, 3]);
        // a NaN logit has no key, whatever its bias
        let bias = [100.0, 0.0, 100.0, 0.0];
        assert_eq!(chosen(&keys(&logits, &[0.0, 0.3, 0.0, 0.0], Some(&bias)), 2), [1, 3]);
        // a NaN bias
        let finite = [1.0, 2.0, 3.0, 4.0];
        assert_eq!(chosen(&keys(&finite, &finite, Some(&[0.0, 0.0, 0.0, f64::NAN])), 2), [2, 1]);
    }

    #[test]
    fn groups_by_two_best_or_by_best() {
        let values = [5.0, 0.0, 3.0, 3.0, 4.0, 0.5];
        let rule = Groups { count: 3, keep: 1, score: GroupScore::SumOfBestTwo, masked: Masked::NegInfinity };
        assert_eq!(chosen(&grouped(&values, rule), 2), [2, 3]);
        assert_eq!(chosen(&grouped(&values, Groups { score: GroupScore::Best, ..rule }), 2), [0, 1]);
        assert_eq!(chosen(&grouped(&values, Groups { keep: 2, ..rule }), 3), [0, 2, 3]);
        // equal worth: the lower group
        assert_eq!(chosen(&grouped(&[1.0, 2.0, 2.0, 1.0], Groups { count: 2, ..rule }), 1), [1]);
        // groups of one
        assert_eq!(chosen(&grouped(&values, Groups { count: 6, keep: 2, ..rule }), 2), [0, 4]);
    }

    #[test]
    fn masked_by_zero_beats_negative_keys_and_by_infinity_never() {
        let values = [0.1, -0.5, 0.05, 0.01];
        let rule = Groups { count: 2, keep: 1, score: GroupScore::Best, masked: Masked::Zero };
        assert_eq!(chosen(&grouped(&values, rule), 2), [0, 2]);
        let never = Groups { masked: Masked::NegInfinity, ..rule };
        assert_eq!(chosen(&grouped(&values, never), 2), [0, 1]);
        // a kept expert with key -inf still goes before the masked ones
        assert_eq!(chosen(&grouped(&[-9.0, -INF, -10.0, -10.0], never), 4), [0, 1, 2, 3]);
        assert_eq!(chosen(&grouped(&[-10.0, -10.0, -INF, -9.0], never), 3), [3, 2, 0]);
    }

    #[test]
    fn sparse_mixer_by_hand() {
        // pass 1: max 4, kept where (4 - l) <= 0.5 * max(|l|, 4) = 2, so 4 and 3; pass 2: max 3, kept where (3 - l) <= 1.5
        let (experts, values, witness) = sparse_mixer(&[1.0, 4.0, 3.0, 1.5], 0.25, 2);
        assert_eq!(experts, [1, 2]);
        let e = f64::exp;
        assert!((values[0] - 1.0 / (1.0 + e(-1.0))).abs() < 1e-15);
        assert!((values[1] - 1.0 / (1.0 + e(-1.5))).abs() < 1e-15);
        assert_eq!(witness.next, Candidate { expert: 3, key: 1.5 });
    }

    #[test]
    fn sparse_mixer_far_apart_and_not_finite() {
        assert_eq!(sparse_mixer(&[1.0, 2.0, 4.0], 0.01, 2).1, [1.0, 1.0]);
        // negative logits: the width is relative to the masked logit itself
        let (experts, values, _) = sparse_mixer(&[-8.0, -2.0, -4.0], 0.25, 2);
        assert_eq!(experts, [1, 2]);
        assert!((values[0] - 1.0 / (1.0 + f64::exp(-2.0))).abs() < 1e-15);
        // nothing left for the second pass
        assert_eq!(sparse_mixer(&[-INF, 1.0, f64::NAN], 0.1, 2).1, [1.0, 0.0]);
        assert_eq!(sparse_mixer(&[0.0, INF, INF], 0.1, 2).1, [0.5, 1.0]);
        assert_eq!(sparse_mixer(&[0.0, 0.0], 0.0, 2).1, [0.5, 1.0]);
    }

    #[test]
    fn table_rows() {
        assert_eq!(from_table(&[3, 0, 3], 4), (vec![3, 0, 3], false));
        assert_eq!(from_table(&[4, 0, 1], 4), (vec![NO_EXPERT, 0, 1], true));
        assert_eq!(from_table(&[NO_EXPERT, 0, 1], 4), (vec![NO_EXPERT, 0, 1], false));
    }
}
