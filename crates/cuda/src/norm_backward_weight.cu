// d_weight[h] = sum_t d_n[t,h] * x[t,h] * rsqrt(mean(x[t]^2) + eps): a block has 32 columns, its warps every 32nd token;
// each warp finds the lengths of its tokens for itself.

extern "C" __global__ void __launch_bounds__(1024) norm_backward_weight(const __grid_constant__ NormBackwardParams p) {
    __shared__ f32 sums[32][33];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (u64 first = (u64)blockIdx.x * 32; first < p.hidden; first += (u64)gridDim.x * 32) {
        f32 sum = 0.0f;
        for (u64 t = warp; t < p.tokens; t += 32) {
            f32 squares = 0.0f;
            for (u64 h = lane * VEC; h < p.hidden; h += 32 * VEC) {
                f32 x[VEC];
                load<VEC>(p.x, t, h, x);
#pragma unroll
                for (int j = 0; j < VEC; j++) squares = fmaf(x[j], x[j], squares);
            }
            const f32 factor = 1.0f / sqrtf(reduce_warp<Sum>(squares) / (f32)p.hidden + p.eps);
            if (first + lane < p.hidden) sum = fmaf(element(p.d_n, t, first + lane) * element(p.x, t, first + lane), factor, sum);
        }
        sums[warp][lane] = sum;
        __syncthreads();
        if (warp == 0 && first + lane < p.hidden) {
            f32 d[1] = {0.0f};
#pragma unroll
            for (u32 i = 0; i < 32; i++) d[0] += sums[i][lane];
            store_gradient<1>(p.d, p.accumulate, 0, first + lane, d);
        }
        __syncthreads();
    }
}
