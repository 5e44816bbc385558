//! Slots that overflow their expert's capacity.

use crate::Cpu;
use crate::arch::SharedSlice;
use crate::error::Result;
use crate::plan::RowsPlan;
use crate::route::descending;
use crate::rows::{Floats, Part, share_rows};
use fused_moe_core::backend::{reborrow, share};
use fused_moe_core::operation::DropOverflow;
use fused_moe_core::problem::DropOverflowProblem;
use fused_moe_core::{NO_EXPERT, Permutation};
use std::ops::Range;

/// What every expert reads, and the slots that it writes to: no two experts have a slot in common.
struct Overflow<'a> {
    problem: DropOverflowProblem,
    row_slot: &'a [u32],
    offsets: &'a [u32],
    importance: Option<Floats<'a>>,
    /// The ends of all sequences but the last.
    ends: &'a [u32],
    experts: SharedSlice<'a, u32>,
    experts_stride: usize,
    weights: SharedSlice<'a, f32>,
    weights_stride: usize,
}

/// Slots in line: those with a smaller key first, equal ones by their number. Places of the choice come before
/// importance.
#[derive(Clone, Copy)]
struct Line<'a> {
    top_k: usize,
    importance: Option<&'a Floats<'a>>,
}

/// What an expert takes of a sequence: slots with a key below `key`, and the first `equal` of those that have it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Threshold {
    key: u64,
    equal: usize,
}

/// Experts are shared out; within one, the slots of a sequence are neighbours, since rows are in slot order:
/// ```text
/// for each sequence with more slots than the limit:
///     threshold = key of the last slot that stays                    a radix search, no sorting
///     for each slot:  beyond it, the id becomes NO_EXPERT and the weight 0
/// for each token:  its weights are divided
/// ```
pub(crate) fn drop_overflow(cpu: &Cpu, operands: DropOverflow<'_, Cpu>) -> Result<()> {
    let problem = operands.problem()?;
    let DropOverflow { capacity, permutation, importance, sequences, mut experts, mut weights } = operands;
    let Permutation { row_slot, slot_row: _, offsets } = permutation;
    let (row_slot, offsets) = (row_slot.typed::<u32>()?.row(0), offsets.typed::<u32>()?.row(0));
    let importance = Floats::optional(&importance)?;
    let ends = sequences.map(|ends| ends.typed::<u32>()).transpose()?.map_or(&[][..], |ends| ends.row(0));
    let ends = ends.get(1..ends.len().saturating_sub(1)).unwrap_or_default();
    share::<Cpu>(&weights).typed::<f32>()?;
    {
        let experts = reborrow::<Cpu>(&mut experts).typed_mut::<u32>()?;
        let weights = reborrow::<Cpu>(&mut weights).typed_mut::<f32>()?;
        let (experts_stride, weights_stride) = (experts.stride(), weights.stride());
        let (experts, weights) = (SharedSlice::new(experts.into_data()), SharedSlice::new(weights.into_data()));
        let overflow =
            Overflow { problem, row_slot, offsets, importance, ends, experts, experts_stride, weights, weights_stride };
        let plan = RowsPlan::overflow(problem.tokens.saturating_mul(problem.top_k), problem.experts);
        cpu.pool.for_each(problem.experts, plan.grain, |expert| overflow.expert(expert));
    }
    if let Some(min) = capacity.renormalize.filter(|_| problem.top_k > 0) {
        renormalize(cpu, Part::new(weights)?, problem, min);
    }
    Ok(())
}

impl Overflow<'_> {
    fn expert(&self, expert: usize) {
        let at = |i: usize| self.offsets.get(i).map_or(0, |&offset| offset as usize);
        let mut slots = self.row_slot.get(at(expert)..at(expert + 1)).unwrap_or_default();
        while let Some(&first) = slots.first() {
            let sequence = self.sequence_of(first as usize / self.problem.top_k);
            let inside = |&slot: &u32| (slot as usize / self.problem.top_k) < sequence.end;
            // Of a sequence there is one slot at least, unless rows or sequences are not in order.
            let (those, others) = slots.split_at(slots.partition_point(inside).max(1));
            self.limit(those, sequence.len());
            slots = others;
        }
    }

    /// The tokens of the sequence of token t.
    fn sequence_of(&self, t: usize) -> Range<usize> {
        let tokens = self.problem.tokens;
        let n = self.ends.partition_point(|&end| end as usize <= t);
        let end = |n: usize| self.ends.get(n).map_or(tokens, |&end| tokens.min(end as usize));
        (if n == 0 { 0 } else { end(n - 1) })..end(n)
    }

    /// Drops what an expert does not take of its slots in a sequence of so many tokens.
    fn limit(&self, slots: &[u32], length: usize) {
        let DropOverflowProblem { top_k, experts, capacity, .. } = self.problem;
        let limit = capacity.limit.slots(length, experts);
        if slots.len() <= limit {
            return;
        }
        let line = Line { top_k, importance: self.importance.as_ref() };
        let Threshold { key, mut equal } = line.threshold(slots, limit);
        for &slot in slots {
            let slot = slot as usize;
            let own = line.key(slot);
            let stays = own < key || (own == key && equal > 0);
            if stays {
                equal -= usize::from(own == key);
            } else {
                let (t, k) = (slot / top_k, slot % top_k);
                self.experts.store(t * self.experts_stride + k, NO_EXPERT);
                self.weights.store(t * self.weights_stride + k, 0.0);
            }
        }
    }
}

/// Bits of a key that are looked at together.
const DIGIT: u32 = 8;

impl Line<'_> {
    fn key(self, slot: usize) -> u64 {
        let (t, k) = (slot / self.top_k, slot % self.top_k);
        match self.importance {
            None => k as u64,
            Some(importance) => {
                let importance = importance.element(t);
                let rank = descending(if importance.is_nan() { f32::NEG_INFINITY } else { importance });
                (k as u64) << 32 | u64::from(rank)
            }
        }
    }

    /// The key of the n-th of more than n slots, found from its highest digit down, and how many of those with that key are
    /// among the n.
    fn threshold(self, slots: &[u32], n: usize) -> Threshold {
        let largest = match self.importance {
            None => self.top_k as u64,
            Some(_) => (self.top_k as u64) << 32 | u64::from(u32::MAX),
        };
        let digits = (u64::BITS - largest.leading_zeros()).div_ceil(DIGIT);
        let (mut key, mut left) = (0u64, n);
        for shift in (0..digits).rev().map(|digit| digit * DIGIT) {
            let mut counts = [0usize; 1 << DIGIT];
            for &slot in slots {
                let digit = (self.key(slot as usize) ^ key) >> shift;
                if digit >> DIGIT == 0 {
                    counts[digit as usize] += 1;
                }
            }
            let mut digit = 0;
            for (value, &count) in counts.iter().enumerate() {
                digit = value as u64;
                if left <= count {
                    break;
                }
                left -= count;
            }
            key |= digit << shift;
        }
        Threshold { key, equal: left }
    }
}

/// `w / max(sum of the token's, min)`.
fn renormalize(cpu: &Cpu, weights: Part<'_, f32>, problem: DropOverflowProblem, min: f32) {
    share_rows(&cpu.pool, weights, problem.tokens, RowsPlan::elements(problem.top_k), |range, mut weights| {
        for i in 0..range.len() {
            let weights = weights.row(i);
            let (sum, min) = (weights.iter().copied().map(f64::from).sum::<f64>(), f64::from(min));
            let divisor = if sum < min { min } else { sum };
            for weight in weights {
                *weight = if divisor == 0.0 { 0.0 } else { (f64::from(*weight) / divisor) as f32 };
            }
        }
    });
}
