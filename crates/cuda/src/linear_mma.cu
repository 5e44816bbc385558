// out = x . weight^T + bias, TILE_M rows by TILE_N columns a block, on tensor cores.

extern "C" __global__ void __launch_bounds__(32 * WARPS) linear_mma(const __grid_constant__ LinearParams p) {
    __shared__ Split split;
    const u64 tile_cols = (p.outer + TILE_N - 1) / TILE_N;
    const u64 first_row = (u64)blockIdx.x / tile_cols * TILE_M, first_col = (u64)blockIdx.x % tile_cols * TILE_N;
    const Tensor none = {};
    split_mma<X_T>(p.x, first_row, p.rows, p.weight, first_col, p.outer, none, p.inner, false, split);
    for (u32 i = threadIdx.x; i < TILE_M * TILE_N; i += 32 * WARPS) {
        const u64 r = first_row + i / TILE_N, n = first_col + i % TILE_N;
        if (r >= p.rows || n >= p.outer) continue;
        f32 y[1] = {sum_of(split, i / TILE_N, i % TILE_N) + (p.bias.data ? element(p.bias, 0, n) : 0.0f)};
        store<1>(p.out, r, n, y);
    }
}
