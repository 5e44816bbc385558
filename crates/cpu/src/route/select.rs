//! The order of a token's experts.
//!
//! An expert's rank is an integer that is smaller for a better expert: whether it yields to all others, then its key
//! from the largest down, then its id. Ranks are all different, so any way to sort them gives the same order.

use crate::plan::{ONE_BY_ONE, RANK_PARTS as PARTS, RANKS_OF_A_PART};
use fused_moe_core::config::{GroupScore, Groups, Masked};

const ID_BITS: u32 = 12;
const ID_MASK: u64 = (1 << ID_BITS) - 1;
const LAST_RESORT: u64 = 1 << (32 + ID_BITS);

/// A number, no NaN, as an integer that is smaller for a larger one. Both zeros are one number.
pub(crate) fn descending(number: f32) -> u32 {
    let bits = (number + 0.0).to_bits();
    let ascending = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
    !ascending
}

/// A key of an expert as a rank.
fn rank(key: f32, expert: usize) -> u64 {
    u64::from(descending(key)) << ID_BITS | expert as u64
}

/// The key of a rank.
pub(super) fn key(rank: u64) -> f32 {
    let ascending = !((rank >> ID_BITS) as u32);
    f32::from_bits(if ascending >> 31 == 1 { ascending & !(1 << 31) } else { !ascending })
}

/// The expert of a rank.
pub(super) fn expert(rank: u64) -> u32 {
    (rank & ID_MASK) as u32
}

/// The keys of NaN logits, and keys that are NaN, become -inf.
pub(super) fn clean(logits: &[f32], keys: &mut [f32]) {
    for (key, logit) in keys.iter_mut().zip(logits) {
        *key = if logit.is_nan() || key.is_nan() { f32::NEG_INFINITY } else { *key };
    }
}

/// The ranks of keys, none of them NaN.
pub(super) fn rank_all(keys: &[f32], ranks: &mut [u64]) {
    for (e, (rank, &key)) in ranks.iter_mut().zip(keys).enumerate() {
        *rank = self::rank(key, e);
    }
}

/// The ranks of keys, none of them NaN, where only the best groups stay.
pub(super) fn rank_groups(keys: &[f32], groups: Groups, ranks: &mut [u64]) {
    let size = (keys.len() / groups.count.max(1)).max(1);
    for (g, group) in keys.chunks(size).enumerate() {
        ranks[g] = rank(worth(group, groups.score), g);
    }
    let worst_kept = best(&mut ranks[..groups.count], groups.keep);
    for (g, group) in keys.chunks(size).enumerate() {
        let kept = rank(worth(group, groups.score), g) <= worst_kept;
        for (i, &key) in group.iter().enumerate() {
            let e = g * size + i;
            ranks[e] = match groups.masked {
                _ if kept => rank(key, e),
                Masked::Zero => rank(0.0, e),
                Masked::NegInfinity => rank(f32::NEG_INFINITY, e) | LAST_RESORT,
            };
        }
    }
}

fn worth(group: &[f32], score: GroupScore) -> f32 {
    let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &key in group {
        (first, second) = if key > first { (key, first) } else { (first, if key > second { key } else { second }) };
    }
    match score {
        GroupScore::SumOfBestTwo if group.len() > 1 => {
            let sum = first + second;
            if sum.is_nan() { f32::NEG_INFINITY } else { sum }
        }
        _ => first,
    }
}

/// Brings the n smallest ranks to the front, in order; what is behind them is lost. `ranks[e]` is that of e. Returns the
/// last of them.
pub(super) fn best(ranks: &mut [u64], n: usize) -> u64 {
    let n = n.min(ranks.len());
    if n == 0 {
        return 0;
    }
    if n > ONE_BY_ONE {
        if n < ranks.len() {
            ranks.select_nth_unstable(n - 1);
        }
        ranks[..n].sort_unstable();
    } else {
        few_best(ranks, n);
    }
    ranks[n - 1]
}

/// `best` for n up to `ONE_BY_ONE`. The smallest of each part is kept, so that each of the n costs a look at these and
/// at one part; without branches that depend on the data, which are most of the time of a heap or an insertion.
fn few_best(ranks: &mut [u64], n: usize) {
    let size = ranks.len().div_ceil(PARTS).max(RANKS_OF_A_PART);
    let mut minima = [u64::MAX; PARTS];
    for (minimum, part) in minima.iter_mut().zip(ranks.chunks(size)) {
        *minimum = smallest(part);
    }
    let minima = &mut minima[..ranks.len().div_ceil(size)];
    let mut found = [0; ONE_BY_ONE];
    for found in &mut found[..n] {
        *found = smallest(minima);
        let place = expert(*found) as usize;
        let (part, start) = (place / size, place / size * size);
        ranks[place] = u64::MAX;
        minima[part] = smallest(&ranks[start..ranks.len().min(start + size)]);
    }
    ranks[..n].copy_from_slice(&found[..n]);
}

fn smallest(ranks: &[u64]) -> u64 {
    let (fours, rest) = ranks.as_chunks::<4>();
    let mut lanes = [u64::MAX; 4];
    for four in fours {
        for (lane, &rank) in lanes.iter_mut().zip(four) {
            *lane = rank.min(*lane);
        }
    }
    lanes.iter().chain(rest).fold(u64::MAX, |smallest, &rank| rank.min(smallest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_order_keys_from_the_largest_down_then_experts() {
        let keys = [f32::INFINITY, 2.0, 1e-45, 0.0, -1e-45, -1.0, f32::MIN, f32::NEG_INFINITY];
        for pair in keys.windows(2) {
            assert!(rank(pair[0], 9) < rank(pair[1], 0), "{pair:?}");
        }
        for &k in &keys {
            assert!(rank(k, 3) < rank(k, 4) && key(rank(k, 4)) == k && expert(rank(k, 4095)) == 4095);
            assert!(key(rank(k, 4) | LAST_RESORT) == k && rank(f32::NEG_INFINITY, 4095) < rank(k, 0) | LAST_RESORT);
        }
        assert_eq!(rank(-0.0, 7), rank(0.0, 7));
    }

    #[test]
    fn best_of_any_number() {
        let mut state = 1u64;
        for len in [1, 2, 31, 32, 33, 100, 1000] {
            for n in [1, 2, 8, 31, 32, 33, 64, 999, 1000].into_iter().filter(|&n| n <= len) {
                let mut ranks: Vec<u64> = (0..len)
                    .map(|i| {
                        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        (state >> 40) << ID_BITS | i as u64
                    })
                    .collect();
                let mut sorted = ranks.clone();
                sorted.sort();
                assert_eq!(best(&mut ranks, n), sorted[n - 1]);
                assert_eq!(ranks[..n], sorted[..n]);
            }
        }
    }
}
