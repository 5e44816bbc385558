//! Sums of outer products: the inner loop of every matrix product whose inner dimension is not the contiguous one.
//!
//! ```text
//! for a slice of columns n (4 vectors, or 2, as the registers allow)
//!     for a tile of rows m (6, 2, 1)
//!         acc[m][n] = c[m][n], or 0 where a sum begins
//!         for k
//!             acc[m][n] += a[m][k] * b[k][n]
//!         c[m][n] = acc[m][n], or where the result goes, rounded
//! ```
//!
//! A word of a and b is a number in f32, or a pair of bf16 that follow each other in k: then a product is the sum of two.
//!
//! Constraint: each element of c is one chain of multiply-adds in ascending k, whatever the tile, so that its bits do not
//! depend on how k is cut into calls.

use super::SharedSlice;
use super::simd::{Simd, Task};
use fused_moe_core::dtype::Float;
use half::bf16;

/// Columns of `b` and `c`: the widest slice, so that the rows of a slice lie without gaps and share the sets of the
/// first-level cache evenly.
pub(crate) const OUTER_COLUMNS: usize = 64;

/// Bytes that come from memory together.
const LINE: usize = 64;

/// `c[m][n] += sum_k a[m * steps[0] + k * steps[1]] * b[k][n]`.
pub(crate) struct Outer<'a, Y> {
    /// Words: f32, or pairs of bf16.
    pub(crate) a: &'a [u32],
    pub(crate) steps: [usize; 2],
    pub(crate) b: &'a [[u32; OUTER_COLUMNS]],
    pub(crate) c: &'a mut [[f32; OUTER_COLUMNS]],
    /// Whether the sums begin here: c is not read.
    pub(crate) fresh: bool,
    /// Where the sums end here: c is not written.
    pub(crate) to: Option<Place<'a, Y>>,
    /// How many columns count; those of the last slice are all made.
    pub(crate) columns: usize,
    /// What is read from memory next: asked for bit by bit, so that it comes while this is multiplied.
    pub(crate) ahead: &'a [&'a [u8]],
}

/// Rows of `OUTER_COLUMNS` results.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a, Y> {
    pub(crate) cells: SharedSlice<'a, Y>,
    pub(crate) start: usize,
    pub(crate) stride: usize,
    /// Whether they go past the caches, where each tile has whole lines of them.
    pub(crate) stream: bool,
}

/// [`Outer`] where words are pairs of bf16, by the instruction set's own products of pairs.
pub(super) struct PairOuter<'a, Y>(pub(super) Outer<'a, Y>);

/// Waits until results that went past the caches are there for other threads.
pub(super) struct Settle;

/// Lines of pairs: `to[n] = [first[n], second[n]]`.
pub(super) struct Interleave<'a> {
    pub(super) first: &'a [bf16],
    pub(super) second: &'a [bf16],
    pub(super) to: &'a mut [u32],
}

impl<Y: Float> Task for Outer<'_, Y> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if S::WIDE_TILE { slices::<S, Numbers, Y, 4>(s, self) } else { slices::<S, Numbers, Y, 2>(s, self) }
    }
}

impl<Y: Float> Task for PairOuter<'_, Y> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if S::WIDE_TILE { slices::<S, Pairs, Y, 4>(s, self.0) } else { slices::<S, Pairs, Y, 2>(s, self.0) }
    }
}

/// What a word is.
trait Word<S: Simd> {
    /// `LANES` words.
    type Words: Copy;
    /// `LANES` words.
    ///
    /// # Safety
    /// They are readable at `from`.
    unsafe fn load(s: S, from: *const u32) -> Self::Words;
    /// The word at `from` in every lane.
    ///
    /// # Safety
    /// It is readable.
    unsafe fn splat(s: S, from: *const u32) -> Self::Words;
    /// `acc + w * x`.
    fn multiply(s: S, acc: S::Vector, w: Self::Words, x: Self::Words) -> S::Vector;
}

/// f32.
struct Numbers;

/// Pairs of bf16.
struct Pairs;

impl<S: Simd> Word<S> for Numbers {
    type Words = S::Vector;

    #[inline(always)]
    unsafe fn load(s: S, from: *const u32) -> S::Vector {
        // SAFETY: as the caller vouches; a number has the size and the alignment of a word.
        unsafe { s.load_raw(from.cast::<f32>()) }
    }

    #[inline(always)]
    unsafe fn splat(s: S, from: *const u32) -> S::Vector {
        // SAFETY: likewise.
        s.splat(unsafe { *from.cast::<f32>() })
    }

    #[inline(always)]
    fn multiply(s: S, acc: S::Vector, w: S::Vector, x: S::Vector) -> S::Vector {
        s.fma(w, x, acc)
    }
}

impl<S: Simd> Word<S> for Pairs {
    type Words = S::Pairs;

    #[inline(always)]
    unsafe fn load(s: S, from: *const u32) -> S::Pairs {
        // SAFETY: as the caller vouches; two numbers have the size of a word.
        unsafe { s.load_pairs(from.cast()) }
    }

    #[inline(always)]
    unsafe fn splat(s: S, from: *const u32) -> S::Pairs {
        // SAFETY: likewise.
        unsafe { s.splat_pair(from.cast()) }
    }

    #[inline(always)]
    fn multiply(s: S, acc: S::Vector, w: S::Pairs, x: S::Pairs) -> S::Vector {
        s.dot_pairs(acc, w, x)
    }
}

impl Task for Settle {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        s.settle();
    }
}

impl Task for Interleave<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for ((to, first), second) in self.to.iter_mut().zip(self.first).zip(self.second) {
            *to = u32::from(first.to_bits()) | (u32::from(second.to_bits()) << 16);
        }
    }
}

#[inline(always)]
fn slices<S: Simd, W: Word<S>, Y: Float, const V: usize>(s: S, op: Outer<'_, Y>) {
    let Outer { a, steps, b, c, fresh, to, columns, ahead } = op;
    let ([m_step, k_step], rows, depth) = (steps, c.len(), b.len());
    if rows == 0 || depth == 0 {
        return;
    }
    let last = (rows - 1).checked_mul(m_step).zip((depth - 1).checked_mul(k_step));
    if last.and_then(|(m, k)| m.checked_add(k)).is_none_or(|last| last >= a.len()) {
        return;
    }
    let out = match to {
        None => None,
        Some(Place { cells, start, stride, stream }) => {
            let Some(first) = cells.place(start, [rows, OUTER_COLUMNS, stride]) else { return };
            let bytes = [first.addr(), stride * size_of::<Y>(), V * S::LANES * size_of::<Y>()];
            Some((first, stride, stream && bytes.iter().all(|bytes| bytes.is_multiple_of(LINE))))
        }
    };
    let width = V * S::LANES;
    let tiles = rows.div_ceil(6) * columns.min(OUTER_COLUMNS).div_ceil(width);
    let mut ahead = ahead.chunks(ahead.len().div_ceil(tiles.max(1)).max(1));
    for n in (0..columns.min(OUTER_COLUMNS)).step_by(width) {
        let mut m = 0;
        macro_rules! tiles {
            ($count:literal) => {
                while rows - m >= $count {
                    for row in ahead.next().unwrap_or_default() {
                        row.iter().step_by(LINE).for_each(|at| s.prefetch(at));
                    }
                    let a = a.as_ptr().wrapping_add(m * m_step);
                    // SAFETY: the largest index of a was checked above; n + width <= OUTER_COLUMNS since width divides it;
                    // rows m to m + $count of c exist, and of the place where results go, whose alignment was checked.
                    unsafe {
                        let c = c.as_mut_ptr().add(m).cast::<f32>().add(n);
                        let acc = tile::<S, W, $count, V>(s, (a, steps), b, (c.cast_const(), fresh), n);
                        match out {
                            None => keep(s, acc, c),
                            Some((to, stride, stream)) => {
                                let to = (to.add(m * stride + n), stride);
                                if stream {
                                    put::<_, Y, $count, V, true>(s, acc, to);
                                } else {
                                    put::<_, Y, $count, V, false>(s, acc, to);
                                }
                            }
                        }
                    }
                    m += $count;
                }
            };
        }
        tiles!(6);
        tiles!(2);
        tiles!(1);
    }
}

/// The sums of M rows, V vectors each from column n on; without `fresh` they go on from c.
///
/// # Safety
/// `a[m * steps[0] + k * steps[1]]` is readable for m below M and k below `b.len()`, `n + V * LANES <= OUTER_COLUMNS`, and M
/// rows of `OUTER_COLUMNS` elements lie at `c`, V vectors of each to be read.
#[inline(always)]
unsafe fn tile<S: Simd, W: Word<S>, const M: usize, const V: usize>(
    s: S,
    (a, [m_step, k_step]): (*const u32, [usize; 2]),
    b: &[[u32; OUTER_COLUMNS]],
    (c, fresh): (*const f32, bool),
    n: usize,
) -> [[S::Vector; V]; M] {
    let mut acc = [[s.splat(0.0); V]; M];
    if !fresh {
        for (m, acc) in acc.iter_mut().enumerate() {
            for (v, acc) in acc.iter_mut().enumerate() {
                // SAFETY: as the caller vouches.
                *acc = unsafe { s.load_raw(c.add(m * OUTER_COLUMNS + v * S::LANES)) };
            }
        }
    }
    for (k, row) in b.iter().enumerate() {
        let line = row.as_ptr().wrapping_add(n);
        // SAFETY: n + V * LANES <= OUTER_COLUMNS, the length of a row.
        let mut x = [unsafe { W::load(s, line) }; V];
        for (v, x) in x.iter_mut().enumerate().skip(1) {
            // SAFETY: as above.
            *x = unsafe { W::load(s, line.wrapping_add(v * S::LANES)) };
        }
        for (m, acc) in acc.iter_mut().enumerate() {
            // SAFETY: as the caller vouches.
            let w = unsafe { W::splat(s, a.wrapping_add(m * m_step + k * k_step)) };
            for (acc, x) in acc.iter_mut().zip(x) {
                *acc = W::multiply(s, *acc, w, x);
            }
        }
    }
    acc
}

/// M rows of sums, V vectors each, to rows of `OUTER_COLUMNS` elements that are this call's alone.
///
/// # Safety
/// They are writable there.
#[inline(always)]
unsafe fn keep<S: Simd, const M: usize, const V: usize>(s: S, acc: [[S::Vector; V]; M], c: *mut f32) {
    for (m, acc) in acc.into_iter().enumerate() {
        for (v, acc) in acc.into_iter().enumerate() {
            // SAFETY: as the caller vouches.
            unsafe { s.store_raw(acc, c.add(m * OUTER_COLUMNS + v * S::LANES)) };
        }
    }
}

/// M rows of results, V vectors each, to rows `stride` apart.
///
/// # Safety
/// They are writable there, by atomics of other threads too, and with STREAM aligned for vectors.
#[inline(always)]
unsafe fn put<S: Simd, Y: Float, const M: usize, const V: usize, const STREAM: bool>(
    s: S,
    acc: [[S::Vector; V]; M],
    (to, stride): (*mut Y, usize),
) {
    for (m, acc) in acc.into_iter().enumerate() {
        for (v, acc) in acc.into_iter().enumerate() {
            // SAFETY: as the caller vouches.
            unsafe { s.store_shared::<Y, STREAM>(acc, to.add(m * stride + v * S::LANES)) };
        }
    }
}
