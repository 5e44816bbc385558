//! NEON, the vectors of every 64-bit ARM processor.

use super::simd::{Simd, Task};
use fused_moe_core::dtype::{DType, Float};
use half::bf16;
use std::arch::aarch64::*;
use std::arch::asm;

/// Proof that the CPU has NEON.
#[derive(Clone, Copy)]
pub(super) struct Neon(());

/// Runs a task.
#[target_feature(enable = "neon")]
pub(super) fn run<T: Task>(task: T) -> T::Output {
    task.run(Neon(()))
}

/// Intrinsics that read and write no memory: all that they ask for is the instruction set.
macro_rules! isa {
    ($e:expr) => {
        // SAFETY: a value of Neon exists, so the CPU has the instructions; no memory is read or written.
        unsafe { $e }
    };
}

impl Neon {
    /// Four f16 numbers as f32: the conversion is of the first version of the architecture, its intrinsic not yet stable.
    #[inline(always)]
    fn widen_f16(self, bits: uint16x4_t) -> float32x4_t {
        let wide;
        isa!(asm!("fcvtl {w:v}.4s, {n:v}.4h", w = lateout(vreg) wide, n = in(vreg) bits,
            options(pure, nomem, nostack, preserves_flags)));
        wide
    }

    /// Four numbers as f16, rounded to nearest even.
    #[inline(always)]
    fn round_to_f16(self, v: float32x4_t) -> uint16x4_t {
        let narrow;
        isa!(asm!("fcvtn {n:v}.4h, {w:v}.4s", n = lateout(vreg) narrow, w = in(vreg) v,
            options(pure, nomem, nostack, preserves_flags)));
        narrow
    }

    /// The upper halves of the lanes, rounded to nearest even.
    #[inline(always)]
    fn round_to_bf16(self, v: float32x4_t) -> uint16x4_t {
        isa!({
            let bits = vreinterpretq_u32_f32(v);
            let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
            let rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
            // A NaN could carry over into infinity: keep its upper half and make it quiet.
            let quiet = vorrq_u32(bits, vdupq_n_u32(0x0040_0000));
            vshrn_n_u32::<16>(vbslq_u32(vceqq_f32(v, v), rounded, quiet))
        })
    }
}

impl Simd for Neon {
    type Vector = float32x4_t;
    const LANES: usize = 4;
    const WIDE_TILE: bool = true;
    const PANEL_ROWS: usize = 3;
    type Pairs = uint32x4_t;

    #[inline(always)]
    fn prefetch<X>(self, at: *const X) {
        isa!(asm!("prfm pldl1keep, [{at}]", at = in(reg) at, options(nostack, preserves_flags, readonly)));
    }

    #[inline(always)]
    fn prefetch_far<X>(self, at: *const X) {
        isa!(asm!("prfm pldl2keep, [{at}]", at = in(reg) at, options(nostack, preserves_flags, readonly)));
    }

    #[inline(always)]
    unsafe fn load_pairs(self, from: *const bf16) -> uint32x4_t {
        // SAFETY: the caller vouches for 8 numbers of 2 bytes; self proves the instructions.
        unsafe { vreinterpretq_u32_u16(vld1q_u16(from.cast())) }
    }

    #[inline(always)]
    unsafe fn splat_pair(self, from: *const bf16) -> uint32x4_t {
        // SAFETY: the caller vouches for two numbers of 2 bytes; self proves the instructions.
        unsafe { vdupq_n_u32(from.cast::<u32>().read_unaligned()) }
    }

    #[inline(always)]
    fn first_of(self, pairs: uint32x4_t) -> float32x4_t {
        isa!(vreinterpretq_f32_u32(vshlq_n_u32::<16>(pairs)))
    }

    #[inline(always)]
    fn second_of(self, pairs: uint32x4_t) -> float32x4_t {
        isa!(vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff_0000))))
    }

    #[inline(always)]
    fn splat(self, x: f32) -> float32x4_t {
        isa!(vdupq_n_f32(x))
    }

    #[inline(always)]
    unsafe fn load_raw<X: Float>(self, from: *const X) -> float32x4_t {
        // SAFETY: the caller vouches for 4 elements, of the size that DTYPE says; self proves the instructions.
        unsafe {
            match X::DTYPE {
                DType::F16 => self.widen_f16(vld1_u16(from.cast())),
                DType::BF16 => vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(from.cast()))),
                _ => vld1q_f32(from.cast()),
            }
        }
    }

    #[inline(always)]
    unsafe fn store_raw<Y: Float>(self, v: float32x4_t, to: *mut Y) {
        // SAFETY: the caller vouches for 4 elements, of the size that DTYPE says; self proves the instructions.
        unsafe {
            match Y::DTYPE {
                DType::F16 => vst1_u16(to.cast(), self.round_to_f16(v)),
                DType::BF16 => vst1_u16(to.cast(), self.round_to_bf16(v)),
                _ => vst1q_f32(to.cast(), v),
            }
        }
    }

    #[inline(always)]
    fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        isa!(vaddq_f32(a, b))
    }

    #[inline(always)]
    fn sub(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        isa!(vsubq_f32(a, b))
    }

    #[inline(always)]
    fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        isa!(vmulq_f32(a, b))
    }

    #[inline(always)]
    fn div(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        isa!(vdivq_f32(a, b))
    }

    #[inline(always)]
    fn fma(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        isa!(vfmaq_f32(c, a, b))
    }

    #[inline(always)]
    fn min(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        isa!(vbslq_f32(vcltq_f32(a, b), a, b))
    }

    #[inline(always)]
    fn max(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        isa!(vbslq_f32(vcgtq_f32(a, b), a, b))
    }

    #[inline(always)]
    fn abs(self, a: float32x4_t) -> float32x4_t {
        isa!(vabsq_f32(a))
    }

    #[inline(always)]
    fn if_negative(self, x: float32x4_t, yes: float32x4_t, no: float32x4_t) -> float32x4_t {
        isa!(vbslq_f32(vcltzq_f32(x), yes, no))
    }

    #[inline(always)]
    fn scale_by_power(self, a: float32x4_t, n: float32x4_t) -> float32x4_t {
        // In two factors, the first of them exact: one alone would leave the exponent's range.
        isa!({
            let bias = vdupq_n_s32(127);
            let n = vcvtq_s32_f32(n);
            let half = vshrq_n_s32::<1>(n);
            let rest = vsubq_s32(n, half);
            let first = vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(half, bias)));
            let second = vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(rest, bias)));
            vmulq_f32(vmulq_f32(a, first), second)
        })
    }

    #[inline(always)]
    fn sum(self, a: float32x4_t) -> f32 {
        isa!({
            let two = vadd_f32(vget_low_f32(a), vget_high_f32(a));
            vget_lane_f32::<0>(two) + vget_lane_f32::<1>(two)
        })
    }
}
