//! AVX-512 F, BW, VL and DQ, with or without BF16.

use super::simd::{Simd, Task};
use fused_moe_core::dtype::{DType, Float};
use half::bf16;
use std::arch::asm;
use std::arch::x86_64::*;

/// Proof that the CPU has AVX-512 F, BW, VL and DQ, with AVX2, FMA and F16C; and AVX-512 BF16 where `BF16` says so.
#[derive(Clone, Copy)]
pub(super) struct Avx512<const BF16: bool>(());

/// Runs a task.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
pub(super) fn run<T: Task>(task: T) -> T::Output {
    task.run(Avx512::<false>(()))
}

/// Runs a task, dot products of bf16 numbers by their own instruction.
#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
pub(super) fn run_bf16<T: Task>(task: T) -> T::Output {
    task.run(Avx512::<true>(()))
}

/// Intrinsics that read and write no memory: all that they ask for is the instruction set.
macro_rules! isa {
    ($e:expr) => {
        // SAFETY: a value of Avx512 exists, so the CPU has the instructions; no memory is read or written.
        unsafe { $e }
    };
}

/// The lowest `count` lanes, `count` < 16.
#[inline(always)]
fn first(count: usize) -> __mmask16 {
    ((1u32 << (count & 15)) - 1) as __mmask16
}

impl<const BF16: bool> Avx512<BF16> {
    /// bf16 bits to f32.
    #[inline(always)]
    fn widen_bf16(self, bits: __m256i) -> __m512 {
        isa!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits))))
    }

    /// The lanes as 16-bit numbers of the format.
    #[inline(always)]
    fn narrow(self, dtype: DType, v: __m512) -> __m256i {
        match dtype {
            DType::F16 => isa!(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)),
            _ => isa!({
                let bits = _mm512_castps_si512(v);
                let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
                // A NaN could carry over into infinity: keep its upper half and make it quiet.
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
                let bits = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x0040_0000));
                _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(bits))
            }),
        }
    }
}

impl<const BF16: bool> Simd for Avx512<BF16> {
    type Vector = __m512;
    const LANES: usize = 16;
    const WIDE_TILE: bool = true;
    const PANEL_ROWS: usize = 12;
    type Pairs = __m512i;

    #[inline(always)]
    fn prefetch<X>(self, at: *const X) {
        isa!(_mm_prefetch::<_MM_HINT_T0>(at.cast()));
    }

    #[inline(always)]
    fn prefetch_far<X>(self, at: *const X) {
        isa!(_mm_prefetch::<_MM_HINT_T1>(at.cast()));
    }

    #[inline(always)]
    unsafe fn load_pairs(self, from: *const bf16) -> __m512i {
        // SAFETY: the caller vouches for 32 numbers of 2 bytes; self proves the instructions.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn splat_pair(self, from: *const bf16) -> __m512i {
        // SAFETY: the caller vouches for two numbers of 2 bytes; self proves the instructions.
        unsafe { _mm512_set1_epi32(from.cast::<i32>().read_unaligned()) }
    }

    #[inline(always)]
    fn first_of(self, pairs: __m512i) -> __m512 {
        isa!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)))
    }

    #[inline(always)]
    fn second_of(self, pairs: __m512i) -> __m512 {
        isa!(_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-0x1_0000))))
    }

    #[inline(always)]
    fn dot_pairs(self, acc: __m512, a: __m512i, b: __m512i) -> __m512 {
        if BF16 {
            // SAFETY: a value of Avx512<true> exists, so the CPU has the instruction; the casts keep the bits.
            return unsafe {
                let a = std::mem::transmute::<__m512i, __m512bh>(a);
                _mm512_dpbf16_ps(acc, a, std::mem::transmute::<__m512i, __m512bh>(b))
            };
        }
        let acc = self.fma(self.first_of(a), self.first_of(b), acc);
        self.fma(self.second_of(a), self.second_of(b), acc)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        isa!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    unsafe fn load_raw<X: Float>(self, from: *const X) -> __m512 {
        // SAFETY: the caller vouches for 16 elements, of the size that DTYPE says; self proves the instructions.
        unsafe {
            match X::DTYPE {
                DType::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())),
                DType::BF16 => self.widen_bf16(_mm256_loadu_si256(from.cast())),
                _ => _mm512_loadu_ps(from.cast()),
            }
        }
    }

    #[inline(always)]
    fn load_part<X: Float>(self, from: &[X]) -> __m512 {
        let (mask, from) = (first(from.len()), from.as_ptr());
        // SAFETY: the mask keeps to the slice's elements, of the size that DTYPE says; self proves the instructions.
        unsafe {
            match X::DTYPE {
                DType::F16 => _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from.cast())),
                DType::BF16 => self.widen_bf16(_mm256_maskz_loadu_epi16(mask, from.cast())),
                _ => _mm512_maskz_loadu_ps(mask, from.cast()),
            }
        }
    }

    #[inline(always)]
    unsafe fn store_raw<Y: Float>(self, v: __m512, to: *mut Y) {
        // SAFETY: the caller vouches for 16 elements, of the size that DTYPE says; self proves the instructions.
        unsafe {
            match Y::DTYPE {
                DType::F16 | DType::BF16 => _mm256_storeu_si256(to.cast(), self.narrow(Y::DTYPE, v)),
                _ => _mm512_storeu_ps(to.cast(), v),
            }
        }
    }

    #[inline(always)]
    fn store_part<Y: Float>(self, v: __m512, to: &mut [Y]) {
        let (mask, to) = (first(to.len()), to.as_mut_ptr());
        // SAFETY: the mask keeps to the slice's elements, of the size that DTYPE says; self proves the instructions.
        unsafe {
            match Y::DTYPE {
                DType::F16 | DType::BF16 => _mm256_mask_storeu_epi16(to.cast(), mask, self.narrow(Y::DTYPE, v)),
                _ => _mm512_mask_storeu_ps(to.cast(), mask, v),
            }
        }
    }

    #[inline(always)]
    unsafe fn store_shared<Y: Float, const STREAM: bool>(self, v: __m512, to: *mut Y) {
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
    fn add(self, a: __m512, b: __m512) -> __m512 {
        isa!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        isa!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        isa!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        isa!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        isa!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        isa!(_mm512_min_ps(a, b))
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        isa!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn abs(self, a: __m512) -> __m512 {
        isa!(_mm512_abs_ps(a))
    }

    #[inline(always)]
    fn if_negative(self, x: __m512, yes: __m512, no: __m512) -> __m512 {
        isa!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, _mm512_setzero_ps()), no, yes))
    }

    #[inline(always)]
    fn scale_by_power(self, a: __m512, n: __m512) -> __m512 {
        isa!(_mm512_scalef_ps(a, n))
    }

    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        // Not _mm512_reduce_add_ps: its order is the compiler's choice.
        isa!({
            let eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        })
    }

    #[inline(always)]
    fn sum_four(self, [a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        isa!({
            let lower = _mm512_shuffle_f32x4::<0b01_00_01_00>(a, b);
            let ab = _mm512_add_ps(lower, _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b));
            let lower = _mm512_shuffle_f32x4::<0b01_00_01_00>(c, d);
            let cd = _mm512_add_ps(lower, _mm512_shuffle_f32x4::<0b11_10_11_10>(c, d));
            let lower = _mm512_shuffle_f32x4::<0b10_00_10_00>(ab, cd);
            let four = _mm512_add_ps(lower, _mm512_shuffle_f32x4::<0b11_01_11_01>(ab, cd));
            let two = _mm512_add_ps(four, _mm512_shuffle_ps::<0b11_10_11_10>(four, four));
            let one = _mm512_add_ps(two, _mm512_movehdup_ps(two));
            let first = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0);
            let sums = _mm512_castps512_ps128(_mm512_permutexvar_ps(first, one));
            std::mem::transmute::<__m128, [f32; 4]>(sums)
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
#[target_feature(enable = "avx512f")]
unsafe fn store_whole(v: __m512, to: *mut __m512) {
    // SAFETY: as the caller vouches.
    unsafe { asm!("vmovups [{to}], {v}", to = in(reg) to, v = in(zmm_reg) v, options(nostack, preserves_flags)) }
}

/// Stores a vector of 16-bit numbers.
///
/// # Safety
/// `to` is writable for a vector; others may reach the elements meanwhile, as atomics.
#[inline]
#[target_feature(enable = "avx")]
unsafe fn store_half(v: __m256i, to: *mut __m256i) {
    // SAFETY: as the caller vouches.
    unsafe { asm!("vmovdqu [{to}], {v}", to = in(reg) to, v = in(ymm_reg) v, options(nostack, preserves_flags)) }
}

/// Stores a vector of f32 past the caches.
///
/// # Safety
/// `to` is writable for a vector and aligned for it; others may reach the elements meanwhile, as atomics.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn stream_whole(v: __m512, to: *mut __m512) {
    // SAFETY: as the caller vouches.
    unsafe { asm!("vmovntps [{to}], {v}", to = in(reg) to, v = in(zmm_reg) v, options(nostack, preserves_flags)) }
}

/// Stores a vector of 16-bit numbers past the caches.
///
/// # Safety
/// `to` is writable for a vector and aligned for it; others may reach the elements meanwhile, as atomics.
#[inline]
#[target_feature(enable = "avx")]
unsafe fn stream_half(v: __m256i, to: *mut __m256i) {
    // SAFETY: as the caller vouches.
    unsafe { asm!("vmovntdq [{to}], {v}", to = in(reg) to, v = in(ymm_reg) v, options(nostack, preserves_flags)) }
}
