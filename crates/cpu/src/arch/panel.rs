//! A panel of weights times rows of x: the inner loop of the products with packed matrices.
//!
//! ```text
//! for a tile of rows n (as many as the registers hold sums of, or fewer)
//!     acc[n][0..32] = sums[n][..]
//!     for each step k
//!         w = line k of the panel: an element, or a pair of bf16, of each of 32 outputs
//!         acc[n] += w * x[n][k]                      x[n][k] in every lane: no sum across lanes
//!     sums[n][..] = acc[n]
//! ```
//!
//! Constraint: a sum is one chain of multiply-adds, ascending in k, from where an earlier call left it. So its bits depend
//! on the matrix row and the row of x alone, whatever the tile and however k is cut into calls.
//!
//! While a tile is worked on, it asks for its share of the memory that is wanted next, so that fetching and arithmetic
//! overlap evenly; the hardware's own prefetch would come in bursts and stop at each page.

use super::simd::{Simd, Task};
use fused_moe_core::dtype::{DType, Float};
use half::bf16;

/// Outputs of a panel, matrix rows beside each other.
pub(crate) const PANEL: usize = 32;
/// Numbers of 4 bytes, or pairs of bf16, that a row of a [`PanelRow`] has.
pub(crate) const PANEL_WORDS: usize = 256;
/// A part of a row of x: f32 numbers or pairs of bf16. What is beyond `PANEL_WORDS` is there to keep rows that are read
/// together out of each other's places in the cache.
pub(crate) type PanelRow = [u32; PANEL_WORDS + 16];
/// The most panels whose sums of a row lie together.
pub(crate) const PANEL_BLOCK: usize = 8;
/// Sums of a row that several panels add to.
pub(crate) type PanelSums = [f32; PANEL_BLOCK * PANEL];

/// Elements of a matrix row that lie together in a panel: pairs of bf16, as dot products of them are formed.
pub(crate) const fn group(dtype: DType) -> usize {
    if matches!(dtype, DType::BF16) { 2 } else { 1 }
}

/// `sums[n][columns[0]..] += x[n] . first half of the panel`, likewise the second half.
pub(crate) struct Panel<'a, W> {
    /// `[steps][PANEL][group]`.
    pub(crate) weights: &'a [W],
    /// What will be wanted next.
    pub(crate) next: &'a [W],
    /// Some elements of each row, as many as the weights have: f32.
    pub(crate) x: &'a [PanelRow],
    /// As many rows.
    pub(crate) sums: &'a mut [PanelSums],
    /// Where the halves' sums lie.
    pub(crate) columns: [usize; 2],
}

/// The same for rows of bf16, by the instruction set's own products of pairs.
pub(super) struct PairPanel<'a>(pub(super) Panel<'a, bf16>);

/// Vectors of a panel where a vector is shortest.
const MAX_VECTORS: usize = 8;
/// Steps between two looks at what is wanted next.
const STEPS: usize = 8;
const LINE: usize = 64;

/// Where a tile reads and writes.
struct At<W> {
    steps: usize,
    weights: *const W,
    x: *const PanelRow,
    sums: *mut PanelSums,
    columns: [usize; 2],
    /// The line to ask for first, and how many to ask for after so many steps.
    next: *const u8,
    lines: usize,
}

impl<W: Float> Task for Panel<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        rows::<S, W, false>(s, self);
    }
}

impl Task for PairPanel<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        rows::<S, bf16, true>(s, self.0);
    }
}

/// All rows, in tiles of nearly equal size; they are of pairs of bf16 where PAIRS says so.
#[inline(always)]
fn rows<S: Simd, W: Float, const PAIRS: bool>(s: S, panel: Panel<'_, W>) {
    let Panel { weights, next, x, sums, columns } = panel;
    let words = if PAIRS { PANEL_WORDS } else { PANEL_WORDS / group(W::DTYPE) };
    let steps = (weights.len() / (PANEL * group(W::DTYPE))).min(words);
    let (mut left, mut done) = (x.len().min(sums.len()), 0);
    if columns.iter().any(|&column| column > size_of::<PanelSums>() / size_of::<f32>() - PANEL / 2) {
        return;
    }
    let tiles = left.div_ceil(S::PANEL_ROWS);
    let lines = (size_of_val(next) / LINE).div_ceil(steps.div_ceil(STEPS).max(1) * tiles.max(1));
    let mut next = next.as_ptr().cast::<u8>();
    while left > 0 {
        let rows = left.div_ceil(left.div_ceil(S::PANEL_ROWS));
        let (x, sums) = (&x[done..done + rows], &mut sums[done..done + rows]);
        let (weights, x, sums) = (weights.as_ptr(), x.as_ptr(), sums.as_mut_ptr());
        let at = At { steps, weights, x, sums, columns, next, lines };
        macro_rules! sizes {
            ($($n:literal)+) => {
                match rows {
                    // SAFETY: `steps` steps lie in the weights and in each of the rows; N rows and as many sums are there,
                    // and the columns and half a panel beyond them lie in the sums.
                    $($n if $n <= S::PANEL_ROWS => unsafe { tile::<S, W, $n, PAIRS>(s, at) },)+
                    _ => {}
                }
            };
        }
        sizes!(1 2 3 4 5 6 7 8 9 10 11 12);
        next = next.wrapping_add(lines * LINE * steps.div_ceil(STEPS));
        (left, done) = (left - rows, done + rows);
    }
}

/// A panel times N rows.
///
/// # Safety
/// `at.steps` steps are readable at `at.weights` and in each of N rows at `at.x`; N rows are writable at `at.sums`, in which
/// half a panel lies from each of `at.columns` on.
#[inline(always)]
unsafe fn tile<S: Simd, W: Float, const N: usize, const PAIRS: bool>(s: S, at: At<W>) {
    let At { steps, weights, x, sums, columns, mut next, lines } = at;
    let (vectors, half) = (PANEL / S::LANES, PANEL / 2 / S::LANES);
    let column = |v: usize| columns[v / half] + v % half * S::LANES;
    let mut acc = [[s.splat(0.0); MAX_VECTORS]; N];
    for (n, acc) in acc.iter_mut().enumerate() {
        for (v, acc) in acc.iter_mut().enumerate().take(vectors) {
            // SAFETY: row n of the sums is there, and so is half a panel from each of the columns on.
            *acc = unsafe { s.load_raw(sums.add(n).cast::<f32>().add(column(v))) };
        }
    }
    // The operand of which there are fewer vectors stays in registers.
    macro_rules! outer {
        (|$v:ident| $w:expr, |$n:ident| $x:expr, |$acc:ident, $a:ident, $b:ident| $sum:expr) => {
            if N < vectors {
                let $n = 0;
                let mut of_x = [$x; N];
                for $n in 1..N {
                    of_x[$n] = $x;
                }
                for $v in 0..vectors {
                    let $a = $w;
                    for n in 0..N {
                        let ($acc, $b) = (acc[n][$v], of_x[n]);
                        acc[n][$v] = $sum;
                    }
                }
            } else {
                let $v = 0;
                let mut of_w = [$w; MAX_VECTORS];
                for $v in 1..vectors {
                    of_w[$v] = $w;
                }
                for $n in 0..N {
                    let $b = $x;
                    for v in 0..vectors {
                        let ($acc, $a) = (acc[$n][v], of_w[v]);
                        acc[$n][v] = $sum;
                    }
                }
            }
        };
    }
    let mut k = 0;
    while k < steps {
        for _ in 0..lines {
            s.prefetch_far(next);
            next = next.wrapping_add(LINE);
        }
        let end = steps.min(k + STEPS);
        while k < end {
            let line = weights.wrapping_add(k * PANEL * group(W::DTYPE));
            let pairs = |v: usize| line.cast::<bf16>().wrapping_add(2 * v * S::LANES);
            // SAFETY: k < steps, and there are N rows.
            unsafe {
                match (W::DTYPE, PAIRS) {
                    (DType::BF16, true) => {
                        let x = |n: usize| x.wrapping_add(n).cast::<bf16>().wrapping_add(2 * k);
                        outer!(|v| s.load_pairs(pairs(v)), |n| s.splat_pair(x(n)), |acc, w, x| s.dot_pairs(acc, w, x));
                    }
                    (DType::BF16, false) => {
                        let x = |n: usize| x.wrapping_add(n).cast::<f32>().wrapping_add(2 * k);
                        outer!(|v| s.first_of(s.load_pairs(pairs(v))), |n| s.splat(*x(n)), |acc, w, x| s
                            .fma(w, x, acc));
                        outer!(|v| s.second_of(s.load_pairs(pairs(v))), |n| s.splat(*x(n).add(1)), |acc, w, x| s
                            .fma(w, x, acc));
                    }
                    _ => {
                        let x = |n: usize| x.wrapping_add(n).cast::<f32>().wrapping_add(k);
                        outer!(|v| s.load_raw(line.wrapping_add(v * S::LANES)), |n| s.splat(*x(n)), |acc, w, x| s
                            .fma(w, x, acc));
                    }
                }
            }
            k += 1;
        }
    }
    for (n, acc) in acc.into_iter().enumerate() {
        for (v, acc) in acc.into_iter().enumerate().take(vectors) {
            // SAFETY: as above.
            unsafe { s.store_raw(acc, sums.add(n).cast::<f32>().add(column(v))) };
        }
    }
}
