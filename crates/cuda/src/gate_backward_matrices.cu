// d_router = scale * d_logits^T . n, for any formats and sizes.

extern "C" __global__ void __launch_bounds__(256) gate_backward_matrices(const __grid_constant__ GroupedBackwardParams p) {
    grouped_backward_matrices(p);
}
