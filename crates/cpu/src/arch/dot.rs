//! Many dot products at once: the inner loop of every matrix product.
//!
//! ```text
//! for a tile of weight rows m (4, then 1)
//!     for a tile of tokens n (6, 4, 2, 1, as the registers allow)
//!         acc[m][n] = 0, one vector each
//!         for k in steps of LANES, the last one padded with zeros
//!             acc[m][n] += weights[m][k..] * tokens[n][k..]
//!         out[m][n] = sum of acc[m][n]'s lanes
//! ```
//!
//! Constraint: element k always goes to lane `k % LANES` of one accumulator, in ascending k, and the lanes are always
//! summed in the same order. So the bits of `out[m][n]` depend on the two vectors alone, whatever the tile.

use super::simd::{Simd, Task};
use fused_moe_core::dtype::Float;

/// `out[m * tokens.len() + n] = sum_k weights[m][k] * tokens[n][k]`.
pub(super) struct Dot<'a, W, X> {
    pub(super) weights: &'a [&'a [W]],
    pub(super) tokens: &'a [&'a [X]],
    pub(super) out: &'a mut [f32],
}

impl<W: Float, X: Float> Task for Dot<'_, W, X> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (weights, tokens) = (self.weights, self.tokens);
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
        let mut out = self.out.chunks_mut(tokens.len());
        let (fours, ones) = weights.as_chunks::<4>();
        for rows in fours {
            let mut line = || out.next().unwrap_or_default();
            let lines = [line(), line(), line(), line()];
            // SAFETY: `length` is the shortest of all rows and tokens.
            unsafe { all_tokens(s, length, rows, tokens, lines) }
        }
        for row in ones {
            let line = out.next().unwrap_or_default();
            // SAFETY: `length` is the shortest of all rows and tokens.
            unsafe { all_tokens(s, length, &[*row], tokens, [line]) }
        }
    }
}

/// M rows times every token; `out[m][n]`.
///
/// # Safety
/// Every row and every token has `length` elements.
#[inline(always)]
unsafe fn all_tokens<S: Simd, W: Float, X: Float, const M: usize>(
    s: S,
    length: usize,
    rows: &[&[W]; M],
    tokens: &[&[X]],
    mut out: [&mut [f32]; M],
) {
    let (mut rest, mut n) = (tokens, 0);
    macro_rules! tiles {
        ($count:literal) => {
            while let Some((tile, others)) = rest.split_first_chunk::<$count>() {
                // SAFETY: as the caller vouches.
                let sums = unsafe { self::tile(s, length, rows, tile) };
                for (line, sums) in out.iter_mut().zip(sums) {
                    for (o, sum) in line.iter_mut().skip(n).zip(sums) {
                        *o = sum;
                    }
                }
                (rest, n) = (others, n + $count);
            }
        };
    }
    if S::WIDE_TILE {
        tiles!(6);
        tiles!(4);
    }
    tiles!(2);
    tiles!(1);
}

/// M rows times N tokens.
///
/// # Safety
/// Every row and every token has `length` elements.
#[inline(always)]
unsafe fn tile<S: Simd, W: Float, X: Float, const M: usize, const N: usize>(
    s: S,
    length: usize,
    rows: &[&[W]; M],
    tokens: &[&[X]; N],
) -> [[f32; N]; M] {
    let rows = rows.map(<[W]>::as_ptr);
    let tokens = tokens.map(<[X]>::as_ptr);
    let mut acc = [[s.splat(0.0); N]; M];
    let mut w = [s.splat(0.0); M];
    let mut k = 0;
    while k + S::LANES <= length {
        for m in 0..M {
            // SAFETY: k + LANES <= length, and the row has `length` elements.
            w[m] = unsafe { s.load_raw(rows[m].add(k)) };
        }
        for n in 0..N {
            // SAFETY: k + LANES <= length, and the token has `length` elements.
            let x = unsafe { s.load_raw(tokens[n].add(k)) };
            for m in 0..M {
                acc[m][n] = s.fma(w[m], x, acc[m][n]);
            }
        }
        k += S::LANES;
    }
    if k < length {
        for m in 0..M {
            // SAFETY: k < length, and the row has `length` elements.
            w[m] = s.load_part(unsafe { std::slice::from_raw_parts(rows[m].add(k), length - k) });
        }
        for n in 0..N {
            // SAFETY: k < length, and the token has `length` elements.
            let x = s.load_part(unsafe { std::slice::from_raw_parts(tokens[n].add(k), length - k) });
            for m in 0..M {
                acc[m][n] = s.fma(w[m], x, acc[m][n]);
            }
        }
    }
    let mut sums = [[0.0; N]; M];
    for m in 0..M {
        for n in 0..N {
            sums[m][n] = s.sum(acc[m][n]);
        }
    }
    sums
}
