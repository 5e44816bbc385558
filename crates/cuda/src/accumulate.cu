// acc += w * y, w one number, one a row or one a column

extern "C" __global__ void __launch_bounds__(256) accumulate(const __grid_constant__ AccumulateParams p) {
    for (u64 r = blockIdx.y; r < p.rows; r += gridDim.y) {
        const f32 of_row = p.weights.data && !p.per_column ? element(p.weights, r, 0) : p.weight;
        for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < p.width; i += (u64)gridDim.x * 256) {
            const f32 w = p.per_column ? element(p.weights, 0, i) : of_row;
            f32 sum[1] = {fmaf(w, element(p.y, r, i), element(p.acc, r, i))};
            store<1>(p.acc, r, i, sum);
        }
    }
}
