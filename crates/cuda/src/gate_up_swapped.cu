// Gate and up rows of the experts, with the activation, on warpgroup tensor cores, weights as the left side.

extern "C" __global__ void __launch_bounds__(THREADS, 1) gate_up_swapped(const __grid_constant__ WgmmaParams q) {
    extern __shared__ __align__(1024) u8 memory[];
    grouped_swapped(q, memory);
}
