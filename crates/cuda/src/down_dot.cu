// The experts' down matrices, for few rows.

extern "C" __global__ void __launch_bounds__(32 * WARPS, 4) down_dot(const __grid_constant__ GroupedParams p) {
    take_turn();
    grouped_dot(p);
}
