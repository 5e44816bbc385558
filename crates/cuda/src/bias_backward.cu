// d_bias[e, n] = scale * sum_r weight[r] * d[r, n], r over the rows of e: a block has 32 columns, a warp every 32nd row.

extern "C" __global__ void __launch_bounds__(1024) bias_backward(const __grid_constant__ GroupedBackwardParams p) {
    __shared__ f32 parts[32][33];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u64 n = (u64)blockIdx.x * 32 + lane;
    for (u32 e = blockIdx.y; e < p.grouped.experts; e += gridDim.y) {
        const RowRange range = rows_of(p.grouped, e);
        if (range.begin == range.end && p.accumulate) continue;
        f32 sum = 0.0f;
#pragma unroll 4
        for (u64 at = range.begin + warp; at < range.end; at += 32) {
            const u32 slot = slot_of(p.grouped, (u32)at);
            if (slot == NO_ROW || n >= p.outputs) continue;
            const u64 source = source_of(p, p.d_gathered, (u32)at, slot);
            f32 weight = input_weight(p.grouped, slot);
            if (p.capped.data) weight *= slope_of_cap(p, source, n);
            sum = fmaf(weight, element(p.d, source, n), sum);
        }
        parts[warp][lane] = sum;
        __syncthreads();
        if (warp == 0 && n < p.outputs) {
            f32 all = 0.0f;
#pragma unroll
            for (u32 i = 0; i < 32; i++) all += parts[i][lane];
            f32 d[1] = {p.scale * all};
            store_gradient<1>(p.grouped.out, p.accumulate, e, n, d);
        }
        __syncthreads();
    }
}
