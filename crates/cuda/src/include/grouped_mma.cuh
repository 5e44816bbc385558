// The grouped product on tensor cores: x and weights of one 2-byte format W_T, rows of both in 16-byte pieces.
//
//   each block, for its tiles of TILE_M rows and TILE_N weight rows:
//     for each 64 columns: x rows (gathered) and weight rows by asynchronous copies into a ring of STAGES stages,
//                          which runs on across tiles; WARPS_M x WARPS_N warps multiply what has arrived
//     epilogue from registers
//
// Gate and up rows of the same outputs alternate by 8 in a tile, so that a thread holds both sums of an output.
// A row of 64 elements is 8 pieces of 16 bytes, stored at piece ^ (row % 8): no bank conflicts either way.
#define STEP 64
#define THREADS (32 * WARPS_M * WARPS_N)
#define WARP_M (TILE_M / WARPS_M)
#define WARP_N (TILE_N / WARPS_N)
#define ROWS_AT_ONCE (THREADS / 8)
#define X_COPIES (TILE_M > ROWS_AT_ONCE ? TILE_M / ROWS_AT_ONCE : 1)
#define W_COPIES (TILE_N / ROWS_AT_ONCE)
#define X_BYTES (TILE_M * STEP * 2)
#define STAGE_BYTES ((TILE_M + TILE_N) * STEP * 2)
#define TILE_OUTPUTS (GATED ? TILE_N / 2 : TILE_N)

// Copies the block's tiles, step by step, ahead of their use.
struct Loader {
    Tile tile;
    u32 step;
    bool any;
    // the block's tiles after the first one, as they come, and which of them is next
    u32* next;
    u32 turn;
    // one piece of each of these rows is this thread's
    const u16* x[X_COPIES];
    const u16* weights;
    u32 x_inside, w_inside;

    // The item after `item`; `after` is how many of the block's tiles came before that.
    __device__ __forceinline__ u64 item_after(u64 item, u32 after) const { return next ? next[after % 2] : item + gridDim.x; }

    __device__ __forceinline__ void begin_tile(const GroupedParams& p) {
        step = 0;
        turn++;
        // before this launch's turn, too: since the launch before the last one the counter is this launch's alone
        if (next && threadIdx.x == 0) next[turn % 2] = gridDim.x + atomicAdd(reinterpret_cast<u32*>(p.counter), 1);
        const u32 r = threadIdx.x / 8, piece = threadIdx.x % 8;
        x_inside = w_inside = 0;
#pragma unroll
        for (int i = 0; i < X_COPIES; i++) {
            const u32 at = r + i * ROWS_AT_ONCE;
            const u32 slot = at < tile.rows ? slot_of(p, tile.first_row + at) : NO_ROW;
            if (slot != NO_ROW) x_inside |= 1u << i;
            x[i] = reinterpret_cast<const u16*>(x_row<W_T>(p, slot == NO_ROW ? 0 : slot)) + piece * 8;
        }
        const Expert expert = expert_at<W_T>(p, tile.expert);
        // rows at distance ROWS_AT_ONCE of a gated tile have the same half and lie ROWS_AT_ONCE / 2 apart in it
        const u64 first = (u64)tile.column * TILE_OUTPUTS + (GATED ? r / 16 * 8 + r % 8 : r);
        const u64 half = GATED && r / 8 % 2 == 1 ? p.outputs : 0;
#pragma unroll
        for (int i = 0; i < W_COPIES; i++)
            if (expert.matrix && first + i * (GATED ? ROWS_AT_ONCE / 2 : ROWS_AT_ONCE) < p.outputs) w_inside |= 1u << i;
        weights = reinterpret_cast<const u16*>(expert.matrix) + (half + first) * p.row_stride + piece * 8;
    }

    template <bool ROWS, bool WEIGHTS>
    __device__ __forceinline__ void copy(const GroupedParams& p, const Schedule& schedule, u32 steps, u32 stage) {
        if (any) {
            const u32 r = threadIdx.x / 8, piece = threadIdx.x % 8;
            const u32 to = stage + (r * 8 + (piece ^ r % 8)) * 16;
            const u64 k = (u64)step * STEP;
            const bool within = k + piece * 8 < p.inner;
#pragma unroll
            for (int i = 0; i < X_COPIES && ROWS; i++) {
                const bool inside = within && (x_inside >> i & 1);
                if (X_COPIES * ROWS_AT_ONCE == TILE_M || r < TILE_M)
                    copy_async(to + i * ROWS_AT_ONCE * 128, x[i] + k, inside);
            }
            const u64 apart = (GATED ? ROWS_AT_ONCE / 2 : ROWS_AT_ONCE) * p.row_stride;
#pragma unroll
            for (int i = 0; i < W_COPIES && WEIGHTS; i++) {
                const bool inside = within && (w_inside >> i & 1);
                const u32 at = to + X_BYTES + i * ROWS_AT_ONCE * 128;
                // with few rows an expert is one tile
                if (TILE_M == 16) copy_async_once(at, weights + k + i * apart, inside);
                else copy_async(at, weights + k + i * apart, inside);
            }
            if (++step == steps) {
                any = schedule.find<TILE_M>(p, item_after(tile.item, turn), tile);
                if (any) begin_tile(p);
            }
        }
        if (ROWS) commit_copies();
    }
};

__device__ __forceinline__ void multiply_stage(u32 stage, f32 (&sum)[WARP_M / 16][WARP_N / 8][4]) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 row = warp / WARPS_N * WARP_M + lane % 16, column = warp % WARPS_N * WARP_N + lane / 16 * 8 + lane % 8;
#pragma unroll
    for (u32 k = 0; k < STEP / 16; k++) {
        u32 a[WARP_M / 16][4], b[WARP_N / 16][4];
#pragma unroll
        for (u32 i = 0; i < WARP_M / 16; i++) load_matrices(a[i], stage + (row + i * 16) * 128 + ((k * 2 + lane / 16) ^ row % 8) * 16);
#pragma unroll
        for (u32 j = 0; j < WARP_N / 16; j++)
            load_matrices(b[j], stage + X_BYTES + (column + j * 16) * 128 + ((k * 2 + lane / 8 % 2) ^ column % 8) * 16);
#pragma unroll
        for (u32 i = 0; i < WARP_M / 16; i++)
#pragma unroll
            for (u32 j = 0; j < WARP_N / 16; j++) {
                mma(W_T(), sum[i][2 * j], a[i], b[j][0], b[j][1]);
                mma(W_T(), sum[i][2 * j + 1], a[i], b[j][2], b[j][3]);
            }
    }
}

__device__ __forceinline__ void store_tile(const GroupedParams& p, const Tile& tile, f32 (&sum)[WARP_M / 16][WARP_N / 8][4]) {
    const Expert expert = expert_at<W_T>(p, tile.expert);
    if (!expert.matrix) return;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = warp % WARPS_N * WARP_N;
    const u64 first = (u64)tile.column * TILE_OUTPUTS + (GATED ? column / 2 : column) + lane % 4 * 2;
#pragma unroll
    for (u32 i = 0; i < 2 * (WARP_M / 16); i++) {
        const u32 row = warp / WARPS_N * WARP_M + i * 8 + lane / 4, half = i % 2 * 2;
        const u32 slot = row < tile.rows ? slot_of(p, tile.first_row + row) : NO_ROW;
        if (slot == NO_ROW) continue;
        const f32 weight = input_weight(p, slot);
#pragma unroll
        for (u32 j = 0; j < WARP_N / 8; j += GATED ? 2 : 1) {
            const f32(&g)[4] = sum[i / 2][j], (&u)[4] = sum[i / 2][GATED ? j + 1 : j];
            const f32 gate[2] = {g[half], g[half + 1]}, up[2] = {u[half], u[half + 1]};
            store_outputs<2>(p, expert.bias, weight, tile.first_row + row, first + (GATED ? j / 2 : j) * 8, gate, up);
        }
    }
}

__device__ __forceinline__ void grouped_mma(const GroupedParams& p, u8* memory) {
    __shared__ u32 next[2];
    const u32 ring = shared_address(memory);
    // tiles of many rows have no registers to spare, nor much to gain
    const bool early = TILE_M < 128 && p.early;
    if (!early) take_turn();
    Schedule schedule;
    schedule.make<THREADS, TILE_M>(p, reinterpret_cast<u32*>(memory + STAGES * STAGE_BYTES), (p.outputs + TILE_OUTPUTS - 1) / TILE_OUTPUTS);
    const u32 steps = (p.inner + STEP - 1) / STEP;

    Tile tile;
    Loader loader;
    tile.expert = loader.tile.expert = 0;
    bool any = schedule.find<TILE_M>(p, blockIdx.x, tile);
    loader.any = any;
    loader.tile = tile;
    // a tile's successor is known a turn of the ring before it is wanted
    loader.next = p.counter && steps >= STAGES ? next : nullptr;
    loader.turn = 0;
    if (any) loader.begin_tile(p);
    if (early) {
        // while the launch before still makes the rows
        Loader ahead = loader;
#pragma unroll 1
        for (u32 i = 0; i < STAGES - 1; i++) ahead.copy<false, true>(p, schedule, steps, ring + i * STAGE_BYTES);
        take_turn();
#pragma unroll 1
        for (u32 i = 0; i < STAGES - 1; i++) loader.copy<true, false>(p, schedule, steps, ring + i * STAGE_BYTES);
    } else {
#pragma unroll 1
        for (u32 i = 0; i < STAGES - 1; i++) loader.copy<true, true>(p, schedule, steps, ring + i * STAGE_BYTES);
    }

    u32 read = 0, write = STAGES - 1, done = 0;
    while (any) {
        f32 sum[WARP_M / 16][WARP_N / 8][4] = {};
        for (u32 step = 0; step < steps; step++) {
            wait_copies<STAGES - 2>();
            __syncthreads();
            loader.copy<true, true>(p, schedule, steps, ring + write * STAGE_BYTES);
            multiply_stage(ring + read * STAGE_BYTES, sum);
            read = read + 1 == STAGES ? 0 : read + 1;
            write = write + 1 == STAGES ? 0 : write + 1;
        }
        store_tile(p, tile, sum);
        any = schedule.find<TILE_M>(p, loader.item_after(tile.item, ++done), tile);
    }
    wait_copies<0>();
}
