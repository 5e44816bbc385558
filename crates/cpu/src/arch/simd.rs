//! What the algorithms of this module need from an instruction set.

use fused_moe_core::dtype::Float;
use half::bf16;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering::Relaxed};

/// The most lanes any instruction set has.
pub(super) const MAX_LANES: usize = 16;

/// An instruction set. A value of the type proves that the CPU has it, so every method is
/// safe but those that read or write where an address points; only the `run` function of the instruction set's file makes one.
///
/// Methods are `#[inline(always)]`: they must end up inside `run`, where the instruction set is enabled.
pub(super) trait Simd: Copy {
    /// `LANES` numbers in f32.
    type Vector: Copy;
    /// How many, at most `MAX_LANES`.
    const LANES: usize;
    /// Whether a tile of 4 weight rows and 6 tokens fits the registers; otherwise 4 rows and 2 tokens do.
    const WIDE_TILE: bool;
    /// How many rows of x meet a panel at once: their sums of a panel's outputs fit the registers.
    const PANEL_ROWS: usize;
    /// `LANES` pairs of bf16 numbers, as they lie.
    type Pairs: Copy;

    /// Asks for the cache line at `at`, which may be any address.
    fn prefetch<X>(self, at: *const X);
    /// The same, for the second-level cache.
    fn prefetch_far<X>(self, at: *const X);
    /// `LANES` pairs.
    ///
    /// # Safety
    /// `2 * LANES` numbers are readable at `from`.
    unsafe fn load_pairs(self, from: *const bf16) -> Self::Pairs;
    /// The pair at `from` in every lane.
    ///
    /// # Safety
    /// Two numbers are readable at `from`.
    unsafe fn splat_pair(self, from: *const bf16) -> Self::Pairs;
    /// The first of each pair.
    fn first_of(self, pairs: Self::Pairs) -> Self::Vector;
    /// The second of each pair.
    fn second_of(self, pairs: Self::Pairs) -> Self::Vector;
    /// acc + the products of the firsts + those of the seconds; in the instruction set's own order, where it has an
    /// instruction for it, and then numbers below 2^-126 count as zeros.
    #[inline(always)]
    fn dot_pairs(self, acc: Self::Vector, a: Self::Pairs, b: Self::Pairs) -> Self::Vector {
        let acc = self.fma(self.first_of(a), self.first_of(b), acc);
        self.fma(self.second_of(a), self.second_of(b), acc)
    }
    /// x in every lane.
    fn splat(self, x: f32) -> Self::Vector;
    /// `LANES` elements as f32.
    ///
    /// # Safety
    /// `LANES` elements are readable at `from`, which is aligned for X.
    unsafe fn load_raw<X: Float>(self, from: *const X) -> Self::Vector;
    /// `LANES` elements, each the nearest to its lane, ties to even; NaN stays NaN.
    ///
    /// # Safety
    /// `LANES` elements are writable at `to`, which is aligned for Y.
    unsafe fn store_raw<Y: Float>(self, v: Self::Vector, to: *mut Y);
    /// [`store_raw`](Self::store_raw) to elements that other threads may look at meanwhile: each is stored whole. Where
    /// `STREAM` says so they go past the caches, and count as stored after [`settle`](Self::settle).
    ///
    /// # Safety
    /// As for `store_raw`; and all elements but this call's may be reached by others at the same time, as atomics. With
    /// `STREAM`, `to` is aligned for a vector of them.
    #[inline(always)]
    unsafe fn store_shared<Y: Float, const STREAM: bool>(self, v: Self::Vector, to: *mut Y) {
        let mut lanes = [Y::zeroed(); MAX_LANES];
        // SAFETY: `lanes` has MAX_LANES >= LANES elements; an atomic integer has the size and the alignment of the element,
        // of which LANES are writable as the caller vouches.
        unsafe {
            self.store_raw(v, lanes.as_mut_ptr());
            for (i, lane) in lanes.iter().enumerate().take(Self::LANES) {
                match size_of::<Y>() {
                    2 => (*to.add(i).cast::<AtomicU16>()).store(bytemuck::cast(*lane), Relaxed),
                    _ => (*to.add(i).cast::<AtomicU32>()).store(bytemuck::cast(*lane), Relaxed),
                }
            }
        }
    }

    /// Waits until what was stored past the caches is there for other threads.
    #[inline(always)]
    fn settle(self) {}

    /// a + b.
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// a - b.
    fn sub(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// a * b.
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// a / b.
    fn div(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// a * b + c, rounded once where the CPU can.
    fn fma(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// The smaller; b where either is NaN.
    fn min(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// The larger; b where either is NaN.
    fn max(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// |a|.
    fn abs(self, a: Self::Vector) -> Self::Vector;
    /// yes where x < 0, else no.
    fn if_negative(self, x: Self::Vector, yes: Self::Vector, no: Self::Vector) -> Self::Vector;
    /// a * 2^n, rounded once, for whole n in -160..=160. NaN a stays NaN.
    fn scale_by_power(self, a: Self::Vector, n: Self::Vector) -> Self::Vector;
    /// The sum of the lanes, in an order that never changes.
    fn sum(self, a: Self::Vector) -> f32;

    /// `sum` of each, with the same bits.
    #[inline(always)]
    fn sum_four(self, [a, b, c, d]: [Self::Vector; 4]) -> [f32; 4] {
        [self.sum(a), self.sum(b), self.sum(c), self.sum(d)]
    }

    /// The first `LANES` elements of a slice as f32; zeros where it is shorter.
    #[inline(always)]
    fn load<X: Float>(self, from: &[X]) -> Self::Vector {
        if from.len() >= Self::LANES {
            // SAFETY: the slice has LANES elements, aligned as a slice's are.
            unsafe { self.load_raw(from.as_ptr()) }
        } else {
            self.load_part(from)
        }
    }

    /// `load` for fewer than `LANES` elements.
    #[inline(always)]
    fn load_part<X: Float>(self, from: &[X]) -> Self::Vector {
        let mut padded = [X::zeroed(); MAX_LANES];
        for (p, x) in padded.iter_mut().zip(from) {
            *p = *x;
        }
        // SAFETY: `padded` has MAX_LANES >= LANES elements, aligned as an array's are.
        unsafe { self.load_raw(padded.as_ptr()) }
    }

    /// The first lanes to the first `LANES` elements of a slice, or to all of it where it is shorter.
    #[inline(always)]
    fn store<Y: Float>(self, v: Self::Vector, to: &mut [Y]) {
        if to.len() >= Self::LANES {
            // SAFETY: the slice has LANES elements, aligned as a slice's are.
            unsafe { self.store_raw(v, to.as_mut_ptr()) }
        } else {
            self.store_part(v, to);
        }
    }

    /// `store` for fewer than `LANES` elements.
    #[inline(always)]
    fn store_part<Y: Float>(self, v: Self::Vector, to: &mut [Y]) {
        let mut padded = [Y::zeroed(); MAX_LANES];
        // SAFETY: `padded` has MAX_LANES >= LANES elements, aligned as an array's are.
        unsafe { self.store_raw(v, padded.as_mut_ptr()) }
        for (y, p) in to.iter_mut().zip(&padded) {
            *y = *p;
        }
    }
}

/// An algorithm, written once over the instruction sets.
pub(super) trait Task {
    /// What it returns.
    type Output;
    /// Runs it. Implementations are `#[inline(always)]`, and so is all they call that touches a vector.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}
