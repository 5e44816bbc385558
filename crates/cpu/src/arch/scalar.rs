//! Plain Rust, four lanes at a time: what every CPU runs, and what the compiler turns into baseline vectors.

use super::simd::{Simd, Task};
use fused_moe_core::dtype::Float;
use half::bf16;

const LANES: usize = 4;

/// No instruction set beyond the target's baseline.
#[derive(Clone, Copy)]
pub(super) struct Scalar(());

/// Runs a task.
pub(super) fn run<T: Task>(task: T) -> T::Output {
    task.run(Scalar(()))
}

/// `mul_add` is a library call where the baseline has no such instruction.
#[inline(always)]
fn fma(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) { a.mul_add(b, c) } else { a * b + c }
}

/// 2^n for n in -126..=127.
#[inline(always)]
fn power(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// `result[i] = expression of the i-th lanes`.
macro_rules! lanes {
    ($($v:ident),+ => $e:expr) => {{
        let mut result = [0.0; LANES];
        for i in 0..LANES {
            $(let $v = $v[i];)+
            result[i] = $e;
        }
        result
    }};
}

impl Simd for Scalar {
    type Vector = [f32; LANES];
    const LANES: usize = LANES;
    const WIDE_TILE: bool = false;
    const PANEL_ROWS: usize = 1;
    type Pairs = [[bf16; 2]; LANES];

    #[inline(always)]
    fn prefetch<X>(self, _: *const X) {}

    #[inline(always)]
    fn prefetch_far<X>(self, _: *const X) {}

    #[inline(always)]
    unsafe fn load_pairs(self, from: *const bf16) -> [[bf16; 2]; LANES] {
        // SAFETY: the caller vouches for LANES pairs; an array of numbers is aligned as a number is.
        unsafe { from.cast::<[[bf16; 2]; LANES]>().read() }
    }

    #[inline(always)]
    unsafe fn splat_pair(self, from: *const bf16) -> [[bf16; 2]; LANES] {
        // SAFETY: the caller vouches for two numbers; an array of numbers is aligned as a number is.
        [unsafe { from.cast::<[bf16; 2]>().read() }; LANES]
    }

    #[inline(always)]
    fn first_of(self, pairs: [[bf16; 2]; LANES]) -> [f32; LANES] {
        pairs.map(|[first, _]| first.to_f32())
    }

    #[inline(always)]
    fn second_of(self, pairs: [[bf16; 2]; LANES]) -> [f32; LANES] {
        pairs.map(|[_, second]| second.to_f32())
    }

    #[inline(always)]
    fn splat(self, x: f32) -> [f32; LANES] {
        [x; LANES]
    }

    #[inline(always)]
    unsafe fn load_raw<X: Float>(self, from: *const X) -> [f32; LANES] {
        // SAFETY: the caller vouches for LANES elements; an array of X is aligned as X is.
        let x = unsafe { from.cast::<[X; LANES]>().read() };
        lanes!(x => x.to_f32())
    }

    #[inline(always)]
    unsafe fn store_raw<Y: Float>(self, v: [f32; LANES], to: *mut Y) {
        // SAFETY: the caller vouches for LANES elements; an array of Y is aligned as Y is.
        unsafe { to.cast::<[Y; LANES]>().write(v.map(Y::from_f32)) }
    }

    #[inline(always)]
    fn add(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        lanes!(a, b => a + b)
    }

    #[inline(always)]
    fn sub(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        lanes!(a, b => a - b)
    }

    #[inline(always)]
    fn mul(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        lanes!(a, b => a * b)
    }

    #[inline(always)]
    fn div(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        lanes!(a, b => a / b)
    }

    #[inline(always)]
    fn fma(self, a: [f32; LANES], b: [f32; LANES], c: [f32; LANES]) -> [f32; LANES] {
        lanes!(a, b, c => fma(a, b, c))
    }

    #[inline(always)]
    fn min(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        lanes!(a, b => if a < b { a } else { b })
    }

    #[inline(always)]
    fn max(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        lanes!(a, b => if a > b { a } else { b })
    }

    #[inline(always)]
    fn abs(self, a: [f32; LANES]) -> [f32; LANES] {
        lanes!(a => a.abs())
    }

    #[inline(always)]
    fn if_negative(self, x: [f32; LANES], yes: [f32; LANES], no: [f32; LANES]) -> [f32; LANES] {
        lanes!(x, yes, no => if x < 0.0 { yes } else { no })
    }

    #[inline(always)]
    fn scale_by_power(self, a: [f32; LANES], n: [f32; LANES]) -> [f32; LANES] {
        // In two factors, the first of them exact: one alone would leave the exponent's range.
        lanes!(a, n => {
            let n = n as i32;
            let half = n >> 1;
            a * power(half) * power(n - half)
        })
    }

    #[inline(always)]
    fn sum(self, a: [f32; LANES]) -> f32 {
        (a[0] + a[2]) + (a[1] + a[3])
    }
}
