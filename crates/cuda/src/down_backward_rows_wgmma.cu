// The gradient of the rows that down read, on warpgroup tensor cores.

extern "C" __global__ void IN_CLUSTERS __launch_bounds__(THREADS, 1) down_backward_rows_wgmma(const __grid_constant__ WgmmaParams q) {
    extern __shared__ __align__(1024) u8 memory[];
    grouped_wgmma<Consumer>(q, memory);
}
