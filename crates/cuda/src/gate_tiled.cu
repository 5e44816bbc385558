// logits = softcap(scale * (n . router^T) + bias), 64 tokens by 64 experts a block.

extern "C" __global__ void __launch_bounds__(256 * SLICES) gate_tiled(const __grid_constant__ GateParams p) {
    take_turn();
    __shared__ Shared shared;
    __shared__ f32 factors[TILE];
    const u64 first_row = (u64)blockIdx.x * TILE, first_col = (u64)blockIdx.y * TILE;
    f32 sum[4][4], squares;
    multiply_tile<X_T, ROUTER_T, VEC>(p.x, first_row, p.tokens, p.router, first_col, p.experts, p.norm_weight,
                                            p.hidden, shared, sum, squares);
    if (threadIdx.x < 256 && threadIdx.x % 4 == 0) factors[threadIdx.x / 4] = norm_factor(p, squares);
    __syncthreads();
    for (int i = 0; i < 4 && threadIdx.x < 256; i++) {
        const u32 r = threadIdx.x / 16 * 4 + i;
        const u64 t = first_row + r;
        for (int j = 0; j < 4; j++) {
            const u64 e = first_col + threadIdx.x % 16 * 4 + j;
            if (t < p.tokens && e < p.experts)
                row_of<f32>(p.logits, t)[e] = finish_logit(p, sum[i][j], factors[r], e);
        }
    }
    if (p.normed.data && blockIdx.y == 0)
        for (u32 r = threadIdx.x / 32; r < TILE; r += 8 * SLICES)
            if (first_row + r < p.tokens) write_normed<X_T>(p, first_row + r, factors[r], threadIdx.x % 32, 32);
}
