// The experts' down matrices, on warpgroup tensor cores, weights as the left side.

extern "C" __global__ void __launch_bounds__(THREADS, 1) down_swapped(const __grid_constant__ WgmmaParams q) {
    extern __shared__ __align__(1024) u8 memory[];
    grouped_swapped(q, memory);
}
