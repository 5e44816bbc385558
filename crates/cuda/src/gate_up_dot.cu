// Gate and up rows of the experts, with the activation, for few rows.

extern "C" __global__ void __launch_bounds__(32 * WARPS, 4) gate_up_dot(const __grid_constant__ GroupedParams p) {
    take_turn();
    grouped_dot(p);
}
