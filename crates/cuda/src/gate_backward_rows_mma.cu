// d_n = scale * d_logits . router on tensor cores: a block has TILE_M tokens by TILE_N columns.
//
//   for each STEP experts: d_logits (f32) and router rows (bf16) by asynchronous copies, STAGES - 1 steps on their way
//                          d_logits in three terms, smallest first; router rows transposed where they are read
//
// A warp has few rows and many columns: it cuts each number in terms that it multiplies by all of its columns.
#define TILE_M 64
#define TILE_N 128
#define STEP 32
#define STAGES 4
// of a warp
#define ROWS 16
#define COLUMNS 64
#define THREADS 256
// elements of a line, so that fragments are read without bank conflicts
#define D_LINE (STEP + 8)
#define D_BYTES (TILE_M * D_LINE * 4)
#define STAGE_BYTES (D_BYTES + STEP * TILE_N * 2)

__device__ __forceinline__ void copy_step(const GroupedBackwardParams& p, u64 first_row, u64 first_col, u64 n, u32 stage) {
    if (n < p.outputs) {
        // d_logits: pieces of 4 numbers
#pragma unroll
        for (u32 i = threadIdx.x; i < TILE_M * STEP / 4; i += THREADS) {
            const u32 r = i / (STEP / 4), c = i % (STEP / 4) * 4;
            const bool inside = first_row + r < p.grouped.rows && n + c < p.outputs;
            copy_async(stage + (r * D_LINE + c) * 4, row_of<const f32>(p.d, inside ? first_row + r : 0) + (inside ? n + c : 0), inside);
        }
        // the router: pieces of 8, in lines of 64 columns
#pragma unroll
        for (u32 i = threadIdx.x; i < STEP * TILE_N / 8; i += THREADS) {
            const u32 k = i / (TILE_N / 8), c = i % (TILE_N / 8) * 8;
            const bool inside = n + k < p.outputs && first_col + c < p.inputs;
            const u16* from = reinterpret_cast<const u16*>(p.grouped.weights) + (inside ? (n + k) * p.grouped.row_stride + first_col + c : 0);
            copy_async(stage + D_BYTES + (c / 64 * STEP + k) * 128 + (c % 64 / 8 ^ k % 8) * 16, from, inside);
        }
    }
    commit_copies();
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) gate_backward_rows_mma(const __grid_constant__ GroupedBackwardParams p) {
    extern __shared__ __align__(128) u8 memory[];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_m = warp / 2 * ROWS, warp_n = warp % 2 * COLUMNS;
    const u64 first_row = (u64)blockIdx.x * TILE_M, first_col = (u64)blockIdx.y * TILE_N;
    const u32 ring = shared_address(memory);
    f32 sum[COLUMNS / 8][4] = {};
#pragma unroll
    for (u32 i = 0; i < STAGES - 1; i++) copy_step(p, first_row, first_col, i * STEP, ring + i * STAGE_BYTES);
    const u64 first = first_col + warp_n + lane % 4 * 2;
    const bool whole = p.grouped.neighbours && p.grouped.out.dtype == DTYPE_F32 && first_col + TILE_N <= p.inputs;
    // what is added to is on its way too
    f32 before[ROWS / 8][COLUMNS / 8][2] = {};
#pragma unroll
    for (u32 i = 0; i < ROWS / 8; i++) {
        const u64 row = first_row + warp_m + i * 8 + lane / 4;
        if (!whole || !p.accumulate || row >= p.grouped.rows) continue;
#pragma unroll
        for (u32 j = 0; j < COLUMNS / 8; j++) load<2>(row_of<const f32>(p.grouped.out, row) + first + j * 8, before[i][j]);
    }
    u32 stage = 0;
    for (u64 n = 0; n < p.outputs; n += STEP, stage = (stage + 1) % STAGES) {
        wait_copies<STAGES - 2>();
        __syncthreads();
        copy_step(p, first_row, first_col, n + (STAGES - 1) * STEP, ring + (stage + STAGES - 1) % STAGES * STAGE_BYTES);
        const f32* d = reinterpret_cast<const f32*>(memory + stage * STAGE_BYTES);
#pragma unroll
        for (u32 k = 0; k < STEP / 16; k++) {
            u32 a[4][TERMS];
#pragma unroll
            for (u32 q = 0; q < 4; q++) {
                f32 v[2];
                load<2>(d + (warp_m + q % 2 * 8 + lane / 4) * D_LINE + k * 16 + q / 2 * 8 + lane % 4 * 2, v);
                split_pair(v[0], v[1], a[q]);
            }
            u32 b[COLUMNS / 16][4];
#pragma unroll
            for (u32 j = 0; j < COLUMNS / 16; j++) {
                const u32 line = k * 16 + lane / 8 % 2 * 8 + lane % 8, at = warp_n + j * 16 + lane / 16 * 8;
                load_transposed(b[j], ring + stage * STAGE_BYTES + D_BYTES + (at / 64 * STEP + line) * 128 + (at % 64 / 8 ^ line % 8) * 16);
            }
#pragma unroll
            for (int term = TERMS - 1; term >= 0; term--) {
                const u32 own[4] = {a[0][term], a[1][term], a[2][term], a[3][term]};
#pragma unroll
                for (u32 j = 0; j < COLUMNS / 16; j++) {
                    mma(bf16(), sum[2 * j], own, b[j][0], b[j][1]);
                    mma(bf16(), sum[2 * j + 1], own, b[j][2], b[j][3]);
                }
            }
        }
    }
#pragma unroll
    for (u32 i = 0; i < ROWS / 8; i++) {
        const u64 row = first_row + warp_m + i * 8 + lane / 4;
        if (row >= p.grouped.rows) continue;
        f32* to = row_of<f32>(p.grouped.out, row) + first;
#pragma unroll
        for (u32 j = 0; j < COLUMNS / 8; j++) {
            f32 out[2] = {p.scale * sum[j][i * 2], p.scale * sum[j][i * 2 + 1]};
            if (whole) {
                const f32 all[2] = {before[i][j][0] + out[0], before[i][j][1] + out[1]};
                store<2>(to + j * 8, all);
            } else {
                store_gradients<2>(p.grouped.out, p.accumulate, p.grouped.neighbours, row, first + j * 8, p.inputs, out);
            }
        }
    }
}
