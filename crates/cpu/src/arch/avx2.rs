//! AVX2 with FMA and F16C.

use super::simd::{Simd, Task};
use fused_moe_core::dtype::{DType, Float};
use half::bf16;
use std::arch::asm;
use std::arch::x86_64::*;

/// Proof that the CPU has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// Runs a task.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn run<T: Task>(task: T) -> T::Output {
    task.run(Avx2(()))
}

/// Intrinsics that read and write no memory: all that they ask for is the instruction set.
macro_rules! isa {
    ($e:expr) => {
        // SAFETY: a value of Avx2 exists, so the CPU has the instructions; no memory is read or written.
        unsafe { $e }
    };
}

impl Avx2 {
    /// The upper halves of the lanes, rounded to nearest even, in 16 bits each.
    #[inline(always)]
    fn round_to_bf16(self, v: __m256) -> __m128i {
        isa!({
            let bits = _mm256_castps_si256(v);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            // A NaN could carry over into infinity: keep its upper half and make it quiet.
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
            let upper = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan));
            _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256::<1>(upper))
        })
    }

    /// The lanes as 16-bit numbers of the format.
    #[inline(always)]
    fn narrow(self, dtype: DType, v: __m256) -> __m128i {
        match dtype {
            DType::F16 => isa!(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)),
            _ => self.round_to_bf16(v),
        }
    }
}

impl Simd for Avx2 {
    type Vector = __m256;
    const LANES: usize = 8;
    const WIDE_TILE: bool = false;
    const PANEL_ROWS: usize = 2;
    type Pairs = __m256i;

    #[inline(always)]
    fn prefetch<X>(self, at: *const X) {
        isa!(_mm_prefetch::<_MM_HINT_T0>(at.cast()));
    }

    #[inline(always)]
    fn prefetch_far<X>(self, at: *const X) {
        isa!(_mm_prefetch::<_MM_HINT_T1>(at.cast()));
    }

    #[inline(always)]
    unsafe fn load_pairs(self, from: *const bf16) -> __m256i {
        // SAFETY: the caller vouches for 16 numbers of 2 bytes; self proves the instructions.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }

    #[inline(always)]
    unsafe fn splat_pair(self, from: *const bf16) -> __m256i {
        // SAFETY: the caller vouches for two numbers of 2 bytes; self proves the instructions.
        unsafe { _mm256_set1_epi32(from.cast::<i32>().read_unaligned()) }
    }

    #[inline(always)]
    fn first_of(self, pairs: __m256i) -> __m256 {
        isa!(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs)))
    }

    #[inline(always)]
    fn second_of(self, pairs: __m256i) -> __m256 {
        isa!(_mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-0x1_0000))))
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        isa!(_mm256_set1_ps(x))
    }

    #[inline(always)]
    unsafe fn load_raw<X: Float>(self, from: *const X) -> __m256 {
        // SAFETY: the caller vouches for 8 elements, of the size that DTYPE says; self proves the instructions.
        unsafe {
            match X::DTYPE {
                DType::F16 => _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                DType::BF16 => {
                    let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
                }
                _ => _mm256_loadu_ps(from.cast()),
            }
        }
    }

    #[inline(always)]
    unsafe fn store_raw<Y: Float>(self, v: __m256, to: *mut Y) {
        // SAFETY: the caller vouches for 8 elements, of the size that DTYPE says; self proves the instructions.
        unsafe {
            match Y::DTYPE {
                DType::F16 | DType::BF16 => _mm_storeu_si128(to.cast(), self.narrow(Y::DTYPE, v)),
                _ => _mm256_storeu_ps(to.cast(), v),
            }
        }
    }

    #[inline(always)]
    unsafe fn store_shared<Y: Float, const STREAM: bool>(self, v: __m256, to: *mut Y) {
        // SAFETY: the caller vouches for the elements, of the size that DTYPE says, and their alignment; self proves the
        // instructions.
        unsafe {
            match (Y::DTYPE, STREAM) {
                (DType::F16 | DType::BF16, false) => store_half(self.narrow(Y::DTYPE, v), to.cast()),
                (DType::F16 | DType::BF16, true) => stream_half(self.narrow(Y::DTYPE, v), to.cast()),
                (_, false) => store_whole(v, to.cast()),
                (_, true) => stream_whole(v, to.cast()),
            }
        }
    }

    #[inline(always)]
    fn settle(self) {
        isa!(_mm_sfence());
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        isa!(_mm256_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        isa!(_mm256_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        isa!(_mm256_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        isa!(_mm256_div_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        isa!(_mm256_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        isa!(_mm256_min_ps(a, b))
    }

    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        isa!(_mm256_max_ps(a, b))
    }

    #[inline(always)]
    fn abs(self, a: __m256) -> __m256 {
        isa!(_mm256_andnot_ps(_mm256_set1_ps(-0.0), a))
    }

    #[inline(always)]
    fn if_negative(self, x: __m256, yes: __m256, no: __m256) -> __m256 {
        isa!(_mm256_blendv_ps(no, yes, _mm256_cmp_ps::<_CMP_LT_OQ>(x, _mm256_setzero_ps())))
    }

    #[inline(always)]
    fn scale_by_power(self, a: __m256, n: __m256) -> __m256 {
        // In two factors, the first of them exact: one alone would leave the exponent's range.
        isa!({
            let bias = _mm256_set1_epi32(127);
            let n = _mm256_cvtps_epi32(n);
            let half = _mm256_srai_epi32::<1>(n);
            let rest = _mm256_sub_epi32(n, half);
            let first = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias)));
            let second = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(rest, bias)));
            _mm256_mul_ps(_mm256_mul_ps(a, first), second)
        })
    }

    #[inline(always)]
    fn sum(self, a: __m256) -> f32 {
        isa!({
            let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        })
    }
}

// A vector store writes each of its elements, aligned to its size, whole, so to other threads it is a relaxed store of each;
// a compiler knows no such store, hence asm.

/// Stores a vector of f32.
///
/// # Safety
/// `to` is writable for a vector; others may reach the elements meanwhile, as atomics.
#[inline]
#[target_feature(enable = "avx")]
unsafe fn store_whole(v: __m256, to: *mut __m256) {
    // SAFETY: as the caller vouches.
    unsafe { asm!("vmovups [{to}], {v}", to = in(reg) to, v = in(ymm_reg) v, options(nostack, preserves_flags)) }
}

/// Stores a vector of 16-bit numbers.
///
/// # Safety
/// `to` is writable for a vector; others may reach the elements meanwhile, as atomics.
#[inline]
#[target_feature(enable = "avx")]
unsafe fn store_half(v: __m128i, to: *mut __m128i) {
    // SAFETY: as the caller vouches.
    unsafe { asm!("vmovdqu [{to}], {v}", to = in(reg) to, v = in(xmm_reg) v, options(nostack, preserves_flags)) }
}

/// Stores a vector of f32 past the caches.
///
/// # Safety
/// `to` is writable for a vector and aligned for it; others may reach the elements meanwhile, as atomics.
#[inline]
#[target_feature(enable = "avx")]
unsafe fn stream_whole(v: __m256, to: *mut __m256) {
    // SAFETY: as the caller vouches.
    unsafe { asm!("vmovntps [{to}], {v}", to = in(reg) to, v = in(ymm_reg) v, options(nostack, preserves_flags)) }
}

/// Stores a vector of 16-bit numbers past the caches.
///
/// # Safety
/// `to` is writable for a vector and aligned for it; others may reach the elements meanwhile, as atomics.
#[inline]
#[target_feature(enable = "avx")]
unsafe fn stream_half(v: __m128i, to: *mut __m128i) {
    // SAFETY: as the caller vouches.
    unsafe { asm!("vmovntdq [{to}], {v}", to = in(reg) to, v = in(xmm_reg) v, options(nostack, preserves_flags)) }
}
