// Gate and up rows of the experts, with the activation, on tensor cores.

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) gate_up_mma(const __grid_constant__ GroupedParams p) {
    extern __shared__ __align__(128) u8 memory[];
    grouped_mma(p, memory);
}
