//! Panels of weights times rows of x: the inner loop of the products with packed matrices.
//!
//! ```text
//! for as many panels p beside each other as the registers hold sums of
//!     for a tile of rows n (likewise)
//!         acc[p][n][0..32] = sums[n][..]
//!         for each step k
//!             w = line k of panel p: an element, or a pair of bf16, of each of 32 outputs
//!             acc[p][n] += w * x[n][k]               x[n][k] in every lane: no sum across lanes
//!         sums[n][..] = acc[p][n]
//! ```
//!
//! Constraint: a sum is one chain of multiply-adds, ascending in k, from where an earlier call left it. So its bits depend
//! on the matrix row and the row of x alone, whatever the tile and however k is cut into calls. Tiles of AMX (`amx.rs`) have
//! an order of their own, and calls that are cut at multiples of [`PAIR_STEPS`].
//!
//! Few rows take as long as their panels come from memory. Then several panels are read at once: one chain of sums waits for
//! itself, and the hardware's prefetch follows several streams better than one that jumps from panel to panel. More rows
//! also ask for lines a little ahead, across the end of the panels. Several tiles find their panels in the cache: while they
//! work, each asks for its share of the panel that follows, evenly, since requests in bursts hold up what is loaded.

use super::simd::{Simd, Task};
use fused_moe_core::dtype::{DType, Float};
use half::bf16;
use std::ops::Range;

/// Outputs of a panel, matrix rows beside each other.
pub(crate) const PANEL: usize = 32;
/// The most panels whose sums of a row lie together.
pub(crate) const PANEL_BLOCK: usize = 8;
/// Sums of a row that several panels add to.
pub(crate) type PanelSums = [f32; PANEL_BLOCK * PANEL];

/// Lines of pairs that an instruction set may add up before it adds them to the sums: what is cut into calls is cut between.
pub(crate) const PAIR_STEPS: usize = 16;

/// Elements of a matrix row that lie together in a panel: pairs of bf16, as dot products of them are formed.
pub(crate) const fn group(dtype: DType) -> usize {
    if matches!(dtype, DType::BF16) { 2 } else { 1 }
}

/// `sums[n][columns[0] + p * width..] += x[n] . first half of panel p`, likewise the second half.
pub(crate) struct PanelGroup<'a, W> {
    /// Panels that follow each other, or the same part of each: `[steps][PANEL][group]`.
    pub(crate) weights: &'a [&'a [W]],
    /// What will be wanted next.
    pub(crate) next: &'a [&'a [W]],
    /// Some elements of each row, as many as the weights have: f32, or pairs of bf16; for tiles 16 pairs of each row, then the
    /// next 16, with zeros behind the last.
    pub(crate) x: &'a [u32],
    /// From a row of x to the next; tiles lie one after the other.
    pub(crate) stride: usize,
    /// As many rows.
    pub(crate) sums: &'a mut [PanelSums],
    /// Where the halves' sums of the first panel lie.
    pub(crate) columns: [usize; 2],
    /// How much further those of the next one lie.
    pub(crate) width: usize,
    /// So many rows leave the processor time to look far enough ahead by itself, and requests would only hold it up; tiles ask
    /// always.
    pub(crate) unaided: usize,
}

impl<W: Float> PanelGroup<'_, W> {
    /// Whether there are rows, and sums of all panels' columns.
    pub(super) fn fits(&self) -> bool {
        let last = self.weights.len().saturating_sub(1).saturating_mul(self.width);
        let room = size_of::<PanelSums>() / size_of::<f32>() - PANEL / 2;
        !self.sums.is_empty() && self.columns.iter().all(|column| column.saturating_add(last) <= room)
    }

    /// Lines that every panel has: nothing depends on how many are read at once.
    pub(super) fn lines(&self) -> usize {
        self.weights.iter().map(|panel| panel.len() / (PANEL * group(W::DTYPE))).min().unwrap_or(0)
    }

    /// Lines that every row has x for, `words` of it a line.
    pub(super) fn steps(&self, words: usize) -> usize {
        self.x.len().saturating_sub((self.sums.len().max(1) - 1).saturating_mul(self.stride)) / words
    }
}

/// The same for rows of bf16, by the instruction set's own products of pairs.
pub(super) struct PairPanelGroup<'a>(pub(super) PanelGroup<'a, bf16>);

/// Vectors of a panel where a vector is shortest.
const MAX_VECTORS: usize = 8;
/// Steps between two looks at what is wanted next.
const STEPS: usize = 4;
const LINE: usize = 64;
/// Bytes of a panel that are asked for ahead of what is multiplied: as many as come while the first of them is on its way.
const AHEAD: usize = 4096;
/// Where a tile reads and writes.
struct Tile<'a, W, const P: usize> {
    weights: [*const W; P],
    x: *const u32,
    stride: usize,
    sums: *mut PanelSums,
    columns: [usize; 2],
    width: usize,
    steps: Range<usize>,
    ahead: &'a mut Ahead<P>,
}

/// What is asked for while a tile works.
struct Ahead<const P: usize> {
    at: [*const u8; P],
    /// Lines after every `STEPS` steps, of each.
    lines: usize,
    /// Whether they are for the second-level cache, since the tile needs the first.
    far: bool,
}

impl<const P: usize> Ahead<P> {
    #[inline(always)]
    fn ask<S: Simd>(&mut self, s: S) {
        for _ in 0..self.lines {
            for at in &mut self.at {
                if self.far {
                    s.prefetch_far(*at);
                } else {
                    s.prefetch(*at);
                }
                *at = at.wrapping_add(LINE);
            }
        }
    }
}

impl<W: Float> Task for PanelGroup<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        panels::<S, W, false>(s, self);
    }
}

impl Task for PairPanelGroup<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        panels::<S, bf16, true>(s, self.0);
    }
}

/// All panels; rows are of pairs of bf16 where PAIRS says so.
#[inline(always)]
fn panels<S: Simd, W: Float, const PAIRS: bool>(s: S, mut group: PanelGroup<'_, W>) {
    if !group.fits() {
        return;
    }
    let (rows, words) = (group.sums.len(), if PAIRS { 1 } else { self::group(W::DTYPE) });
    let steps = group.steps(words).min(group.lines());
    while !group.weights.is_empty() {
        let most = if rows <= group.unaided { 4 } else { 2 };
        let beside = match group.weights.len().min(S::PANEL_ROWS / rows).min(most) {
            4.. => rows_of::<S, W, PAIRS, 4>(s, &mut group, steps),
            2.. => rows_of::<S, W, PAIRS, 2>(s, &mut group, steps),
            _ => rows_of::<S, W, PAIRS, 1>(s, &mut group, steps),
        };
        group.weights = &group.weights[beside..];
        group.columns = group.columns.map(|column| column + beside * group.width);
    }
}

/// The first P panels times all rows, in tiles of nearly equal size; returns P. Sums of the panels' columns must lie in a row
/// of sums, and P panels and all rows have so many steps.
#[inline(always)]
fn rows_of<S: Simd, W: Float, const PAIRS: bool, const P: usize>(
    s: S,
    group: &mut PanelGroup<'_, W>,
    steps: usize,
) -> usize {
    let (line, rows) = (PANEL * self::group(W::DTYPE), group.sums.len());
    let (now, others) = group.weights.split_at(P);
    let mut weights = [std::ptr::null(); P];
    for (weights, panel) in weights.iter_mut().zip(now) {
        *weights = panel.as_ptr();
    }
    let next = if others.is_empty() { group.next } else { others };
    let (tiles, unaided) = (rows.div_ceil(S::PANEL_ROWS), rows <= group.unaided);
    // One tile is through with its panels before those that follow could come: it asks for lines of its own.
    let own = match tiles {
        1 if unaided => 0,
        1 => AHEAD / (line * size_of::<W>()),
        _ => steps,
    };
    let cut = steps - own.min(steps);
    for steps in [0..cut, cut..steps] {
        if steps.is_empty() {
            continue;
        }
        let lines = match tiles {
            1 if unaided => 0,
            1 => STEPS * line * size_of::<W>() / LINE,
            _ => {
                let lines = next.first().map_or(0, |next| size_of_val(*next) / LINE);
                lines.div_ceil(steps.len().div_ceil(STEPS) * tiles)
            }
        };
        let mut ahead = Ahead { at: weights.map(<*const W>::cast), lines, far: tiles > 1 };
        if steps.end == cut {
            ahead.at = weights.map(|weights| weights.wrapping_add((steps.start + own) * line).cast());
        } else {
            for (at, next) in ahead.at.iter_mut().zip(next) {
                *at = next.as_ptr().cast();
            }
        }
        let mut done = 0;
        while done < rows {
            let count = (rows - done).div_ceil((rows - done).div_ceil(S::PANEL_ROWS));
            let (x, sums) = (group.x.as_ptr(), &mut group.sums[done..done + count]);
            let (x, sums, steps) = (x.wrapping_add(done * group.stride), sums.as_mut_ptr(), steps.clone());
            let PanelGroup { stride, columns, width, .. } = *group;
            let at = Tile { weights, x, stride, sums, columns, width, steps, ahead: &mut ahead };
            macro_rules! sizes {
                ($($n:literal)+) => {
                    match count {
                        // SAFETY: so many steps lie in each of the P panels and of the rows, N rows and as many sums
                        // are there, and the panels' columns and half a panel beyond them lie in the sums.
                        $($n if P * $n <= S::PANEL_ROWS => unsafe {
                            tile::<S, W, PAIRS, P, $n>(s, at);
                        },)+
                        _ => {}
                    }
                };
            }
            sizes!(1 2 3 4 5 6 7 8 9 10 11 12);
            done += count;
        }
    }
    P
}

/// P panels times N rows.
///
/// # Safety
/// The steps `at.steps` are readable in each of the panels and in each of N rows from `at.x` on, `at.stride` apart; N rows
/// are writable at `at.sums`,
/// in which half of panel p lies from each of `at.columns`, plus p times `at.width`, on.
#[inline(always)]
unsafe fn tile<S: Simd, W: Float, const PAIRS: bool, const P: usize, const N: usize>(s: S, at: Tile<'_, W, P>) {
    let Tile { weights, x, stride, sums, columns, width, steps, ahead } = at;
    let (vectors, half) = (PANEL / S::LANES, PANEL / 2 / S::LANES);
    let column = |p: usize, v: usize| columns[v / half] + p * width + v % half * S::LANES;
    let mut acc = [[[s.splat(0.0); MAX_VECTORS]; N]; P];
    for (p, acc) in acc.iter_mut().enumerate() {
        for (n, acc) in acc.iter_mut().enumerate() {
            for (v, acc) in acc.iter_mut().enumerate().take(vectors) {
                // SAFETY: row n of the sums is there, and so is half of panel p from each of its columns on.
                *acc = unsafe { s.load_raw(sums.add(n).cast::<f32>().add(column(p, v))) };
            }
        }
    }
    // The operand of which there are fewer vectors stays in registers.
    macro_rules! outer {
        (|$p:ident, $v:ident| $w:expr, |$n:ident| $x:expr, |$acc:ident, $a:ident, $b:ident| $sum:expr) => {
            if N < P * vectors {
                let $n = 0;
                let mut of_x = [$x; N];
                for $n in 1..N {
                    of_x[$n] = $x;
                }
                for $p in 0..P {
                    for $v in 0..vectors {
                        let $a = $w;
                        for n in 0..N {
                            let ($acc, $b) = (acc[$p][n][$v], of_x[n]);
                            acc[$p][n][$v] = $sum;
                        }
                    }
                }
            } else {
                let ($p, $v) = (0, 0);
                let mut of_w = [[$w; MAX_VECTORS]; P];
                for $p in 0..P {
                    for $v in 0..vectors {
                        of_w[$p][$v] = $w;
                    }
                }
                for $n in 0..N {
                    let $b = $x;
                    for p in 0..P {
                        for v in 0..vectors {
                            let ($acc, $a) = (acc[p][$n][v], of_w[p][v]);
                            acc[p][$n][v] = $sum;
                        }
                    }
                }
            }
        };
    }
    let mut k = steps.start;
    while k < steps.end {
        ahead.ask(s);
        let end = steps.end.min(k + STEPS);
        while k < end {
            let line = |p: usize| weights[p].wrapping_add(k * PANEL * group(W::DTYPE));
            let pairs = |p: usize, v: usize| line(p).cast::<bf16>().wrapping_add(2 * v * S::LANES);
            // SAFETY: k is one of the steps, and there are P panels and N rows.
            unsafe {
                match (W::DTYPE, PAIRS) {
                    (DType::BF16, true) => {
                        let x = |n: usize| x.wrapping_add(n * stride).cast::<bf16>().wrapping_add(2 * k);
                        outer!(|p, v| s.load_pairs(pairs(p, v)), |n| s.splat_pair(x(n)), |acc, w, x| s
                            .dot_pairs(acc, w, x));
                    }
                    (DType::BF16, false) => {
                        let x = |n: usize| x.wrapping_add(n * stride).cast::<f32>().wrapping_add(2 * k);
                        outer!(|p, v| s.first_of(s.load_pairs(pairs(p, v))), |n| s.splat(*x(n)), |acc, w, x| s
                            .fma(w, x, acc));
                        outer!(
                            |p, v| s.second_of(s.load_pairs(pairs(p, v))),
                            |n| s.splat(*x(n).add(1)),
                            |acc, w, x| s.fma(w, x, acc)
                        );
                    }
                    _ => {
                        let x = |n: usize| x.wrapping_add(n * stride).cast::<f32>().wrapping_add(k);
                        outer!(
                            |p, v| s.load_raw(line(p).wrapping_add(v * S::LANES)),
                            |n| s.splat(*x(n)),
                            |acc, w, x| s.fma(w, x, acc)
                        );
                    }
                }
            }
            k += 1;
        }
    }
    for (p, acc) in acc.into_iter().enumerate() {
        for (n, acc) in acc.into_iter().enumerate() {
            for (v, acc) in acc.into_iter().enumerate().take(vectors) {
                // SAFETY: as above.
                unsafe { s.store_raw(acc, sums.add(n).cast::<f32>().add(column(p, v))) };
            }
        }
    }
}
