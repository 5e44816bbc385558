// Fragments of f32 numbers for tensor cores of 2-byte formats: each number as TERMS bf16 numbers whose sum it is to 24 bits.
// An infinite one stays in the first.
#define TERMS 3

// Two neighbours of a fragment.
__device__ __forceinline__ void split_pair(f32 low, f32 high, u32 (&to)[TERMS]) {
#pragma unroll
    for (int term = 0; term < TERMS; term++) {
        bf16 pair[2];
        put(&pair[0], low);
        put(&pair[1], high);
        to[term] = (u32)pair[0].bits | (u32)pair[1].bits << 16;
        low = is_finite(to_f32(pair[0])) ? low - to_f32(pair[0]) : 0.0f;
        high = is_finite(to_f32(pair[1])) ? high - to_f32(pair[1]) : 0.0f;
    }
}
