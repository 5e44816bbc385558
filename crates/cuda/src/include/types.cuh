// Number formats, operands and the status word. Legend: T tokens, H hidden, I intermediate, E experts, K top_k, R = T*K.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef float f32;
typedef double f64;

struct f16 { u16 bits; };
struct bf16 { u16 bits; };

#define DTYPE_F32 0
#define DTYPE_F16 1
#define DTYPE_BF16 2

#define INFINITE __int_as_float(0x7f800000)
#define NOT_A_NUMBER __int_as_float(0x7fc00000)
#define NO_EXPERT 0xffffffffu
#define NO_ROW 0xffffffffu
#define STATUS_NO_FINITE_SCORE 1u
#define STATUS_EXPERT_OUT_OF_RANGE 2u
#define STATUS_TOKEN_OUT_OF_RANGE 4u

__device__ __forceinline__ f32 to_f32(f32 x) { return x; }
__device__ __forceinline__ f32 to_f32(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
__device__ __forceinline__ f32 to_f32(f16 x) {
    f32 y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

// One rounding, to nearest even.
__device__ __forceinline__ void put(f32* to, f32 x) { *to = x; }
__device__ __forceinline__ void put(bf16* to, f32 x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(x)); }
__device__ __forceinline__ void put(f16* to, f32 x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x)); }

__device__ __forceinline__ bool is_finite(f32 x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }
__device__ __forceinline__ bool is_nan(f32 x) { return x != x; }

__device__ __forceinline__ f32 sigmoid(f32 x) {
    if (x < 0.0f) {
        f32 e = expf(x);
        return e / (1.0f + e);
    }
    return 1.0f / (1.0f + expf(-x));
}

// In one instruction of the special-function unit each: off by 2e-7 of the result times what e is raised to, or by 1e-38.
__device__ __forceinline__ f32 brief_exp(f32 x) {
    f32 y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.4426950408889634f * x));
    return y;
}
__device__ __forceinline__ f32 brief_reciprocal(f32 x) {
    f32 y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Of the two, without a branch: off by 2e-6 of the result or 1e-38.
__device__ __forceinline__ f32 brief_sigmoid(f32 x) { return brief_reciprocal(1.0f + brief_exp(-x)); }

// N neighbours that are read or written at once.
template <class T, int N> struct alignas(sizeof(T) * N) Pack { T v[N]; };

template <int N, class T> __device__ __forceinline__ void load(const T* from, f32 (&to)[N]) {
    Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
    for (int i = 0; i < N; i++) to[i] = to_f32(pack.v[i]);
}

template <int N, class T> __device__ __forceinline__ void store(T* to, const f32 (&from)[N]) {
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; i++) put(&pack.v[i], from[i]);
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// Past this multiprocessor's own cache.
__device__ __forceinline__ f32 load_through(const f32* from) { return __ldcg(from); }
__device__ __forceinline__ f32 load_through(const bf16* from) { return to_f32(bf16{__ldcg(&from->bits)}); }
__device__ __forceinline__ f32 load_through(const f16* from) { return to_f32(f16{__ldcg(&from->bits)}); }

// An operand: rows `stride` elements apart; no address means that it is absent.
struct Tensor {
    u64 data;
    u64 stride;
    u32 dtype;
    u32 zero;
};

template <class T> __device__ __forceinline__ T* row_of(const Tensor& t, u64 row) {
    return reinterpret_cast<T*>(t.data) + row * t.stride;
}

// For operands whose format is known at run time only.
template <int N> __device__ __forceinline__ void load(const Tensor& t, u64 row, u64 col, f32 (&to)[N]) {
    if (t.dtype == DTYPE_F32) load<N>(row_of<const f32>(t, row) + col, to);
    else if (t.dtype == DTYPE_F16) load<N>(row_of<const f16>(t, row) + col, to);
    else load<N>(row_of<const bf16>(t, row) + col, to);
}

template <int N> __device__ __forceinline__ void store(const Tensor& t, u64 row, u64 col, const f32 (&from)[N]) {
    if (t.dtype == DTYPE_F32) store<N>(row_of<f32>(t, row) + col, from);
    else if (t.dtype == DTYPE_F16) store<N>(row_of<f16>(t, row) + col, from);
    else store<N>(row_of<bf16>(t, row) + col, from);
}

__device__ __forceinline__ f32 element(const Tensor& t, u64 row, u64 col) {
    f32 x[1];
    load<1>(t, row, col, x);
    return x[0];
}

// A launch may begin while the one before it still runs. Until it has waited, it writes nothing but what has been its own
// since before the one before began, and what it reads that was not there then it throws away; it lets the next one begin after
// that, so that all but the last launch before are over then. One that a call ends with, or that is followed by one that
// throws away all it reads before its turn, may let it begin earlier.
__device__ __forceinline__ void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void take_turn() {
    wait_for_launch_before();
    let_next_launch_begin();
}

// Has a warp bring a row to the second-level cache, which what is still being written may be before this launch's turn.
template <class T> __device__ __forceinline__ void fetch(const T* row, u64 count) {
    const u32 line = 128 / sizeof(T);
    for (u64 i = threadIdx.x % 32 * line; i < count; i += 32 * line) asm volatile("prefetch.global.L2 [%0];" ::"l"(row + i));
}

__device__ __forceinline__ void raise(u64 status, u32 bits) {
    if (bits != 0) atomicOr(reinterpret_cast<u32*>(status), bits);
}
