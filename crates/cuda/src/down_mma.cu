// The experts' down matrices, on tensor cores.

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) down_mma(const __grid_constant__ GroupedParams p) {
    extern __shared__ __align__(128) u8 memory[];
    grouped_mma(p, memory);
}
