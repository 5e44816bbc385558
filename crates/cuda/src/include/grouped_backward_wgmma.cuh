// The gradient of a grouped product's matrices on warpgroup tensor cores: d and x of one 2-byte format W_T, rows of both in
// 16-byte pieces.
//
//   one warpgroup, for the block's tiles of TILE_M columns of A and TILE_N columns of B:
//     for each 64 rows of the expert: both operands' columns of these rows (gathered rows of A by asynchronous copies, rows
//                                     that follow each other by the copy engine) into the next free of STAGES stages
//   two warpgroups, each with half of B's columns:
//     wait for stages, multiply, free them; epilogue through shared memory, so that neighbours are stored together
//
// What one of the two is ahead by is what the other still multiplies behind its epilogue.
//
// With CLUSTER 2 the blocks are pairs, which have neighbouring columns of A and the same columns of B: each brings half of B's
// to both, and a stage is free when both have read it.
//
// A and B are d and x; if A_IS_X, x and d: A is what may be gathered, and the narrower side of a tile. Sums run across the
// lines of both operands, which are transposed as they are multiplied.
//
// What follows an expert's last row is another's, or never written: of the last rows, if they are not 64, asynchronous
// copies bring what is there and zeros.
#define STEP 64
#define THREADS 384
#if CLUSTER == 2
#define IN_CLUSTERS __cluster_dims__(2, 1, 1)
#else
#define IN_CLUSTERS
#endif
#define BLOCK_BYTES (64 * STEP * 2)
#define A_BLOCKS (TILE_M / 64)
#define B_BLOCKS (TILE_N / 64)
#define A_BYTES (A_BLOCKS * BLOCK_BYTES)
#define B_BYTES (B_BLOCKS * BLOCK_BYTES)
#define STAGE_BYTES (A_BYTES + B_BYTES)
// Columns of B of a warpgroup, and what becomes of its registers: 128 x 192 sums are 192 of a thread, 384 threads begin with 168.
#define WIDTH (TILE_N / 2)
#define CONSUMER_REGISTERS 232
#define PRODUCER_REGISTERS 40
// Shared memory where a warpgroup turns sums into rows: in f32 lines of 32 sums, or of a column of B's all sums.
#define SUMS_BYTES 9216
#define LINE (A_IS_X ? TILE_M + 4 : 32 + 4)

// Tiles of A's columns, or pairs of them, that blocks have at a time, by as many of B's as there are blocks for: so both sides
// of an expert with many rows stay in the second-level cache.
#define BAND (16 / CLUSTER)

// A tile: sums of `rows` rows from `first_row` on, of columns of A and of B from `first_a` and `first_b` on.
struct Job {
    u64 item;
    u32 expert, first_row, rows, first_a, first_b;
};

struct Jobs {
    const GroupedBackwardParams& p;
    // [E + 1], in shared memory
    u32* first_row;
    u32 across, each;

    __device__ __forceinline__ Jobs(const GroupedBackwardParams& params, u32* memory) : p(params), first_row(memory) {
        const u32 rows = (u32)p.grouped.rows, experts = p.grouped.experts;
        for (u32 e = threadIdx.x; e <= experts; e += THREADS) {
            const u32 begin = e < experts ? rows_of(p.grouped, e).begin : rows_of(p.grouped, experts - 1).end;
            first_row[e] = begin < rows ? begin : rows;
        }
        __syncthreads();
        across = (b_columns() + TILE_N - 1) / TILE_N;
        each = (a_columns() + CLUSTER * TILE_M - 1) / (CLUSTER * TILE_M) * across;
    }

    __device__ __forceinline__ u32 a_columns() const { return (u32)(A_IS_X ? p.inputs : p.outputs); }
    __device__ __forceinline__ u32 b_columns() const { return (u32)(A_IS_X ? p.outputs : p.inputs); }

    // The tile of `item`, which is not before `job`'s; false when there is none.
    __device__ __forceinline__ bool find(u64 item, Job& job) const {
        job.item = item;
        if (item >= (u64)each * p.grouped.experts) return false;
        while ((u64)(job.expert + 1) * each <= item) job.expert++;
        const u32 local = (u32)(item - (u64)job.expert * each), end = first_row[job.expert + 1];
        job.first_row = first_row[job.expert];
        job.rows = end > job.first_row ? end - job.first_row : 0;
        const u32 band = local / (BAND * across) * BAND, left = each / across - band, high = left < BAND ? left : BAND;
        const u32 within = local - band * across, down = within / high;
        job.first_a = ((band + within - down * high) * CLUSTER + blockIdx.x % CLUSTER) * TILE_M;
        job.first_b = down * TILE_N;
        return true;
    }
};

struct Producer {
    const MatricesWgmmaParams& q;
    const Jobs& jobs;
    const Ring ring;

    __device__ __forceinline__ void copy_tiles() const {
        Job job;
        job.expert = 0;
        Place at = {0, 1};
        for (bool any = jobs.find(blockIdx.x / CLUSTER, job); any; any = jobs.find(job.item + gridDim.x / CLUSTER, job)) copy_tile(job, at);
    }

    // A warp has four of each 16 rows of a step; the first 16 lanes know one each.
    __device__ __forceinline__ u32 row_in(const Job& job, u32 step) const {
        const u32 lane = threadIdx.x % 32, at = step * STEP + lane / 4 * 16 + threadIdx.x / 32 * 4 + lane % 4;
        return lane < 16 && at < job.rows ? job.first_row + at : NO_ROW;
    }
    // The slot of such a row, asked for a step ahead and not looked at before.
    __device__ __forceinline__ u32 slot_in(const Job& job, u32 step) const {
        const u32* slots = reinterpret_cast<const u32*>(q.product.grouped.row_slot);
        u32 slot = NO_ROW;
        const u32 row = row_in(job, step);
        if (GATHERED && row != NO_ROW) slot = slots[row];
        return slot;
    }

    // 64 columns of each of BLOCKS blocks, of the rows whose sources the warp's lanes have; zeros where there is none.
    template <u32 BLOCKS> __device__ __forceinline__ void copy_rows(u32 to, const Tensor& from, u32 source, u32 first, u32 width) const {
        const u32 column = first + threadIdx.x % 8 * 8;
#pragma unroll
        for (u32 i = 0; i < STEP / 16; i++) {
            const u32 row = __shfl_sync(0xffffffffu, source, i * 4 + threadIdx.x % 32 / 8);
            const u16* piece = row_of<const u16>(from, row == NO_ROW ? 0 : row) + column;
#pragma unroll
            for (u32 b = 0; b < BLOCKS; b++)
                copy_async(to + b * BLOCK_BYTES + i * 2048, piece + b * 64, row != NO_ROW && column + b * 64 < width);
        }
    }

    __device__ __forceinline__ void copy_tile(const Job& job, Place& at) const {
        const GroupedBackwardParams& p = q.product;
        const Tensor &a = A_IS_X ? p.x : p.d, &b = A_IS_X ? p.d : p.x;
        const u32 r = threadIdx.x / 8, own = (r * 8 + (threadIdx.x % 8 ^ r % 8)) * 16;
        const bool first = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0) == 0;
        // asked for a step ahead
        u32 slot = slot_in(job, 0);
#pragma unroll 1
        for (u32 step = 0; step * STEP < job.rows; step++, at.next()) {
            const u32 stage = ring.stages + at.stage * STAGE_BYTES, full = ring.full + at.stage * 8, row = job.first_row + step * STEP;
            const bool whole = (step + 1) * STEP <= job.rows;
            const u32 source = !GATHERED ? row_in(job, step) : slot < p.grouped.rows ? slot / p.grouped.top_k : NO_ROW;
            slot = slot_in(job, step + 1);
            barrier_wait(ring.empty + at.stage * 8, at.parity);
            if (first && elected()) {
                barrier_expect(full, whole ? (GATHERED ? 0 : A_BYTES) + B_BYTES : 0);
                if (whole) {
#pragma unroll
                    for (u32 i = 0; i < A_BLOCKS; i++)
                        if (!GATHERED) copy_box(stage + i * BLOCK_BYTES, q.a, full, job.first_a + i * 64, row);
#pragma unroll
                    for (u32 i = 0; i < B_BLOCKS / CLUSTER; i++) {
                        const u32 at = blockIdx.x % CLUSTER * (B_BLOCKS / CLUSTER) + i, to = stage + A_BYTES + at * BLOCK_BYTES;
                        if (CLUSTER == 2) copy_box_to_both(to, q.b, full, job.first_b + at * 64, row);
                        else copy_box(to, q.b, full, job.first_b + at * 64, row);
                    }
                }
            }
            if (GATHERED || !whole) copy_rows<A_BLOCKS>(stage + own, a, source, job.first_a, jobs.a_columns());
            if (!whole) copy_rows<B_BLOCKS>(stage + A_BYTES + own, b, row_in(job, step), job.first_b, jobs.b_columns());
            barrier_arrive_copies(full);
        }
    }
};

// sum (+)= a^T . b, a [16, 64], b [16, N].
#define TRANSPOSED_PRODUCT(N, T, FORMAT, A, B, KEEP)                                                                      \
    __device__ __forceinline__ void multiply_transposed(T, f32(&sum)[N / 2], u64 a, u64 b, u32 keep) {                    \
        asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, " KEEP ", 0;\n"                                              \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." FORMAT "." FORMAT " {" NAMES_OF_##N "}, " A ", " B \
                     ", keep, 1, 1, 1, 1;\n}\n"                                                                           \
                     : SUMS_OF_##N                                                                                        \
                     : "l"(a), "l"(b), "r"(keep));                                                                        \
    }
TRANSPOSED_PRODUCT(128, bf16, "bf16", "%64", "%65", "%66")
TRANSPOSED_PRODUCT(128, f16, "f16", "%64", "%65", "%66")
TRANSPOSED_PRODUCT(192, bf16, "bf16", "%96", "%97", "%98")
TRANSPOSED_PRODUCT(192, f16, "f16", "%96", "%97", "%98")

// As `store_matrices`, each 8 x 8 matrix transposed.
__device__ __forceinline__ void store_transposed(u32 address, const u32 (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
}

__device__ __forceinline__ u32 dtype_of(bf16) { return DTYPE_BF16; }
__device__ __forceinline__ u32 dtype_of(f16) { return DTYPE_F16; }

struct Consumer {
    const GroupedBackwardParams& p;
    const Ring ring;
    // of two
    const u32 group;

    __device__ __forceinline__ void free_stage(u32 stage) const {
        const u32 lane = threadIdx.x % 32;
        if (CLUSTER == 1 && lane == 0) barrier_arrive(ring.empty + stage * 8);
        if (CLUSTER == 2 && lane < 2) barrier_arrive_there(address_in(ring.empty + stage * 8, lane));
    }

    // Begins the products of 16 N rows of a stage; `keep`: there are sums of others.
    template <u32 N> __device__ __forceinline__ void multiply_rows(u32 stage, u32 keep, f32 (&sum)[A_BLOCKS][WIDTH / 2]) const {
        const u64 a = transposed_at(stage), b = transposed_at(stage + A_BYTES + group * (B_BYTES / 2));
        begin_products();
#pragma unroll
        for (u32 k = 0; k < N; k++)
#pragma unroll
            for (u32 i = 0; i < A_BLOCKS; i++)
                multiply_transposed(W_T(), sum[i], a + i * (BLOCK_BYTES / 16) + k * 128, b + k * 128, keep | k);
        commit_products();
    }

    // Begins the products of a tile; returns the stage that the last of them read.
    __device__ __forceinline__ u32 multiply_tile(const Job& job, Place& at, f32 (&sum)[A_BLOCKS][WIDTH / 2]) const {
        u32 last = 0, left = job.rows;
#pragma unroll
        for (u32 i = 0; i < A_BLOCKS; i++) hold(sum[i]);
#pragma unroll 1
        for (; left >= STEP; left -= STEP) {
            barrier_wait(ring.full + at.stage * 8, at.parity);
            if (GATHERED) fence_async();
            multiply_rows<4>(ring.stages + at.stage * STAGE_BYTES, left != job.rows, sum);
            wait_products<1>();
            if (left != job.rows) free_stage(last);
            last = at.stage;
            at.next();
        }
        if (left > 0) {
            const u32 stage = ring.stages + at.stage * STAGE_BYTES, keep = left != job.rows;
            barrier_wait(ring.full + at.stage * 8, at.parity);
            fence_async();
            if (left <= 16) multiply_rows<1>(stage, keep, sum);
            else if (left <= 32) multiply_rows<2>(stage, keep, sum);
            else if (left <= 48) multiply_rows<3>(stage, keep, sum);
            else multiply_rows<4>(stage, keep, sum);
            wait_products<1>();
            if (keep) free_stage(last);
            last = at.stage;
            at.next();
        }
        return last;
    }

    // Ends the products.
    __device__ __forceinline__ void finish_tile(const Job& job, u32 last, f32 (&sum)[A_BLOCKS][WIDTH / 2]) const {
        wait_products<0>();
#pragma unroll
        for (u32 i = 0; i < A_BLOCKS; i++) hold(sum[i]);
        if (job.rows > 0) free_stage(last);
    }

    // Of four lines of sums, which are rows of the matrix 4 from each other, the thread's four neighbours each.
    template <class T> __device__ __forceinline__ void store_lines(const Job& job, u32 row, u32 column, const f32* lines) const {
        const u64 stride = p.grouped.out.stride * 4;
        T* to = row_of<T>(p.grouped.out, job.expert * p.outputs + row) + column;
        bool inside[4];
        f32 before[4][4] = {};
#pragma unroll
        for (u32 r = 0; r < 4; r++) inside[r] = column < p.inputs && row + r * 4 < p.outputs;
#pragma unroll
        for (u32 r = 0; r < 4; r++)
            if (p.accumulate && inside[r]) load<4>(to + r * stride, before[r]);
#pragma unroll
        for (u32 r = 0; r < 4; r++) {
            f32 d[4];
            load<4>(lines + r * 4 * LINE, d);
#pragma unroll
            for (u32 n = 0; n < 4; n++) d[n] = fmaf(p.scale, d[n], before[r][n]);
            if (inside[r]) store<4>(to + r * stride, d);
        }
    }

    __device__ __forceinline__ void store_lines(const Job& job, u32 row, u32 column, const f32* lines) const {
        if (p.grouped.out.dtype == DTYPE_F32) store_lines<f32>(job, row, column, lines);
        else if (p.grouped.out.dtype == DTYPE_F16) store_lines<f16>(job, row, column, lines);
        else store_lines<bf16>(job, row, column, lines);
    }

    // Columns of A are rows of the matrix: 16 of a warp and 32 columns at a time.
    __device__ __forceinline__ void store_rows(const Job& job, const f32 (&sum)[A_BLOCKS][WIDTH / 2], f32* memory) const {
        const u32 lane = threadIdx.x % 32, first = threadIdx.x / 32 % 4 * 16, r = lane / 8, column = lane % 8 * 4;
        f32* lines = memory + first * LINE;
#pragma unroll
        for (u32 i = 0; i < A_BLOCKS; i++)
#pragma unroll
            for (u32 c = 0; c < WIDTH; c += 32) {
#pragma unroll
                for (u32 n = 0; n < 8; n++) {
                    const f32 pair[2] = {sum[i][c / 2 + n * 2], sum[i][c / 2 + n * 2 + 1]};
                    store<2>(lines + (lane / 4 + n % 2 * 8) * LINE + n / 2 * 8 + lane % 4 * 2, pair);
                }
                __syncwarp();
                store_lines(job, job.first_a + i * 64 + first + r, job.first_b + c + column, lines + r * LINE + column);
                __syncwarp();
            }
    }

    // Columns of A are columns of the matrix: of all of them, 16 rows of the warpgroup at a time.
    __device__ __forceinline__ void store_columns(const Job& job, const f32 (&sum)[A_BLOCKS][WIDTH / 2], f32* lines) const {
        const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
        for (u32 c = 0; c < WIDTH; c += 16) {
#pragma unroll
            for (u32 i = 0; i < A_BLOCKS; i++)
#pragma unroll
                for (u32 n = 0; n < 8; n++) {
                    const u32 row = n / 4 * 8 + lane % 4 * 2 + n % 2, column = i * 64 + warp * 16 + lane / 4 + n / 2 % 2 * 8;
                    lines[row * LINE + column] = sum[i][c / 2 + n];
                }
            wait_threads<128>(1 + group);
            store_lines(job, job.first_b + c + warp, job.first_a + lane * 4, lines + warp * LINE + lane * 4);
            wait_threads<128>(1 + group);
        }
    }

    // Sums in the operands' format go as pieces of 16 bytes: a pair of neighbours, and a piece from shared memory.
    __device__ __forceinline__ u32 pair_at(const f32 (&sum)[WIDTH / 2], u32 i) const {
        return pair_of(W_T(), p.scale * sum[i * 2], p.scale * sum[i * 2 + 1]);
    }
    __device__ __forceinline__ void store_piece(const Job& job, u32 row, u32 column, u32 from) const {
        const uint4 piece = load_shared(from);
        if (row < p.outputs && column < p.inputs)
            *reinterpret_cast<uint4*>(row_of<u16>(p.grouped.out, job.expert * p.outputs + row) + column) = piece;
    }

    // As `store_rows`, 64 columns at a time in lines of 128 bytes.
    __device__ __forceinline__ void store_row_pieces(const Job& job, const f32 (&sum)[A_BLOCKS][WIDTH / 2], u32 memory) const {
        const u32 lane = threadIdx.x % 32, first = threadIdx.x / 32 % 4 * 16, lines = memory + first * 128;
#pragma unroll
        for (u32 i = 0; i < A_BLOCKS; i++)
#pragma unroll
            for (u32 c = 0; c < WIDTH; c += 64) {
#pragma unroll
                for (u32 n = 0; n < 8; n += 2) {
                    const u32 at = (c / 8 + n) * 2;
                    const u32 pairs[4] = {pair_at(sum[i], at), pair_at(sum[i], at + 1), pair_at(sum[i], at + 2), pair_at(sum[i], at + 3)};
                    store_matrices(lines + lane % 16 * 128 + ((n + lane / 16) ^ lane % 8) * 16, pairs);
                }
                __syncwarp();
#pragma unroll
                for (u32 j = 0; j < 4; j++) {
                    const u32 r = j * 4 + lane / 8;
                    store_piece(job, job.first_a + i * 64 + first + r, job.first_b + c + lane % 8 * 8, lines + r * 128 + (lane % 8 ^ r % 8) * 16);
                }
                __syncwarp();
            }
    }

    // As `store_columns`, 32 rows of the warpgroup at a time in lines of TILE_M columns.
    __device__ __forceinline__ void store_column_pieces(const Job& job, const f32 (&sum)[A_BLOCKS][WIDTH / 2], u32 lines) const {
        const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, pieces = TILE_M / 8;
#pragma unroll
        for (u32 c = 0; c < WIDTH; c += 32) {
#pragma unroll
            for (u32 i = 0; i < A_BLOCKS; i++)
#pragma unroll
                for (u32 n = 0; n < 4; n += 2) {
                    const u32 at = (c / 8 + n) * 2, row = (n + lane / 16) * 8 + lane % 8, piece = i * 8 + warp * 2 + lane / 8 % 2;
                    const u32 pairs[4] = {pair_at(sum[i], at), pair_at(sum[i], at + 1), pair_at(sum[i], at + 2), pair_at(sum[i], at + 3)};
                    store_transposed(lines + (row * pieces + (piece ^ row % 8)) * 16, pairs);
                }
            wait_threads<128>(1 + group);
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                const u32 row = j * 8 + warp * 2 + lane / pieces, piece = lane % pieces;
                store_piece(job, job.first_b + c + row, job.first_a + piece * 8, lines + (row * pieces + (piece ^ row % 8)) * 16);
            }
            wait_threads<128>(1 + group);
        }
    }

    __device__ __forceinline__ void multiply_tiles(const Jobs& jobs, f32* memory) const {
        const bool pieces = p.grouped.neighbours && !p.accumulate && p.grouped.out.dtype == dtype_of(W_T());
        Place at = {0, 0};
        Job job;
        job.expert = 0;
        for (bool any = jobs.find(blockIdx.x / CLUSTER, job); any; any = jobs.find(job.item + gridDim.x / CLUSTER, job)) {
            f32 sum[A_BLOCKS][WIDTH / 2];
            job.first_b += group * WIDTH;
            const u32 last = multiply_tile(job, at, sum);
            finish_tile(job, last, sum);
            if (job.rows == 0) {
                // an expert without rows: zeros, or nothing to add
                if (p.accumulate) continue;
#pragma unroll
                for (u32 i = 0; i < A_BLOCKS * WIDTH / 2; i++) sum[i / (WIDTH / 2)][i % (WIDTH / 2)] = 0.0f;
            }
            if (pieces) {
                if (A_IS_X) store_column_pieces(job, sum, shared_address(memory));
                else store_row_pieces(job, sum, shared_address(memory));
            } else if (A_IS_X) {
                store_columns(job, sum, memory);
            } else {
                store_rows(job, sum, memory);
            }
        }
    }
};

__device__ __forceinline__ void grouped_backward_wgmma(const MatricesWgmmaParams& q, u8* memory) {
    u8* sums = memory + STAGES * STAGE_BYTES;
    const u32 stages = shared_address(memory), barriers = shared_address(sums) + 2 * SUMS_BYTES;
    const Ring ring = {stages, barriers, barriers + STAGES * 8};
    const u32 group = threadIdx.x / 128;
    if (threadIdx.x == 0) {
        if (!GATHERED) prefetch_map(q.a);
        prefetch_map(q.b);
        for (u32 i = 0; i < STAGES; i++) {
            barrier_init(ring.full + i * 8, 128 + 1);
            barrier_init(ring.empty + i * 8, CLUSTER * 8);
        }
        fence_barriers();
    }
    const Jobs jobs(q.product, reinterpret_cast<u32*>(sums + 2 * SUMS_BYTES + STAGES * 16));
    // the other block's barriers are there
    if (CLUSTER == 2) wait_cluster();
    if (group == 0) {
        fewer_registers<PRODUCER_REGISTERS>();
        const Producer producer = {q, jobs, ring};
        producer.copy_tiles();
    } else {
        more_registers<CONSUMER_REGISTERS>();
        const Consumer consumer = {q.product, ring, group - 1};
        consumer.multiply_tiles(jobs, reinterpret_cast<f32*>(sums + (group - 1) * SUMS_BYTES));
    }
    if (CLUSTER == 2) {
        // neither may end while the other still writes to its memory
        __syncwarp();
        wait_cluster();
    }
}
