// The grouped product on warpgroup tensor cores with weights as the left side, so that a tile costs what its rows do: x and
// weights of one 2-byte format W_T, rows of both in 16-byte pieces, experts in one stack, outputs in 16-byte pieces.
//
//   rows of an expert are cut evenly into the fewest tiles of at most TILE_M rows; a tile has TILE_N weight rows, or half of
//   them where there are no more
//   one warpgroup, for the block's tiles:
//     for each 64 columns: weight rows (by the copy engine: half of them gate, half up rows) and rows of x (gathered by
//                          asynchronous copies, else by the copy engine) into the next free of STAGES stages
//   two warpgroups, half of the tile's weight rows each:
//     wait for stages, multiply two blocks of 64 weight rows by as many sixteens of rows as there are, free them;
//     epilogue from registers: the engine lays weight rows so that a thread has neighbouring outputs of a row, two of gate
//     and up or four of neither
//
// Rows that are not there are columns of the product: they are not stored, so whatever lies there may be multiplied. Weight
// rows beyond a matrix are zeros that are not read.
#define STEP 64
#define THREADS 384
#define TILE_N 256
#define TILE_OUTPUTS (GATED ? TILE_N / 2 : TILE_N)
#define GROUP_OUTPUTS (TILE_OUTPUTS / 2)
#define BLOCK_BYTES (64 * STEP * 2)
#define W_BYTES (TILE_N * STEP * 2)
#define X_BYTES (TILE_M * STEP * 2)
#define STAGE_BYTES (W_BYTES + X_BYTES)
// Rows of x that the copy engine brings at once.
#define X_ROWS 32
#define COPIES (TILE_M / 16)
#define LANE_ROWS (TILE_M / 32)
#define CONSUMER_REGISTERS 224
#define PRODUCER_REGISTERS 56

// What `multiply` lacks: more numbers of rows.
#define NAMES_OF_16 NAMES_0
#define NAMES_OF_32 NAMES_OF_16 ", " NAMES_1
#define NAMES_OF_48 NAMES_OF_32 ", " NAMES_2
#define NAMES_OF_64 NAMES_OF_48 ", " NAMES_3
#define NAMES_OF_80 NAMES_OF_64 ", " NAMES_4
#define NAMES_OF_96 NAMES_OF_80 ", " NAMES_5
#define NAMES_OF_112 NAMES_OF_96 ", " NAMES_6
#define NAMES_OF_144 NAMES_OF_128 ", " NAMES_8
#define NAMES_OF_160 NAMES_OF_144 ", " NAMES_9
#define SUMS_OF_16 SUMS_8(0)
#define SUMS_OF_32 SUMS_OF_16, SUMS_8(8)
#define SUMS_OF_48 SUMS_OF_32, SUMS_8(16)
#define SUMS_OF_64 SUMS_32(0)
#define SUMS_OF_80 SUMS_OF_64, SUMS_8(32)
#define SUMS_OF_96 SUMS_OF_80, SUMS_8(40)
#define SUMS_OF_112 SUMS_OF_96, SUMS_8(48)
#define SUMS_OF_144 SUMS_OF_128, SUMS_8(64)
#define SUMS_OF_160 SUMS_OF_144, SUMS_8(72)
WARPGROUP_PRODUCTS(16, "%8", "%9", "%10", "%11")
WARPGROUP_PRODUCTS(32, "%16", "%17", "%18", "%19")
WARPGROUP_PRODUCTS(48, "%24", "%25", "%26", "%27")
WARPGROUP_PRODUCTS(64, "%32", "%33", "%34", "%35")
WARPGROUP_PRODUCTS(80, "%40", "%41", "%42", "%43")
WARPGROUP_PRODUCTS(96, "%48", "%49", "%50", "%51")
WARPGROUP_PRODUCTS(112, "%56", "%57", "%58", "%59")
WARPGROUP_PRODUCTS(144, "%72", "%73", "%74", "%75")
WARPGROUP_PRODUCTS(160, "%80", "%81", "%82", "%83")

// A box of a matrix whose rows come in groups, the neighbours of which lie apart.
__device__ __forceinline__ void copy_groups(u32 to, const TensorMap& map, u32 barrier, u32 column, u32 group, u32 matrix) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %4, %5, %6}], [%2];" ::"r"(to),
                 "l"(&map), "r"(barrier), "r"(column), "r"(0), "r"(group), "r"(matrix)
                 : "memory");
}

// Stores without a branch.
__device__ __forceinline__ void store_if(u32 condition, u16* to, u32 a) {
    asm volatile("{\n.reg .pred is;\nsetp.ne.b32 is, %0, 0;\n@is st.global.b32 [%1], %2;\n}\n" ::"r"(condition), "l"(to), "r"(a) : "memory");
}
__device__ __forceinline__ void store_if(u32 condition, u16* to, u32 a, u32 b) {
    asm volatile("{\n.reg .pred is;\nsetp.ne.b32 is, %0, 0;\n@is st.global.v2.b32 [%1], {%2, %3};\n}\n" ::"r"(condition), "l"(to), "r"(a), "r"(b)
                 : "memory");
}

// A tile, from an output on.
struct Part : Tile {
    u32 first_output;
    // Whether the second group of consumers has weight rows too.
    bool whole;
};

// The schedule with the experts' first rows beside it in shared memory: tiles are found without a look at global memory.
struct Tiles {
    Schedule schedule;
    u32* first_row;

    __device__ __forceinline__ void make(const GroupedParams& p, u32* memory) {
        first_row = memory + p.experts + 1;
        find_first_rows<THREADS>(p, first_row);
        schedule.make<THREADS, TILE_M>(p, memory, (p.outputs + TILE_OUTPUTS - 1) / TILE_OUTPUTS);
    }

    // The tile of `item`, which is not before `tile`'s; false when there is none.
    __device__ __forceinline__ bool find(const GroupedParams& p, u64 item, Part& tile) const {
        const u32* first_tile = schedule.first_tile;
        if (item >= schedule.items) return false;
        tile.item = item;
        u32 e = tile.expert;
        while ((u64)first_tile[e + 1] * schedule.columns <= item) e++;
        tile.expert = e;
        const u32 local = (u32)(item - (u64)first_tile[e] * schedule.columns), row_tiles = first_tile[e + 1] - first_tile[e];
        tile.column = local / row_tiles;
        tile.first_output = tile.column * TILE_OUTPUTS;
        tile.whole = tile.first_output + GROUP_OUTPUTS < p.outputs;
        const u32 rows = first_row[e + 1] - first_row[e];
        const u32 each = ((rows + row_tiles - 1) / row_tiles + 15) / 16 * 16, begin = (local - tile.column * row_tiles) * each;
        tile.first_row = first_row[e] + begin;
        tile.rows = rows - begin < each ? rows - begin : each;
        return true;
    }
};

struct Producer {
    const WgmmaParams& q;
    const Tiles& tiles;
    const Ring ring;

    // What the engine brings of a step.
    static __device__ __forceinline__ u32 tile_bytes(const Part& tile) {
        const u32 weights = tile.whole ? W_BYTES : W_BYTES / 2;
        return GATHER ? weights : weights + (tile.rows + X_ROWS - 1) / X_ROWS * (X_ROWS * STEP * 2);
    }

    // The weights of the products from `column` on.
    __device__ __forceinline__ void copy_weights(const Part& tile, u32 column, u32 stage, u32 full) const {
        const GroupedParams& p = q.product;
        const u32 place = tile.expert - p.first, expert = place < p.here ? place : p.here;
        if (GATED) {
            const u32 group = tile.first_output / 16;
            copy_groups(stage, q.weights, full, column, group, 2 * expert);
            copy_groups(stage + W_BYTES / 2, q.weights, full, column, group, 2 * expert + 1);
            if (tile.whole) {
                copy_groups(stage + BLOCK_BYTES, q.weights, full, column, group + 4, 2 * expert);
                copy_groups(stage + W_BYTES / 2 + BLOCK_BYTES, q.weights, full, column, group + 4, 2 * expert + 1);
            }
        } else {
            const u32 group = tile.first_output / 32;
            copy_groups(stage, q.weights, full, column, group, expert);
            if (tile.whole) copy_groups(stage + W_BYTES / 2, q.weights, full, column, group + 4, expert);
        }
    }

    __device__ __forceinline__ void copy_tiles(u32 steps) const {
        Part tile;
        tile.expert = 0;
        Place at = {0, 1};
        // steps whose weights are on their way before this launch's turn
        u32 ahead = 0;
        if (q.product.early) {
            if (tiles.find(q.product, blockIdx.x, tile))
                for (; ahead < STAGES && ahead < steps; ahead++) {
                    barrier_expect(ring.full + ahead * 8, tile_bytes(tile));
                    copy_weights(tile, ahead * STEP, ring.stages + ahead * STAGE_BYTES, ring.full + ahead * 8);
                }
            take_turn();
        }
        for (u64 item = blockIdx.x; tiles.find(q.product, item, tile); item += gridDim.x, ahead = 0) {
            const u32 boxes = (tile.rows + X_ROWS - 1) / X_ROWS;
#pragma unroll 1
            for (u32 step = 0; step < steps; step++, at.next()) {
                const u32 stage = ring.stages + at.stage * STAGE_BYTES, full = ring.full + at.stage * 8;
                if (step >= ahead) {
                    barrier_wait(ring.empty + at.stage * 8, at.parity);
                    barrier_expect(full, tile_bytes(tile));
                    copy_weights(tile, step * STEP, stage, full);
                }
#pragma unroll
                for (u32 b = 0; b < TILE_M / X_ROWS; b++)
                    if (b < boxes) copy_box(stage + W_BYTES + b * (X_ROWS * STEP * 2), q.x, full, step * STEP, tile.first_row + b * X_ROWS);
            }
        }
    }

    // The slots of the thread's rows of a tile.
    __device__ __forceinline__ void find_slots(const Part& tile, bool any, u32 (&slot)[COPIES]) const {
#pragma unroll
        for (u32 i = 0; i < COPIES; i++) {
            const u32 row = threadIdx.x / 8 + i * 16;
            slot[i] = any && row < tile.rows ? slot_of(q.product, tile.first_row + row) : NO_ROW;
        }
    }

    __device__ __forceinline__ void gather_tiles(u32 steps) const {
        const GroupedParams& p = q.product;
        Part tile, next;
        tile.expert = 0;
        Place at = {0, 1};
        u32 slot[COPIES];
        bool any = tiles.find(p, blockIdx.x, tile);
        find_slots(tile, any, slot);
        while (any) {
            // where the rows begin in x, in pieces of 16 bytes
            u32 begin[COPIES];
#pragma unroll
            for (u32 i = 0; i < COPIES; i++) begin[i] = (slot[i] == NO_ROW ? 0 : slot[i] / p.top_k * (u32)(p.x.stride / 8)) + threadIdx.x % 8;
            // asked for a tile ahead
            next.expert = tile.expert;
            any = tiles.find(p, tile.item + gridDim.x, next);
            find_slots(next, any, slot);
            gather_tile(tile, at, steps, begin);
            tile = next;
        }
    }

    __device__ __forceinline__ void gather_tile(const Part& tile, Place& at, u32 steps, const u32 (&begin)[COPIES]) const {
        const GroupedParams& p = q.product;
        const u32 r = threadIdx.x / 8, piece = threadIdx.x % 8, inner = (u32)p.inner;
        const u32 to = ring.stages + W_BYTES + (r * 8 + (piece ^ r % 8)) * 16;
        const bool first = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0) == 0;
        const u8* x = reinterpret_cast<const u8*>(p.x.data);
        u32 column = piece * 8;
#pragma unroll 1
        for (u32 step = 0; step < steps; step++, at.next(), column += STEP, x += STEP * 2) {
            const u32 stage = at.stage * STAGE_BYTES, full = ring.full + at.stage * 8;
            barrier_wait(ring.empty + at.stage * 8, at.parity);
            if (first && elected()) {
                barrier_expect(full, tile_bytes(tile));
                copy_weights(tile, step * STEP, ring.stages + stage, full);
            }
            const bool within = column < inner;
#pragma unroll
            for (u32 i = 0; i < COPIES; i++)
                if (r + i * 16 < tile.rows) copy_async(to + stage + i * 2048, x + (u64)begin[i] * 16, within);
            barrier_arrive_copies(full);
        }
    }
};

// 64 weight rows: eights that follow each other, or every other one.
__device__ __forceinline__ u64 weights_at(u32 address) { return GATED ? operand_at(address) : operand_at(address) + (64ull << 32); }

struct Consumer {
    const GroupedParams& p;
    const f32 scale;
    const Ring ring;
    // of two
    const u32 group;

    // The warp has read a stage.
    __device__ __forceinline__ void free_stage(u32 stage) const {
        if (threadIdx.x % 32 == 0) barrier_arrive(ring.empty + stage * 8);
    }

    // The products of N rows or, recursively, of as many more as there are.
    template <int N> __device__ __forceinline__ void multiply_rows(u32 rows, Place& at, u32 steps, f32 (&sum)[2][TILE_M / 2]) const {
        if (N < TILE_M && rows > N) {
            multiply_rows<(N < TILE_M ? N + 16 : N)>(rows, at, steps, sum);
            return;
        }
        // gate and up rows of the same outputs, else eights of rows in turn
        const u32 first = group * (GATED ? BLOCK_BYTES : 2 * BLOCK_BYTES), second = first + (GATED ? 2 * BLOCK_BYTES : 1024);
        u32 last = at.stage;
        f32(&left)[N / 2] = reinterpret_cast<f32(&)[N / 2]>(sum[0]), (&right)[N / 2] = reinterpret_cast<f32(&)[N / 2]>(sum[1]);
        hold(left);
        hold(right);
#pragma unroll 1
        for (u32 step = 0; step < steps; step++) {
            const u32 stage = ring.stages + at.stage * STAGE_BYTES;
            const u64 x = operand_at(stage + W_BYTES), w = weights_at(stage + first), v = weights_at(stage + second);
            barrier_wait(ring.full + at.stage * 8, at.parity);
            if (GATHER) fence_async();
            begin_products();
#pragma unroll
            for (u32 k = 0; k < STEP / 16; k++) {
                multiply<false>(W_T(), left, w + k * 2, x + k * 2, step | k);
                multiply<false>(W_T(), right, v + k * 2, x + k * 2, step | k);
            }
            commit_products();
            wait_products<1>();
            if (step > 0) free_stage(last);
            last = at.stage;
            at.next();
        }
        wait_products<0>();
        hold(left);
        hold(right);
        free_stage(last);
    }

    // Of the tile's rows, the lane's 32 apart: which are stored, a bit each, and the factors of the lane's own.
    struct Rows {
        u32 present[LANE_ROWS];
        f32 weight[LANE_ROWS];
    };

    __device__ __forceinline__ Rows rows_in(const Part& tile) const {
        Rows rows;
#pragma unroll
        for (u32 i = 0; i < LANE_ROWS; i++) {
            const u32 row = i * 32 + threadIdx.x % 32;
            const u32 slot = row < tile.rows ? slot_of(p, tile.first_row + row) : NO_ROW;
            rows.present[i] = __ballot_sync(0xffffffffu, slot != NO_ROW);
            rows.weight[i] = slot == NO_ROW ? 1.0f : scale * input_weight(p, slot);
        }
        return rows;
    }

    __device__ __forceinline__ void store_tile(const Part& tile, const Rows& rows, const f32 (&sum)[2][TILE_M / 2]) const {
        const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        const u32 first = tile.first_output + group * GROUP_OUTPUTS + warp * (GROUP_OUTPUTS / 4), own = first + lane / 4 * (GATED ? 2 : 4);
        if (first >= p.outputs) return;
        // of block b and row lane / 4 + 8 h of the warp
        f32 added[2][2] = {};
        if (BIAS) {
            const BIAS_T* bias = reinterpret_cast<const BIAS_T*>(expert_at<W_T>(p, tile.expert).bias);
#pragma unroll
            for (u32 b = 0; b < 2; b++)
#pragma unroll
                for (u32 h = 0; h < 2; h++) added[b][h] = to_f32(bias[own + (GATED ? b * p.outputs + h : 2 * h + b)]);
        }
        u16* to = row_of<u16>(p.out, tile.first_row + lane % 4 * 2) + own;
        const u64 row = p.out.stride;
        const u32 up = (u32)p.outputs;
#pragma unroll
        for (u32 n = 0; n < TILE_M / 8; n++, to += 8 * row) {
            // no branch but this one: a warp would wait at each for what it shuffles
            if (n % 2 == 0 && n * 8 >= tile.rows) break;
#pragma unroll
            for (u32 j = 0; j < 2; j++) {
                const u32 of = n % 4 * 8 + lane % 4 * 2 + j, present = rows.present[n / 4] >> of & 1;
                const f32 weight = __shfl_sync(0xffffffffu, rows.weight[n / 4], of);
                f32 out[2][2];
#pragma unroll
                for (u32 h = 0; h < 2; h++) {
                    const u32 at = n * 4 + h * 2 + j;
                    const f32 one = fmaf(weight, sum[0][at], added[0][h]), other = fmaf(weight, sum[1][at], added[1][h]);
                    out[0][h] = !ACTIVATE ? one : activate<FORM, FUNCTION>(GATED ? one : 0.0f, GATED ? other : one, p.limit, p.alpha);
                    out[1][h] = ACTIVATE && !GATED ? activate<FORM, FUNCTION>(0.0f, other, p.limit, p.alpha) : other;
                }
                u16* there = j == 0 ? to : to + row;
                if (GATED) {
                    store_if(present, there, pair_of(W_T(), out[0][0], out[0][1]));
                    if (!ACTIVATE) store_if(present, there + up, pair_of(W_T(), out[1][0], out[1][1]));
                } else {
                    store_if(present, there, pair_of(W_T(), out[0][0], out[1][0]), pair_of(W_T(), out[0][1], out[1][1]));
                }
            }
        }
    }

    __device__ __forceinline__ void multiply_tiles(const Tiles& tiles, u32 steps) const {
        Place at = {0, 0};
        Part tile;
        tile.expert = 0;
        for (u64 item = blockIdx.x; tiles.find(p, item, tile); item += gridDim.x) {
            const Rows rows = rows_in(tile);
            f32 sum[2][TILE_M / 2];
            if ((group == 0 || tile.whole) && expert_at<W_T>(p, tile.expert).matrix != 0) {
                multiply_rows<16>(tile.rows, at, steps, sum);
                store_tile(tile, rows, sum);
            } else {
                // nothing of the group's is there
                pass_stages(ring, at, steps, [this](u32 stage) { free_stage(stage); });
            }
        }
    }
};

__device__ __forceinline__ void grouped_swapped(const WgmmaParams& q, u8* memory) {
    const GroupedParams& p = q.product;
    const u32 stages = shared_address(memory), barriers = stages + STAGES * STAGE_BYTES;
    const Ring ring = {stages, barriers, barriers + STAGES * 8};
    const u32 group = threadIdx.x / 128;
    if (threadIdx.x == 0) {
        prefetch_map(q.weights);
        if (!GATHER) prefetch_map(q.x);
        for (u32 i = 0; i < STAGES; i++) {
            barrier_init(ring.full + i * 8, GATHER ? 128 + 1 : 1);
            barrier_init(ring.empty + i * 8, 8);
        }
        fence_barriers();
    }
    // of what is gathered nothing comes before this launch's turn
    if (GATHER || !p.early) take_turn();
    Tiles tiles;
    tiles.make(p, reinterpret_cast<u32*>(memory + STAGES * STAGE_BYTES + STAGES * 16));
    const u32 steps = (u32)((p.inner + STEP - 1) / STEP);
    if (group == 0) {
        fewer_registers<PRODUCER_REGISTERS>();
        const Producer producer = {q, tiles, ring};
        if (GATHER) producer.gather_tiles(steps);
        else if (__shfl_sync(0xffffffffu, threadIdx.x / 32, 0) == 0 && elected()) producer.copy_tiles(steps);
    } else {
        more_registers<CONSUMER_REGISTERS>();
        const Consumer consumer = {p, q.scale, ring, group - 1};
        consumer.multiply_tiles(tiles, steps);
    }
}
