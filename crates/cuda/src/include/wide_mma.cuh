// Fragments of f32 numbers for tensor cores of 2-byte formats: each number as TERMS bf16 numbers whose sum it is, 8 of its 24
// bits each. An infinite one stays in the first.
#define TERMS 3

// What is left of a number without its first 8 bits.
__device__ __forceinline__ f32 rest_of(f32 x) { return x - __uint_as_float(__float_as_uint(x) & 0xffff0000u); }

// Two neighbours of a fragment.
__device__ __forceinline__ void split_pair(f32 low, f32 high, u32 (&to)[TERMS]) {
#pragma unroll
    for (int term = 0; term < TERMS; term++) {
        to[term] = __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
        low = term == 0 && fabsf(low) == INFINITE ? 0.0f : rest_of(low);
        high = term == 0 && fabsf(high) == INFINITE ? 0.0f : rest_of(high);
    }
}
