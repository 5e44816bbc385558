// The gradient of the rows that down read, for any formats and sizes.

extern "C" __global__ void __launch_bounds__(256) down_backward_rows(const __grid_constant__ GroupedBackwardParams p) {
    extern __shared__ u32 first_tile[];
    grouped_backward_rows(p, first_tile);
}
