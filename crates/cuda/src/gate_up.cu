// Gate and up rows of the experts, with the activation, for any formats and sizes.

extern "C" __global__ void __launch_bounds__(256) gate_up(const __grid_constant__ GroupedParams p) {
    take_turn();
    extern __shared__ u32 first_tile[];
    grouped_tiled(p, first_tile);
}
