// The gradient of the experts' gate_up matrices, on tensor cores.

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) gate_up_backward_matrices_mma(const __grid_constant__ GroupedBackwardParams p) {
    extern __shared__ __align__(128) u8 memory[];
    grouped_backward_mma(p, memory);
}
