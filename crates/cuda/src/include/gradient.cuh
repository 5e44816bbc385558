// Where a gradient goes: formed in f32, added to what is there or in its place, and rounded once.

template <int N> __device__ __forceinline__ void store_gradient(const Tensor& to, bool accumulate, u64 row, u64 col, f32 (&d)[N]) {
    if (accumulate) {
        f32 before[N];
        load<N>(to, row, col, before);
#pragma unroll
        for (int i = 0; i < N; i++) d[i] += before[i];
    }
    store<N>(to, row, col, d);
}

// As many of N neighbours as there are up to `width`, at once if they may be.
template <int N>
__device__ __forceinline__ void store_gradients(const Tensor& to, bool accumulate, bool at_once, u64 row, u64 col, u64 width,
                                                f32 (&d)[N]) {
    if (at_once && col + N <= width) {
        store_gradient<N>(to, accumulate, row, col, d);
        return;
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (col + i >= width) continue;
        f32 one[1] = {d[i]};
        store_gradient<1>(to, accumulate, row, col + i, one);
    }
}

// Two neighbours of a row that is known to have them.
template <class T> __device__ __forceinline__ void store_pair(T* to, bool accumulate, f32 (&d)[2]) {
    if (accumulate) {
        f32 before[2];
        load<2>(to, before);
        d[0] += before[0];
        d[1] += before[1];
    }
    store<2>(to, d);
}
