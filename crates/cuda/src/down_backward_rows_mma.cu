// The gradient of the rows that down read, on tensor cores.

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) down_backward_rows_mma(const __grid_constant__ GroupedBackwardParams p) {
    extern __shared__ __align__(128) u8 memory[];
    grouped_backward_mma(p, memory);
}
