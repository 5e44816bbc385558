//! Many dot products at once: the inner loop of every matrix product.
//!
//! ```text
//! for a tile of tokens n (6, 4, 2, 1, as the registers allow), which stay in the first-level cache
//!     for a tile of weight rows m (4, then 1)
//!         acc[m][n] = 0, one vector each
//!         for k in steps of LANES, the last one padded with zeros
//!             acc[m][n] += weights[m][k..] * tokens[n][k..]        or pairs of bf16, steps of twice as many
//!         out[m][n] = sum of acc[m][n]'s lanes
//! ```
//!
//! Constraint: element k always goes to one lane of one accumulator, as does a pair, in ascending k, and the lanes are
//! always summed in the same order. So the bits of `out[m][n]` depend on the two vectors alone, whatever the tile.
//!
//! With one or two tokens the weights come from memory. The hardware prefetcher stops at a page's end and is too slow
//! for rows of 16-bit numbers, so then the tiles ask for the lines of a page further on, in this row or (taking the rows
//! to lie at equal distances) in the row four further. A wrong guess is only a wasted hint.

use super::simd::{MAX_LANES, Simd, Task};
use fused_moe_core::dtype::Float;
use half::bf16;

/// Bytes that the hardware prefetcher does not look beyond.
const PAGE: usize = 4096;

/// `out[m * tokens.len() + n] = sum_k weights[m][k] * tokens[n][k]`.
pub(super) struct Dot<'a, W, X> {
    pub(super) weights: &'a [&'a [W]],
    pub(super) tokens: &'a [&'a [X]],
    pub(super) out: &'a mut [f32],
}

/// The same where both formats are bf16, by the instruction set's own products of pairs.
pub(super) struct PairDot<'a, W, X>(pub(super) Dot<'a, W, X>);

impl<W: Float, X: Float> Task for Dot<'_, W, X> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.all::<S, Numbers>(s);
    }
}

impl<W: Float, X: Float> Task for PairDot<'_, W, X> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.0.all::<S, Pairs>(s);
    }
}

/// What is multiplied at once.
trait Step<S: Simd> {
    /// A vector of it.
    type Elements: Copy;
    /// How many elements that are.
    const COUNT: usize;

    /// `COUNT` elements.
    ///
    /// # Safety
    /// They are readable at `from`.
    unsafe fn load<X: Float>(s: S, from: *const X) -> Self::Elements;
    /// Fewer, and zeros.
    fn load_part<X: Float>(s: S, from: &[X]) -> Self::Elements;
    /// `acc + w * x`.
    fn add(s: S, acc: S::Vector, w: Self::Elements, x: Self::Elements) -> S::Vector;
}

/// Numbers of any format, in f32.
struct Numbers;

/// Pairs of bf16; of rows in no other format.
struct Pairs;

impl<S: Simd> Step<S> for Numbers {
    type Elements = S::Vector;
    const COUNT: usize = S::LANES;

    #[inline(always)]
    unsafe fn load<X: Float>(s: S, from: *const X) -> S::Vector {
        // SAFETY: as the caller vouches.
        unsafe { s.load_raw(from) }
    }

    #[inline(always)]
    fn load_part<X: Float>(s: S, from: &[X]) -> S::Vector {
        s.load_part(from)
    }

    #[inline(always)]
    fn add(s: S, acc: S::Vector, w: S::Vector, x: S::Vector) -> S::Vector {
        s.fma(w, x, acc)
    }
}

impl<S: Simd> Step<S> for Pairs {
    type Elements = S::Pairs;
    const COUNT: usize = 2 * S::LANES;

    #[inline(always)]
    unsafe fn load<X: Float>(s: S, from: *const X) -> S::Pairs {
        const { assert!(size_of::<X>() >= size_of::<bf16>()) };
        // SAFETY: the caller vouches for as many elements, which are no smaller.
        unsafe { s.load_pairs(from.cast()) }
    }

    #[inline(always)]
    fn load_part<X: Float>(s: S, from: &[X]) -> S::Pairs {
        let mut padded = [X::zeroed(); 2 * MAX_LANES];
        for (p, x) in padded.iter_mut().zip(from) {
            *p = *x;
        }
        // SAFETY: `padded` has 2 * MAX_LANES >= COUNT elements.
        unsafe { Self::load(s, padded.as_ptr()) }
    }

    #[inline(always)]
    fn add(s: S, acc: S::Vector, w: S::Pairs, x: S::Pairs) -> S::Vector {
        s.dot_pairs(acc, w, x)
    }
}

impl<W: Float, X: Float> Dot<'_, W, X> {
    #[inline(always)]
    fn all<S: Simd, P: Step<S>>(self, s: S) {
        let Self { weights, tokens, out } = self;
        if weights.is_empty() || tokens.is_empty() {
            return;
        }
        let mut length = usize::MAX;
        for row in weights {
            length = length.min(row.len());
        }
        for token in tokens {
            length = length.min(token.len());
        }
        let (mut rest, mut n) = (tokens, 0);
        macro_rules! tiles {
            ($count:literal, $prefetch:literal) => {
                while let Some((tile, others)) = rest.split_first_chunk::<$count>() {
                    let lines = out.chunks_mut(tokens.len()).map(|line| line.get_mut(n..).unwrap_or_default());
                    // SAFETY: `length` is the shortest of all rows and tokens.
                    unsafe { all_rows::<S, P, W, X, $count, $prefetch>(s, length, weights, tile, lines) }
                    (rest, n) = (others, n + $count);
                }
            };
        }
        if tokens.len() <= 2 && size_of::<W>() == 2 {
            tiles!(2, true);
            tiles!(1, true);
            return;
        }
        if S::WIDE_TILE {
            tiles!(6, false);
            tiles!(4, false);
        }
        tiles!(2, false);
        tiles!(1, false);
    }
}

/// Every row times N tokens; a line of results for each row.
///
/// # Safety
/// Every row and every token has `length` elements.
#[inline(always)]
unsafe fn all_rows<'a, S: Simd, P: Step<S>, W: Float, X: Float, const N: usize, const PREFETCH: bool>(
    s: S,
    length: usize,
    weights: &[&[W]],
    tokens: &[&[X]; N],
    mut lines: impl Iterator<Item = &'a mut [f32]>,
) {
    let (fours, ones) = weights.as_chunks::<4>();
    let mut put = |sums: [f32; N]| {
        for (o, sum) in lines.next().unwrap_or_default().iter_mut().zip(sums) {
            *o = sum;
        }
    };
    for rows in fours {
        // SAFETY: as the caller vouches.
        unsafe { tile::<S, P, W, X, 4, N, PREFETCH>(s, length, rows, tokens) }.into_iter().for_each(&mut put);
    }
    for row in ones {
        // SAFETY: as the caller vouches.
        unsafe { tile::<S, P, W, X, 1, N, false>(s, length, &[*row], tokens) }.into_iter().for_each(&mut put);
    }
}

/// M rows times N tokens; with PREFETCH, M is at least 2.
///
/// # Safety
/// Every row and every token has `length` elements.
#[inline(always)]
unsafe fn tile<S: Simd, P: Step<S>, W: Float, X: Float, const M: usize, const N: usize, const PREFETCH: bool>(
    s: S,
    length: usize,
    rows: &[&[W]; M],
    tokens: &[&[X]; N],
) -> [[f32; N]; M] {
    let rows = rows.map(<[W]>::as_ptr);
    let tokens = tokens.map(<[X]>::as_ptr);
    let mut acc = [[s.splat(0.0); N]; M];
    let mut w = [P::load_part::<W>(s, &[]); M];
    let distance = length.min(PAGE / size_of::<W>());
    let tile_stride = if PREFETCH && M > 1 { stride(rows[0], rows[1]).wrapping_mul(M as isize) } else { 0 };
    let mut k = 0;
    while k + P::COUNT <= length {
        if PREFETCH {
            let ahead = k + distance;
            let ahead = if ahead < length { ahead } else { (ahead - length).wrapping_add_signed(tile_stride) };
            for row in rows {
                s.prefetch(row.wrapping_add(ahead));
            }
        }
        for m in 0..M {
            // SAFETY: k + COUNT <= length, and the row has `length` elements.
            w[m] = unsafe { P::load(s, rows[m].add(k)) };
        }
        for n in 0..N {
            // SAFETY: k + COUNT <= length, and the token has `length` elements.
            let x = unsafe { P::load(s, tokens[n].add(k)) };
            for m in 0..M {
                acc[m][n] = P::add(s, acc[m][n], w[m], x);
            }
        }
        k += P::COUNT;
    }
    if k < length {
        for m in 0..M {
            // SAFETY: k < length, and the row has `length` elements.
            w[m] = P::load_part(s, unsafe { std::slice::from_raw_parts(rows[m].add(k), length - k) });
        }
        for n in 0..N {
            // SAFETY: k < length, and the token has `length` elements.
            let x = P::load_part(s, unsafe { std::slice::from_raw_parts(tokens[n].add(k), length - k) });
            for m in 0..M {
                acc[m][n] = P::add(s, acc[m][n], w[m], x);
            }
        }
    }
    let mut sums = [[0.0; N]; M];
    for n in 0..N {
        let mut column = [s.splat(0.0); M];
        for m in 0..M {
            column[m] = acc[m][n];
        }
        let (fours, ones) = column.as_chunks::<4>();
        let mut m = 0;
        for four in fours {
            for sum in s.sum_four(*four) {
                sums[m][n] = sum;
                m += 1;
            }
        }
        for one in ones {
            sums[m][n] = s.sum(*one);
            m += 1;
        }
    }
    sums
}

/// How many elements b lies after a.
#[inline(always)]
fn stride<W>(a: *const W, b: *const W) -> isize {
    (b.addr() as isize).wrapping_sub(a.addr() as isize) / size_of::<W>() as isize
}
