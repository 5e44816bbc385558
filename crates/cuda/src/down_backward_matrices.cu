// The gradient of the experts' down matrices, for any formats and sizes.

extern "C" __global__ void __launch_bounds__(256) down_backward_matrices(const __grid_constant__ GroupedBackwardParams p) {
    grouped_backward_matrices(p);
}
