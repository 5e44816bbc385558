// out = x . weight^T + bias, 64 rows by 64 columns a block.

extern "C" __global__ void __launch_bounds__(256 * SLICES) linear_tiled(const __grid_constant__ LinearParams p) {
    __shared__ Shared shared;
    const u64 tile_cols = (p.outer + TILE - 1) / TILE;
    const u64 first_row = (u64)blockIdx.x / tile_cols * TILE, first_col = (u64)blockIdx.x % tile_cols * TILE;
    f32 sum[4][4], squares;
    const Tensor none = {};
    multiply_tile<X_T, WEIGHT_T, VEC>(p.x, first_row, p.rows, p.weight, first_col, p.outer, none, p.inner, shared,
                                             sum, squares);
    for (int i = 0; i < 4 && threadIdx.x < 256; i++) {
        const u64 r = first_row + threadIdx.x / 16 * 4 + i;
        for (int j = 0; j < 4; j++) {
            const u64 n = first_col + threadIdx.x % 16 * 4 + j;
            if (r >= p.rows || n >= p.outer) continue;
            f32 y[1] = {sum[i][j] + (p.bias.data ? element(p.bias, 0, n) : 0.0f)};
            store<1>(p.out, r, n, y);
        }
    }
}
