//! Arithmetic alone: what no kernel can be faster than.

use super::panel::PANEL;
use super::simd::{Simd, Task};
use half::bf16;
use std::hint::black_box;

/// The most sums that fit the registers of an instruction set.
const MAX_SUMS: usize = 24;

/// Multiply-adds of registers, `rounds` for each sum; of pairs of bf16 where PAIRS says so. Returns how many they were.
pub(super) struct Peak<const PAIRS: bool> {
    pub(super) rounds: usize,
}

impl<const PAIRS: bool> Task for Peak<PAIRS> {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> usize {
        let sums = (S::PANEL_ROWS * PANEL / S::LANES).min(MAX_SUMS);
        let mut acc = [s.splat(0.0); MAX_SUMS];
        let (half, pair) = (black_box(0.5), black_box([bf16::from_f32_const(0.5); 2]));
        let x = s.splat(half);
        // SAFETY: two numbers are there.
        let pairs = unsafe { s.splat_pair(pair.as_ptr()) };
        for _ in 0..self.rounds {
            for acc in acc.iter_mut().take(sums) {
                *acc = if PAIRS { s.dot_pairs(*acc, pairs, pairs) } else { s.fma(x, x, *acc) };
            }
        }
        for acc in acc {
            black_box(s.sum(acc));
        }
        self.rounds * sums * S::LANES * if PAIRS { 2 } else { 1 }
    }
}
