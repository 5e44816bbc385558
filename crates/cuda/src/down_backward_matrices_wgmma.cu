// The gradient of the experts' down matrices, on warpgroup tensor cores.

extern "C" __global__ void IN_CLUSTERS __launch_bounds__(THREADS, 1) down_backward_matrices_wgmma(const __grid_constant__ MatricesWgmmaParams q) {
    extern __shared__ __align__(1024) u8 memory[];
    grouped_backward_wgmma(q, memory);
}
