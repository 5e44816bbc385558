// The gradients of a grouped product in tiles of multiply-adds: any formats and sizes.

__device__ __forceinline__ void store_sums(const GroupedBackwardParams& p, u64 row, u64 first, f32 factor, const f32 (&sum)[4]) {
    f32 d[4];
#pragma unroll
    for (int n = 0; n < 4; n++) d[n] = factor * sum[n];
    store_gradients<4>(p.grouped.out, p.accumulate, p.grouped.neighbours, row, first + threadIdx.x % 16 * 4, p.inputs, d);
}

// Four neighbours of d.
__device__ __forceinline__ void load_d(const GroupedBackwardParams& p, u64 row, bool inside, u64 col, f32 (&to)[4]) {
    load_four(row_of<const D_T>(p.d, row), inside, col, p.outputs, to);
    if (!p.capped.data || !inside) return;
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (col + i < p.outputs) to[i] *= slope_of_cap(p, row, col + i);
}

__device__ __forceinline__ void rows_tile(const GroupedBackwardParams& p, const Tile& tile, Tiles& tiles) {
    const u32 thread = threadIdx.x, r = thread / 4, c = thread % 4 * 4, k = thread / 16;
    const u32 slot = r < tile.rows ? slot_of(p.grouped, tile.first_row + r) : NO_ROW;
    const bool inside = slot != NO_ROW;
    const u64 source = inside ? source_of(p, p.d_gathered, tile.first_row + r, slot) : 0;
    const u64 first = (u64)tile.column * TILE, column = first + thread % 16 * 4;
    const OTHER_T* matrix = reinterpret_cast<const OTHER_T*>(expert_at<OTHER_T>(p.grouped, tile.expert).matrix) + k * p.grouped.row_stride;
    f32 sum[4][4] = {}, a[4], b[4];
    load_d(p, source, inside, c, a);
    load_four(matrix, k < p.outputs, column, p.inputs, b);
    for (u64 n = 0; n < p.outputs; n += STEP) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 4; i++) tiles.a[c + i][r] = a[i];
        store<4>(&tiles.b[k][thread % 16 * 4], b);
        __syncthreads();
        if (n + STEP < p.outputs) {
            load_d(p, source, inside, n + STEP + c, a);
            load_four(matrix + (n + STEP) * p.grouped.row_stride, n + STEP + k < p.outputs, column, p.inputs, b);
        }
        add_products(tiles, sum);
    }
#pragma unroll
    for (u32 m = 0; m < 4; m++) {
        const u32 row = thread / 16 * 4 + m;
        const u32 own = row < tile.rows ? slot_of(p.grouped, tile.first_row + row) : NO_ROW;
        if (own == NO_ROW) continue;
        store_sums(p, tile.first_row + row, first, p.scale * input_weight(p.grouped, own), sum[m]);
    }
}

__device__ __forceinline__ void grouped_backward_rows(const GroupedBackwardParams& p, u32* memory) {
    __shared__ Tiles tiles;
    Schedule schedule;
    schedule.make<256, TILE>(p.grouped, memory, (p.inputs + TILE - 1) / TILE);
    Tile tile;
    tile.expert = 0;
    for (bool any = schedule.find<TILE>(p.grouped, blockIdx.x, tile); any;
         any = schedule.find<TILE>(p.grouped, tile.item + gridDim.x, tile))
        rows_tile(p, tile, tiles);
}

// What d and x have in `at`-th row of a range.
__device__ __forceinline__ void load_pair(const GroupedBackwardParams& p, RowRange range, u64 at, u64 n, u64 k, f32 (&a)[4], f32 (&b)[4]) {
    const u32 row = range.begin + (u32)at;
    const u32 slot = at < range.end - range.begin ? slot_of(p.grouped, row) : NO_ROW;
    const bool inside = slot != NO_ROW;
    load_d(p, inside ? source_of(p, p.d_gathered, row, slot) : 0, inside, n, a);
    load_four(row_of<const OTHER_T>(p.x, inside ? source_of(p, p.x_gathered, row, slot) : 0), inside, k, p.inputs, b);
    if (!inside || !p.grouped.input_weights.data) return;
    const f32 weight = input_weight(p.grouped, slot);
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] *= weight;
}

__device__ __forceinline__ void grouped_backward_matrices(const GroupedBackwardParams& p) {
    __shared__ Tiles tiles;
    const u32 thread = threadIdx.x, k = thread / 16, c = thread % 16 * 4;
    const u64 across = (p.inputs + TILE - 1) / TILE, each = (p.outputs + TILE - 1) / TILE * across;
    for (u64 item = blockIdx.x; item < each * p.grouped.experts; item += gridDim.x) {
        const u64 e = item / each, n = item % each / across * TILE, first = item % across * TILE;
        const RowRange range = rows_of(p.grouped, (u32)e);
        const u64 rows = range.end - range.begin;
        if (rows == 0 && p.accumulate) continue;
        f32 sum[4][4] = {}, a[4], b[4];
        load_pair(p, range, k, n + c, first + c, a, b);
        for (u64 r = 0; r < rows; r += STEP) {
            __syncthreads();
            store<4>(&tiles.a[k][c], a);
            store<4>(&tiles.b[k][c], b);
            __syncthreads();
            if (r + STEP < rows) load_pair(p, range, r + STEP + k, n + c, first + c, a, b);
            add_products(tiles, sum);
        }
#pragma unroll
        for (u32 m = 0; m < 4; m++) {
            const u64 row = n + thread / 16 * 4 + m;
            if (row < p.outputs) store_sums(p, e * p.outputs + row, first, p.scale, sum[m]);
        }
    }
}
