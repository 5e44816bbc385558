// d_n = scale * d_logits . router, for any formats and sizes.

extern "C" __global__ void __launch_bounds__(256) gate_backward_rows(const __grid_constant__ GroupedBackwardParams p) {
    extern __shared__ u32 first_tile[];
    grouped_backward_rows(p, first_tile);
}
