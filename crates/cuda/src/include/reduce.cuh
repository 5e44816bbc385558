// Reductions over N threads, a warp (N = 32) or a block; every thread gets the same bits, in a fixed order.

template <int N> __device__ __forceinline__ void sync() {
    if (N == 32) __syncwarp();
    else __syncthreads();
}

struct Sum {
    template <class T> static __device__ __forceinline__ T of(T a, T b) { return a + b; }
};
struct Max {
    template <class T> static __device__ __forceinline__ T of(T a, T b) { return a > b ? a : b; }
};
struct Or {
    static __device__ __forceinline__ u32 of(u32 a, u32 b) { return a | b; }
};

template <class Op, class T> __device__ __forceinline__ T reduce_warp(T x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) x = Op::of(x, __shfl_xor_sync(0xffffffffu, x, mask));
    return x;
}

// scratch: N / 32 words of shared memory, not read where N = 32.
template <class Op, int N, class T> __device__ __forceinline__ T reduce(T x, u64* scratch) {
    x = reduce_warp<Op>(x);
    if (N == 32) return x;
    T* parts = reinterpret_cast<T*>(scratch);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = parts[0];
#pragma unroll
    for (int i = 1; i < N / 32; i++) x = Op::of(x, parts[i]);
    return x;
}
