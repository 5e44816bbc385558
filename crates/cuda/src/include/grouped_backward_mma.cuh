// The gradients of a grouped product on tensor cores: both operands of one 2-byte format W_T, rows in 16-byte pieces.
//
//   each block, for its tiles of TILE_M by TILE_N sums:
//     for each 64 products of a sum: both operands by asynchronous copies into a ring of STAGES stages, which runs on
//                                    across tiles; WARPS_M x WARPS_N warps multiply what has arrived
//     epilogue from registers
//
// MATRICES: tiles of [N, K] of an expert, sums over its rows, of which both operands are read as they lie; else tiles of
// rows and [K], sums over n: a line of d is a row of the tile, the matrix is read as it lies.
//
// A stage is lines of 128 bytes. Where sums run along a line, it is one row of the tile; where they run across lines,
// line l is product l % 64, columns l / 64 * 64 and on. Piece i of line l lies at piece i ^ (l % 8): no bank conflicts
// when it is written, nor when eight lines are read, transposed or not.
#define STEP 64
#define THREADS (32 * WARPS_M * WARPS_N)
#define WARP_M (TILE_M / WARPS_M)
#define WARP_N (TILE_N / WARPS_N)
#define LINES_AT_ONCE (THREADS / 8)
#define A_COPIES (TILE_M / LINES_AT_ONCE)
#define B_COPIES (TILE_N / LINES_AT_ONCE)
// lines of one product after another that a thread copies, before it comes to other columns
#define PRODUCTS (STEP / LINES_AT_ONCE)
#define A_BYTES (TILE_M * 128)
#define STAGE_BYTES ((TILE_M + TILE_N) * 128)

// A tile: sums of `rows` rows from `first_row` on, `steps` times STEP products each.
struct Job {
    u64 item, first_m, first_n;
    u32 expert, first_row, rows, steps;
};

struct Jobs {
    const GroupedBackwardParams& p;
    Schedule schedule;

    __device__ __forceinline__ Jobs(const GroupedBackwardParams& params, u32* memory) : p(params) {
        if (!MATRICES) schedule.make<THREADS, TILE_M>(p.grouped, memory, (u32)((p.inputs + TILE_N - 1) / TILE_N));
    }

    // The tile of `item`, which is not before `job`'s; false when there is none.
    __device__ __forceinline__ bool find(u64 item, Job& job) const {
        job.item = item;
        if (MATRICES) {
            // expert by expert, each block's next one not far
            const u32 across = (u32)((p.inputs + TILE_N - 1) / TILE_N);
            const u64 each = (p.outputs + TILE_M - 1) / TILE_M * across;
            if (item >= each * p.grouped.experts) return false;
            while ((job.expert + 1) * each <= item) job.expert++;
            const u32 local = (u32)(item - job.expert * each);
            job.first_m = (u64)(local / across) * TILE_M;
            job.first_n = (u64)(local % across) * TILE_N;
            const RowRange range = rows_of(p.grouped, job.expert);
            job.first_row = range.begin;
            job.rows = range.end - range.begin;
            job.steps = (u32)(((u64)job.rows + STEP - 1) / STEP);
            return true;
        }
        Tile tile;
        tile.expert = job.expert;
        if (!schedule.find<TILE_M>(p.grouped, item, tile)) return false;
        job.expert = tile.expert;
        job.first_row = tile.first_row;
        job.rows = tile.rows;
        job.first_n = (u64)tile.column * TILE_N;
        job.steps = (u32)((p.outputs + STEP - 1) / STEP);
        return true;
    }
};

// Copies the block's tiles, step by step, ahead of their use.
struct Loader {
    Job job;
    u32 step;
    bool any;
    // MATRICES: the slots of the next products, asked for a step ahead and not looked at before
    u32 slot[PRODUCTS];
    // else one piece of each of these rows is this thread's, and of the matrix from its line of the step on
    const u16* d[A_COPIES];
    u32 d_inside;
    const u16* matrix;

    __device__ __forceinline__ void look_up(const GroupedBackwardParams& p) {
#pragma unroll
        for (int i = 0; i < PRODUCTS; i++) {
            const u64 at = (u64)step * STEP + threadIdx.x / 8 + i * LINES_AT_ONCE;
            const u32 row = job.first_row + (u32)at;
            slot[i] = NO_ROW;
            if (at < job.rows) slot[i] = p.grouped.row_slot ? reinterpret_cast<const u32*>(p.grouped.row_slot)[row] : row;
        }
    }

    // At the tile of `item`, or the next one that has products.
    __device__ __forceinline__ void begin(const Jobs& jobs, u64 item) {
        const GroupedBackwardParams& p = jobs.p;
        step = 0;
        any = jobs.find(item, job);
        while (any && job.steps == 0) any = jobs.find(job.item + gridDim.x, job);
        if (!any) return;
        if (MATRICES) {
            look_up(p);
            return;
        }
        const u32 r = threadIdx.x / 8, piece = threadIdx.x % 8;
        d_inside = 0;
#pragma unroll
        for (int i = 0; i < A_COPIES; i++) {
            const u32 at = r + i * LINES_AT_ONCE;
            const u32 own = at < job.rows ? slot_of(p.grouped, job.first_row + at) : NO_ROW;
            if (own != NO_ROW) d_inside |= 1u << i;
            const u64 source = own == NO_ROW ? 0 : source_of(p, p.d_gathered, job.first_row + at, own);
            d[i] = row_of<const u16>(p.d, source) + piece * 8;
        }
        matrix = reinterpret_cast<const u16*>(p.grouped.weights) + job.expert * p.grouped.expert_stride + r * p.grouped.row_stride + column(job.first_n, 0);
    }

    // Where its pieces go, and the column that the piece of its i-th line begins at.
    __device__ __forceinline__ u32 target(u32 stage) const {
        const u32 r = threadIdx.x / 8, piece = threadIdx.x % 8;
        return stage + (r * 8 + (piece ^ r % 8)) * 16;
    }
    __device__ __forceinline__ u64 column(u64 first, int i) const { return first + i / PRODUCTS * 64 + threadIdx.x % 8 * 8; }

    __device__ __forceinline__ void copy_matrices(const GroupedBackwardParams& p, u32 to) const {
        const u16* from_d[PRODUCTS];
        const u16* from_x[PRODUCTS];
        bool exists[PRODUCTS];
#pragma unroll
        for (int i = 0; i < PRODUCTS; i++) {
            const u32 row = job.first_row + step * STEP + threadIdx.x / 8 + i * LINES_AT_ONCE;
            exists[i] = slot[i] < p.grouped.rows;
            const u32 token = exists[i] ? slot[i] / p.grouped.top_k : 0, own = exists[i] ? row : 0;
            from_d[i] = row_of<const u16>(p.d, p.d_gathered ? token : own) + column(job.first_m, 0);
            from_x[i] = row_of<const u16>(p.x, p.x_gathered ? token : own) + column(job.first_n, 0);
        }
#pragma unroll
        for (int i = 0; i < A_COPIES; i++)
            copy_async(to + i * LINES_AT_ONCE * 128, from_d[i % PRODUCTS] + i / PRODUCTS * 64,
                       exists[i % PRODUCTS] && column(job.first_m, i) < p.outputs);
#pragma unroll
        for (int i = 0; i < B_COPIES; i++)
            copy_async(to + A_BYTES + i * LINES_AT_ONCE * 128, from_x[i % PRODUCTS] + i / PRODUCTS * 64,
                       exists[i % PRODUCTS] && column(job.first_n, i) < p.inputs);
    }

    __device__ __forceinline__ void copy_rows(const GroupedBackwardParams& p, u32 to) {
        const u64 k = (u64)step * STEP;
        const bool within = k + threadIdx.x % 8 * 8 < p.outputs;
#pragma unroll
        for (int i = 0; i < A_COPIES; i++)
            copy_async(to + i * LINES_AT_ONCE * 128, d[i] + k, within && (d_inside >> i & 1));
        const u64 n = k + threadIdx.x / 8, stride = p.grouped.row_stride;
#pragma unroll
        for (int i = 0; i < B_COPIES; i++)
            copy_async(to + A_BYTES + i * LINES_AT_ONCE * 128, matrix + i % PRODUCTS * LINES_AT_ONCE * stride + i / PRODUCTS * 64,
                       n + i % PRODUCTS * LINES_AT_ONCE < p.outputs && column(job.first_n, i) < p.inputs);
        matrix += STEP * stride;
    }

    __device__ __forceinline__ void copy(const Jobs& jobs, u32 stage) {
        if (any) {
            if (MATRICES) copy_matrices(jobs.p, target(stage));
            else copy_rows(jobs.p, target(stage));
            if (++step == job.steps) begin(jobs, job.item + gridDim.x);
            else if (MATRICES) look_up(jobs.p);
        }
        commit_copies();
    }
};

// The line and piece where products run across lines: product `k`, column `at` of the tile.
__device__ __forceinline__ u32 across(u32 k, u32 at) { return (at / 64 * STEP + k) * 128 + (at % 64 / 8 ^ k % 8) * 16; }

__device__ __forceinline__ void multiply_stage(u32 stage, f32 (&sum)[WARP_M / 16][WARP_N / 8][4]) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 first_m = warp / WARPS_N * WARP_M, first_n = warp % WARPS_N * WARP_N;
#pragma unroll
    for (u32 k = 0; k < STEP / 16; k++) {
        u32 a[WARP_M / 16][4], b[WARP_N / 16][4];
#pragma unroll
        for (u32 i = 0; i < WARP_M / 16; i++) {
            const u32 row = first_m + i * 16 + lane % 16;
            if (MATRICES) load_transposed(a[i], stage + across(k * 16 + lane / 16 * 8 + lane % 8, first_m + i * 16 + lane / 8 % 2 * 8));
            else load_matrices(a[i], stage + row * 128 + ((k * 2 + lane / 16) ^ row % 8) * 16);
        }
#pragma unroll
        for (u32 j = 0; j < WARP_N / 16; j++)
            load_transposed(b[j], stage + A_BYTES + across(k * 16 + lane / 8 % 2 * 8 + lane % 8, first_n + j * 16 + lane / 16 * 8));
#pragma unroll
        for (u32 i = 0; i < WARP_M / 16; i++)
#pragma unroll
            for (u32 j = 0; j < WARP_N / 16; j++) {
                mma(W_T(), sum[i][2 * j], a[i], b[j][0], b[j][1]);
                mma(W_T(), sum[i][2 * j + 1], a[i], b[j][2], b[j][3]);
            }
    }
}

// Where row `m` of a tile goes, and its factor; false where it goes nowhere.
__device__ __forceinline__ bool row_of_tile(const GroupedBackwardParams& p, const Job& job, u32 m, u64& row, f32& factor) {
    factor = p.scale;
    if (MATRICES) {
        row = job.expert * p.outputs + job.first_m + m;
        return job.first_m + m < p.outputs;
    }
    row = job.first_row + m;
    const u32 slot = m < job.rows ? slot_of(p.grouped, job.first_row + m) : NO_ROW;
    if (slot == NO_ROW) return false;
    factor *= input_weight(p.grouped, slot);
    return true;
}

// A tile all of whose columns are there, in pairs of neighbours.
template <class T>
__device__ __forceinline__ void store_pairs(const GroupedBackwardParams& p, const Job& job, f32 (&sum)[WARP_M / 16][WARP_N / 8][4]) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u64 first = job.first_n + warp % WARPS_N * WARP_N + lane % 4 * 2;
#pragma unroll
    for (u32 i = 0; i < 2 * (WARP_M / 16); i++) {
        u64 row;
        f32 factor;
        if (!row_of_tile(p, job, warp / WARPS_N * WARP_M + i * 8 + lane / 4, row, factor)) continue;
        T* to = row_of<T>(p.grouped.out, row) + first;
#pragma unroll
        for (u32 j = 0; j < WARP_N / 8; j++) {
            f32 d[2] = {factor * sum[i / 2][j][i % 2 * 2], factor * sum[i / 2][j][i % 2 * 2 + 1]};
            store_pair(to + j * 8, p.accumulate, d);
        }
    }
}

__device__ __forceinline__ void store_tile(const GroupedBackwardParams& p, const Job& job, f32 (&sum)[WARP_M / 16][WARP_N / 8][4]) {
    if (p.grouped.neighbours && job.first_n + TILE_N <= p.inputs) {
        if (p.grouped.out.dtype == DTYPE_F32) store_pairs<f32>(p, job, sum);
        else if (p.grouped.out.dtype == DTYPE_F16) store_pairs<f16>(p, job, sum);
        else store_pairs<bf16>(p, job, sum);
        return;
    }
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u64 first = job.first_n + warp % WARPS_N * WARP_N + lane % 4 * 2;
#pragma unroll
    for (u32 i = 0; i < 2 * (WARP_M / 16); i++) {
        u64 row;
        f32 factor;
        if (!row_of_tile(p, job, warp / WARPS_N * WARP_M + i * 8 + lane / 4, row, factor)) continue;
#pragma unroll
        for (u32 j = 0; j < WARP_N / 8; j++)
#pragma unroll
            for (u32 n = 0; n < 2; n++) {
                f32 d[1] = {factor * sum[i / 2][j][i % 2 * 2 + n]};
                if (first + j * 8 + n < p.inputs) store_gradient<1>(p.grouped.out, p.accumulate, row, first + j * 8 + n, d);
            }
    }
}

__device__ __forceinline__ void grouped_backward_mma(const GroupedBackwardParams& p, u8* memory) {
    const u32 ring = shared_address(memory);
    const Jobs jobs(p, reinterpret_cast<u32*>(memory + STAGES * STAGE_BYTES));
    Job job;
    Loader loader;
    job.expert = loader.job.expert = 0;
    bool any = jobs.find(blockIdx.x, job);
    loader.begin(jobs, blockIdx.x);
#pragma unroll 1
    for (u32 i = 0; i < STAGES - 1; i++) loader.copy(jobs, ring + i * STAGE_BYTES);

    u32 read = 0, write = STAGES - 1;
    while (any) {
        f32 sum[WARP_M / 16][WARP_N / 8][4] = {};
        for (u32 step = 0; step < job.steps; step++) {
            wait_copies<STAGES - 2>();
            __syncthreads();
            loader.copy(jobs, ring + write * STAGE_BYTES);
            multiply_stage(ring + read * STAGE_BYTES, sum);
            read = read + 1 == STAGES ? 0 : read + 1;
            write = write + 1 == STAGES ? 0 : write + 1;
        }
        // an expert without rows: zeros, or nothing to add
        if (job.steps > 0 || !p.accumulate) store_tile(p, job, sum);
        any = jobs.find(job.item + gridDim.x, job);
    }
    wait_copies<0>();
}
