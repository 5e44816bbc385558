// The gradient of the experts' gate_up matrices, for any formats and sizes.

extern "C" __global__ void __launch_bounds__(256) gate_up_backward_matrices(const __grid_constant__ GroupedBackwardParams p) {
    grouped_backward_matrices(p);
}
