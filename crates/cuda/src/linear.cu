// out = x . weight^T + bias: a warp an output column, TOKENS rows at once.

extern "C" __global__ void __launch_bounds__(256) linear(const __grid_constant__ LinearParams p) {
    take_turn();
    const u64 n = ((u64)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (n >= p.outer) return;
    const u64 groups = (p.rows + TOKENS - 1) / TOKENS;
    const Tensor none = {};
    for (u64 group = blockIdx.y; group < groups; group += gridDim.y) {
        f32 sum[TOKENS], squares[TOKENS];
        dot_rows<X_T, WEIGHT_T, TOKENS, VEC, false>(p.x, group * TOKENS, p.rows, row_of<const WEIGHT_T>(p.weight, n), none,
                                                    p.inner, sum, squares);
        const f32 bias = p.bias.data ? element(p.bias, 0, n) : 0.0f;
#pragma unroll
        for (int i = 0; i < TOKENS; i++) {
            const u64 r = group * TOKENS + i;
            f32 y[1] = {sum[i] + bias};
            if (r < p.rows && threadIdx.x % 32 == 0) store<1>(p.out, r, n, y);
        }
    }
}
