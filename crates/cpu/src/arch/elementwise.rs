//! Conversions and the vector operations around the matrix products.
//!
//! Constraint: what happens to one element never depends on where it stands, so the last, shorter vector goes through
//! the same instructions as the others.

use super::math::exp;
use super::simd::{Simd, Task};
use fused_moe_core::dtype::Float;

/// Both cut to the shorter length.
#[inline(always)]
fn common<'a, X, Y>(x: &'a [X], y: &'a mut [Y]) -> (&'a [X], &'a mut [Y]) {
    debug_assert_eq!(x.len(), y.len());
    let n = x.len().min(y.len());
    (&x[..n], &mut y[..n])
}

/// `to = from`, converted.
pub(super) struct Convert<'a, X, Y> {
    pub(super) from: &'a [X],
    pub(super) to: &'a mut [Y],
}

impl<X: Float, Y: Float> Task for Convert<'_, X, Y> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (from, to) = common(self.from, self.to);
        for (x, y) in from.chunks(S::LANES).zip(to.chunks_mut(S::LANES)) {
            s.store(s.load(x), y);
        }
    }
}

/// `acc += w * x`.
pub(super) struct Axpy<'a, X> {
    pub(super) w: f32,
    pub(super) x: &'a [X],
    pub(super) acc: &'a mut [f32],
}

impl<X: Float> Task for Axpy<'_, X> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let w = s.splat(self.w);
        let (x, acc) = common(self.x, self.acc);
        for (x, acc) in x.chunks(S::LANES).zip(acc.chunks_mut(S::LANES)) {
            s.store(s.fma(w, s.load(x), s.load(acc)), acc);
        }
    }
}

/// `out = x * factor`.
pub(super) struct Scale<'a, X> {
    pub(super) x: &'a [X],
    pub(super) factor: f32,
    pub(super) out: &'a mut [f32],
}

impl<X: Float> Task for Scale<'_, X> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let factor = s.splat(self.factor);
        let (x, out) = common(self.x, self.out);
        for (x, out) in x.chunks(S::LANES).zip(out.chunks_mut(S::LANES)) {
            s.store(s.mul(s.load(x), factor), out);
        }
    }
}

/// `out = x * factor * weight`.
pub(super) struct ScaleBy<'a, X> {
    pub(super) x: &'a [X],
    pub(super) factor: f32,
    pub(super) weight: &'a [f32],
    pub(super) out: &'a mut [f32],
}

impl<X: Float> Task for ScaleBy<'_, X> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let factor = s.splat(self.factor);
        let (x, out) = common(self.x, self.out);
        let (weight, out) = common(self.weight, out);
        let inputs = x.chunks(S::LANES).zip(weight.chunks(S::LANES));
        for ((x, weight), out) in inputs.zip(out.chunks_mut(S::LANES)) {
            s.store(s.mul(s.mul(s.load(x), factor), s.load(weight)), out);
        }
    }
}

/// `sum x^2`.
pub(super) struct SumSquares<'a, X> {
    pub(super) x: &'a [X],
}

impl<X: Float> Task for SumSquares<'_, X> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sum = s.splat(0.0);
        for x in self.x.chunks(S::LANES) {
            let x = s.load(x);
            sum = s.fma(x, x, sum);
        }
        s.sum(sum)
    }
}

/// `x = exp(x - max)`, returns the sum.
pub(super) struct ExpSum<'a> {
    pub(super) x: &'a mut [f32],
    pub(super) max: f32,
}

impl Task for ExpSum<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let max = s.splat(self.max);
        let mut sum = s.splat(0.0);
        for x in self.x.chunks_mut(S::LANES) {
            s.store(exp(s, s.sub(s.load(x), max)), x);
            // Read back, so that the lanes past the end are zero and not exp(-max).
            sum = s.add(sum, s.load(x));
        }
        s.sum(sum)
    }
}
