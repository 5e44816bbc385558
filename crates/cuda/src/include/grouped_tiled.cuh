// The grouped product of any formats and sizes: tiles of 64 rows and 64 weight rows by 256 threads, 4 x 4 sums each, in
// f32 multiply-adds.
//
//   for each 16 columns: x tile (gathered) and weight tile to shared memory, widened; the next ones are on their way
//                        sums += outer products
//
// Gate and up rows of an output are neighbours in a tile.
#define TILE_OUTPUTS (GATED ? TILE / 2 : TILE)

__device__ __forceinline__ void multiply_tile(const GroupedParams& p, const Tile& tile, Tiles& tiles, f32 (&sum)[4][4]) {
    const Expert expert = expert_at<W_T>(p, tile.expert);
    if (!expert.matrix) return;
    const u32 thread = threadIdx.x, r = thread / 4, c = thread % 4 * 4;
    const u32 slot = r < tile.rows ? slot_of(p, tile.first_row + r) : NO_ROW;
    const X_T* x = x_row<X_T>(p, slot == NO_ROW ? 0 : slot);
    const u64 output = (u64)tile.column * TILE_OUTPUTS + (GATED ? r / 2 : r);
    const bool w_inside = output < p.outputs;
    const u64 matrix_row = w_inside ? (GATED && r % 2 ? p.outputs : 0) + output : 0;
    const W_T* w = reinterpret_cast<const W_T*>(expert.matrix) + matrix_row * p.row_stride;
    f32 a[4], b[4];
    load_four(x, slot != NO_ROW, c, p.inner, a);
    load_four(w, w_inside, c, p.inner, b);
    for (u64 k = 0; k < p.inner; k += STEP) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            tiles.a[c + i][r] = a[i];
            tiles.b[c + i][r] = b[i];
        }
        __syncthreads();
        if (k + STEP < p.inner) {
            load_four(x, slot != NO_ROW, k + STEP + c, p.inner, a);
            load_four(w, w_inside, k + STEP + c, p.inner, b);
        }
        add_products(tiles, sum);
    }
    const u64 first = (u64)tile.column * TILE_OUTPUTS + thread % 16 * (GATED ? 2 : 4);
#pragma unroll
    for (u32 m = 0; m < 4; m++) {
        const u32 row = thread / 16 * 4 + m;
        const u32 own = row < tile.rows ? slot_of(p, tile.first_row + row) : NO_ROW;
        if (own == NO_ROW) continue;
        const f32 weight = input_weight(p, own);
#pragma unroll
        for (u32 n = 0; n < 4; n += 2) {
            const f32(&s)[4] = sum[m];
            if (GATED) {
                const f32 gate[1] = {s[n]}, up[1] = {s[n + 1]};
                store_outputs<1>(p, expert.bias, weight, tile.first_row + row, first + n / 2, gate, up);
            } else {
                const f32 up[2] = {s[n], s[n + 1]};
                store_outputs<2>(p, expert.bias, weight, tile.first_row + row, first + n, up, up);
            }
        }
    }
}

__device__ __forceinline__ void grouped_tiled(const GroupedParams& p, u32* memory) {
    __shared__ Tiles tiles;
    Schedule schedule;
    schedule.make<256, TILE>(p, memory, (p.outputs + TILE_OUTPUTS - 1) / TILE_OUTPUTS);
    Tile tile;
    tile.expert = 0;
    for (bool any = schedule.find<TILE>(p, blockIdx.x, tile); any; any = schedule.find<TILE>(p, tile.item + gridDim.x, tile)) {
        f32 sum[4][4] = {};
        multiply_tile(p, tile, tiles, sum);
    }
}
