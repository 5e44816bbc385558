//! Sums of outer products: the inner loop of every matrix product whose inner dimension is not the contiguous one.
//!
//! ```text
//! for a slice of columns n (4 vectors, or 2, as the registers allow)
//!     for a tile of rows m (6, 2, 1)
//!         acc[m][n] = c[m][n]
//!         for k
//!             acc[m][n] += a[m][k] * b[k][n]
//!         c[m][n] = acc[m][n]
//! ```
//!
//! Constraint: each element of c is one chain of multiply-adds in ascending k, whatever the tile, so that its bits do not
//! depend on how k is cut into calls.

use super::simd::{Simd, Task};

/// Columns of `b` and `c`: the widest slice, so that the rows of a slice lie without gaps and share the sets of the
/// first-level cache evenly.
pub(crate) const OUTER_COLUMNS: usize = 64;

/// Bytes that come from memory together.
const LINE: usize = 64;

/// `c[m][n] += sum_k a[m * steps[0] + k * steps[1]] * b[k][n]`.
pub(super) struct Outer<'a> {
    pub(super) a: &'a [f32],
    pub(super) steps: [usize; 2],
    pub(super) b: &'a [[f32; OUTER_COLUMNS]],
    pub(super) c: &'a mut [[f32; OUTER_COLUMNS]],
    /// How many columns count; those of the last slice are all made.
    pub(super) columns: usize,
    /// What is read from memory next: asked for bit by bit, so that it comes while this is multiplied.
    pub(super) ahead: &'a [&'a [u8]],
}

impl Task for Outer<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if S::WIDE_TILE { slices::<S, 4>(s, self) } else { slices::<S, 2>(s, self) }
    }
}

#[inline(always)]
fn slices<S: Simd, const V: usize>(s: S, op: Outer<'_>) {
    let Outer { a, steps, b, c, columns, ahead } = op;
    let ([m_step, k_step], rows, depth) = (steps, c.len(), b.len());
    if rows == 0 || depth == 0 {
        return;
    }
    let last = (rows - 1).checked_mul(m_step).zip((depth - 1).checked_mul(k_step));
    if last.and_then(|(m, k)| m.checked_add(k)).is_none_or(|last| last >= a.len()) {
        return;
    }
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
                    // rows m to m + $count of c exist.
                    unsafe { tile::<S, $count, V>(s, (a, steps), b, c.as_mut_ptr().add(m).cast::<f32>().add(n), n) }
                    m += $count;
                }
            };
        }
        tiles!(6);
        tiles!(2);
        tiles!(1);
    }
}

/// M rows of c from `c` on, V vectors each from column n on.
///
/// # Safety
/// `a[m * steps[0] + k * steps[1]]` is readable for m below M and k below `b.len()`, `n + V * LANES <= OUTER_COLUMNS`, and M
/// rows of `OUTER_COLUMNS` elements lie at `c`, V vectors of each to be written.
#[inline(always)]
unsafe fn tile<S: Simd, const M: usize, const V: usize>(
    s: S,
    (a, [m_step, k_step]): (*const f32, [usize; 2]),
    b: &[[f32; OUTER_COLUMNS]],
    c: *mut f32,
    n: usize,
) {
    let mut acc = [[s.splat(0.0); V]; M];
    for (m, acc) in acc.iter_mut().enumerate() {
        for (v, acc) in acc.iter_mut().enumerate() {
            // SAFETY: as the caller vouches.
            *acc = unsafe { s.load_raw(c.add(m * OUTER_COLUMNS + v * S::LANES).cast_const()) };
        }
    }
    let mut x = [s.splat(0.0); V];
    for (k, row) in b.iter().enumerate() {
        for (v, x) in x.iter_mut().enumerate() {
            // SAFETY: n + V * LANES <= OUTER_COLUMNS, the length of a row.
            *x = unsafe { s.load_raw(row.as_ptr().add(n + v * S::LANES)) };
        }
        for (m, acc) in acc.iter_mut().enumerate() {
            // SAFETY: as the caller vouches.
            let w = s.splat(unsafe { *a.add(m * m_step + k * k_step) });
            for (acc, x) in acc.iter_mut().zip(x) {
                *acc = s.fma(w, x, *acc);
            }
        }
    }
    for (m, acc) in acc.into_iter().enumerate() {
        for (v, acc) in acc.into_iter().enumerate() {
            // SAFETY: as the caller vouches.
            unsafe { s.store_raw(acc, c.add(m * OUTER_COLUMNS + v * S::LANES)) };
        }
    }
}
