// logits = softcap(scale * (n . router^T) + bias), TILE_M tokens by TILE_N experts a block, on tensor cores.

extern "C" __global__ void __launch_bounds__(32 * WARPS) gate_mma(const __grid_constant__ GateParams p) {
    take_turn();
    __shared__ Split split;
    __shared__ f32 factors[TILE_M];
    const u64 first_row = (u64)blockIdx.x * TILE_M, first_col = (u64)blockIdx.y * TILE_N;
    split_mma<X_T>(p.x, first_row, p.tokens, p.router, first_col, p.experts, p.norm_weight, p.hidden, p.norm, split);
    __syncthreads();
    if (threadIdx.x < TILE_M) factors[threadIdx.x] = norm_factor(p, squares_of(split, threadIdx.x));
    __syncthreads();
    for (u32 i = threadIdx.x; i < TILE_M * TILE_N; i += 32 * WARPS) {
        const u32 r = i / TILE_N, c = i % TILE_N;
        if (first_row + r < p.tokens && first_col + c < p.experts)
            row_of<f32>(p.logits, first_row + r)[first_col + c] = finish_logit(p, sum_of(split, r, c), factors[r], first_col + c);
    }
    if (p.normed.data && blockIdx.y == 0)
        for (u32 r = threadIdx.x / 32; r < TILE_M; r += WARPS)
            if (first_row + r < p.tokens) write_normed<X_T>(p, first_row + r, factors[r], threadIdx.x % 32, 32);
}
