// acc += w * y

extern "C" __global__ void __launch_bounds__(256) accumulate(const __grid_constant__ AccumulateParams p) {
    for (u64 r = blockIdx.y; r < p.rows; r += gridDim.y) {
        const f32 w = p.weights.data ? element(p.weights, r, 0) : p.weight;
        for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < p.width; i += (u64)gridDim.x * 256) {
            f32 sum[1] = {fmaf(w, element(p.y, r, i), element(p.acc, r, i))};
            store<1>(p.acc, r, i, sum);
        }
    }
}
