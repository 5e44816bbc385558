//! Slots that overflow their expert's capacity.

use crate::config::{Capacity, CapacityOrder};
use crate::{NO_EXPERT, NO_ROW};

/// Operands of [`drop_overflow`].
#[derive(Clone, Copy, Debug)]
pub struct DropOverflow<'a> {
    /// The rule.
    pub capacity: Capacity,
    /// `[T, K]`.
    pub ids: &'a [u32],
    /// `[T, K]`.
    pub weights: &'a [f64],
    /// `[R]`, of the permutation of the ids: a slot without a row overflows nothing.
    pub slot_row: &'a [u32],
    /// `[T]`; absent for zeros. Read for [`CapacityOrder::Score`].
    pub importance: Option<&'a [f64]>,
    /// `[N + 1]`, ascending; absent for one sequence.
    pub sequences: Option<&'a [u32]>,
    /// E, for [`CapacityLimit::EvenShare`](crate::config::CapacityLimit::EvenShare).
    pub experts: usize,
    /// T.
    pub tokens: usize,
    /// K.
    pub top_k: usize,
}

/// The routes `[T, K]` without the slots that overflow: these have [`NO_EXPERT`] and weight 0.
///
/// Slot (t, k) comes before slot (s, j) of the same expert and sequence if `k < j`; or `k = j` and token t comes before s:
/// by its importance, the larger first (NaN last), then by its number; by its number alone for
/// [`CapacityOrder::Position`]. The first `limit` slots stay.
///
/// Token t is in sequence `n` where n is the number of `sequences[1..N]` (without both ends) that are `<= t`; the length L
/// of a sequence is that of its tokens among the T.
/// Where weights are divided, a NaN among a token's makes all of them NaN.
///
/// ```
/// use fused_moe_core::{config::*, NO_EXPERT, reference::{DropOverflow, drop_overflow}};
/// let capacity = Capacity { limit: CapacityLimit::Slots(1), order: CapacityOrder::Position, renormalize: None };
/// let op = DropOverflow { capacity, ids: &[0, 0, 1], weights: &[0.5, 0.6, 0.7], slot_row: &[0, 1, 2], importance: None,
///                         sequences: None, experts: 2, tokens: 3, top_k: 1 };
/// assert_eq!(drop_overflow(&op), (vec![0, NO_EXPERT, 1], vec![0.5, 0.0, 0.7]));
/// ```
pub fn drop_overflow(op: &DropOverflow<'_>) -> (Vec<u32>, Vec<f64>) {
    let (mut ids, mut weights) = (op.ids.to_vec(), op.weights.to_vec());
    let sequence: Vec<usize> = (0..op.tokens).map(|t| sequence_of(t, op.sequences)).collect();
    for t in 0..op.tokens {
        let length = sequence.iter().filter(|&&other| other == sequence[t]).count();
        let limit = op.capacity.limit.slots(length, op.experts);
        for k in 0..op.top_k {
            let slot = t * op.top_k + k;
            if op.slot_row[slot] == NO_ROW {
                continue;
            }
            let before = (0..op.tokens * op.top_k).filter(|&other| {
                let (s, j) = (other / op.top_k, other % op.top_k);
                let rival = op.ids[other] == op.ids[slot] && op.slot_row[other] != NO_ROW && sequence[s] == sequence[t];
                rival && (j < k || (j == k && comes_before(op, s, t)))
            });
            if before.count() >= limit {
                ids[slot] = NO_EXPERT;
                weights[slot] = 0.0;
            }
        }
        if let Some(min) = op.capacity.renormalize {
            let weights = &mut weights[t * op.top_k..(t + 1) * op.top_k];
            let sum: f64 = weights.iter().sum();
            let divisor = if sum < f64::from(min) { f64::from(min) } else { sum };
            for weight in weights {
                *weight = if divisor == 0.0 { 0.0 } else { *weight / divisor };
            }
        }
    }
    (ids, weights)
}

fn sequence_of(t: usize, sequences: Option<&[u32]>) -> usize {
    let inner = sequences.and_then(|ends| ends.get(1..ends.len().saturating_sub(1))).unwrap_or(&[]);
    inner.iter().filter(|&&first| first as usize <= t).count()
}

/// Whether token s comes before token t, both being other ones.
fn comes_before(op: &DropOverflow<'_>, s: usize, t: usize) -> bool {
    let importance = match (op.capacity.order, op.importance) {
        (CapacityOrder::Score, Some(importance)) => importance,
        _ => return s < t,
    };
    let last_if_nan = |x: f64| if x.is_nan() { f64::NEG_INFINITY } else { x };
    let [s_is, t_is] = [s, t].map(|token| last_if_nan(importance[token]));
    s_is > t_is || (s_is == t_is && s < t)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::CapacityLimit;

    fn op<'a>(capacity: Capacity, ids: &'a [u32], slot_row: &'a [u32], top_k: usize) -> DropOverflow<'a> {
        let tokens = ids.len() / top_k;
        let weights = &[0.5; 12][..ids.len()];
        DropOverflow { capacity, ids, weights, slot_row, importance: None, sequences: None, experts: 2, tokens, top_k }
    }

    fn by(limit: CapacityLimit) -> Capacity {
        Capacity { limit, order: CapacityOrder::Position, renormalize: None }
    }

    const ROWS: &[u32] = &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11];
    const N: u32 = NO_EXPERT;

    #[test]
    fn first_choices_come_before_second_ones() {
        let ids = [1, 0, 0, 1, 0, 1];
        let (left, weights) = drop_overflow(&op(by(CapacityLimit::Slots(2)), &ids, &ROWS[..6], 2));
        // expert 0: first choices of tokens 1 and 2, so the second of token 0 overflows; expert 1: first of 0, second of 1
        assert_eq!(left, [1, N, 0, 1, 0, N]);
        assert_eq!(weights, [0.5, 0.0, 0.5, 0.5, 0.5, 0.0]);
        assert_eq!(drop_overflow(&op(by(CapacityLimit::Slots(0)), &ids, &ROWS[..6], 2)).0, [N; 6]);
    }

    #[test]
    fn sequences_are_apart_and_limits_follow_their_length() {
        let ids = [0; 6];
        let with = |limit| DropOverflow { sequences: Some(&[0, 2, 6]), ..op(by(limit), &ids, &ROWS[..6], 1) };
        assert_eq!(drop_overflow(&with(CapacityLimit::Slots(1))).0, [0, N, 0, N, N, N]);
        assert_eq!(drop_overflow(&with(CapacityLimit::Fraction(0.5))).0, [0, N, 0, 0, N, N]);
        assert_eq!(drop_overflow(&with(CapacityLimit::Fraction(0.3))).0, [0, N, 0, 0, N, N]);
        assert_eq!(drop_overflow(&with(CapacityLimit::EvenShare { factor: 1 })).0, [0, N, 0, 0, N, N]);
        let whole = op(by(CapacityLimit::EvenShare { factor: 1 }), &ids, &ROWS[..6], 1);
        assert_eq!(drop_overflow(&whole).0, [0, 0, 0, N, N, N]);
    }

    #[test]
    fn the_important_come_first() {
        let capacity = Capacity { order: CapacityOrder::Score, ..by(CapacityLimit::Slots(2)) };
        let importance = Some(&[0.1, f64::NAN, 0.9, 0.9, 0.1][..]);
        let op = DropOverflow { importance, ..op(capacity, &[0; 5], &ROWS[..5], 1) };
        assert_eq!(drop_overflow(&op).0, [N, N, 0, 0, N]);
        let three = Capacity { limit: CapacityLimit::Slots(3), ..capacity };
        assert_eq!(drop_overflow(&DropOverflow { capacity: three, ..op }).0, [0, N, 0, 0, N]);
    }

    #[test]
    fn what_stays_is_weighed_anew_and_slots_without_a_row_overflow_nothing() {
        let capacity = Capacity { renormalize: Some(0.25), ..by(CapacityLimit::Slots(1)) };
        let ids = [0, 1, 0, 1, 0, 1];
        let (left, weights) = drop_overflow(&op(capacity, &ids, &[NO_ROW, 0, 1, 2, 3, 4], 2));
        assert_eq!(left, [0, 1, 0, N, N, N]);
        assert_eq!(weights, [0.5, 0.5, 1.0, 0.0, 0.0, 0.0]);
    }
}
