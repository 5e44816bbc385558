// The grouped product on warpgroup tensor cores: x and weights of one 2-byte format W_T, rows of both in 16-byte pieces,
// experts in one stack.
//
//   one warpgroup, for the block's tiles of TILE_M rows and TILE_N weight rows:
//     for each 64 columns: rows of x (gathered by asynchronous copies, else by the copy engine) and weight rows (by the copy
//                          engine: gate rows, then up rows) into the next free of STAGES stages
//   two warpgroups (`wgmma_shared.cuh` if SHARED, else `wgmma_turns.cuh`):
//     wait for stages, multiply, free them; sums of gate and up of an output meet in one thread;
//     epilogue from registers, if PIECES through shared memory, so that pieces of 16 bytes are stored
//
// TRANSPOSED: sums run over the weights' rows, x . W in place of x . W^T, so that a tile has TILE_N of their columns: for each
// 64 rows a box for each 64 columns. What is beyond a matrix is zero, the next expert's too.
//
// With CLUSTER 2 the blocks are pairs, which have neighbouring rows of an expert and the same weight rows: each brings half of
// the weight rows to both, and a stage is free when both have read it. An expert's last rows, where one block has room for all
// of them, are both blocks', with the weight rows of two neighbouring tiles, one each.
//
// Blocks of 64 rows that are empty are not multiplied, and rows that are not there neither read nor stored.
#define STEP 64
#define THREADS 384
#if CLUSTER == 2
#define IN_CLUSTERS __cluster_dims__(2, 1, 1)
#else
#define IN_CLUSTERS
#endif
#define TILE_OUTPUTS (GATED ? TILE_N / 2 : TILE_N)
#define X_BYTES (TILE_M * STEP * 2)
#define BLOCK_BYTES (64 * STEP * 2)
#define STAGE_BYTES ((TILE_M + TILE_N) * STEP * 2)
// Rows of an expert that are dealt out at once, and those of a warpgroup.
#define DEALT_ROWS (CLUSTER * TILE_M)
#define GROUP_ROWS (SHARED ? TILE_M / 2 : TILE_M)
#define ROW_BLOCKS (GROUP_ROWS / 64)
#define COPIES (TILE_M / 16)
// Both of gate and up are stored where neither is an input of the activation.
#define HALVES_STORED (GATED && !ACTIVATE ? 2 : 1)
#define TILE_COLUMNS ((TILE_OUTPUTS + 63) / 64 * 64)
// Of 64 columns, which are stored together.
#define CHUNKS (HALVES_STORED * TILE_COLUMNS / 64)
// A thread's sums and, if SHARED, the outputs of the tile before, two in a word. What they leave of the registers is shared out:
// 384 threads begin with 168.
#define MANY_SUMS (ROW_BLOCKS * TILE_N / 2 + (SHARED ? CHUNKS * 16 : 0) > 160)
#define CONSUMER_REGISTERS (MANY_SUMS ? 232 : 208)
#define PRODUCER_REGISTERS (MANY_SUMS ? 40 : 88)
// 16 rows of 128 bytes a warp
#define STORE_BYTES 2048

// A tile of the block's. `apart`: the pair's rows are the same, its weight rows are not.
struct Part : Tile {
    bool apart;
};

// Which tile is whose, in shared memory: tiles are found without a look at global memory.
struct Tiles {
    // [E + 1]: items of the experts before, and where their rows begin
    u32 *first_item, *first_row;
    u32 columns, items;

    __device__ __forceinline__ void make(const GroupedParams& p, u32* memory) {
        first_item = memory, first_row = memory + p.experts + 1;
        columns = (u32)((p.outputs + TILE_OUTPUTS - 1) / TILE_OUTPUTS);
        find_first_rows<THREADS>(p, first_row);
        __syncthreads();
        for (u32 e = threadIdx.x; e < p.experts; e += THREADS) {
            const u32 rows = rows_of_expert(e);
            first_item[e] = wholes_in(rows) * columns + (has_apart(rows) ? (columns + 1) / 2 : 0);
        }
        items = add_up(first_item, p.experts);
    }

    // Before the first tile.
    __device__ __forceinline__ static Part none() {
        Part tile;
        tile.item = 0, tile.expert = 0;
        return tile;
    }

    __device__ __forceinline__ u32 rows_of_expert(u32 e) const {
        return first_row[e + 1] > first_row[e] ? first_row[e + 1] - first_row[e] : 0;
    }
    // Tiles of neighbouring rows, and whether there are rows left.
    __device__ __forceinline__ static u32 wholes_in(u32 rows) { return (rows + TILE_M - 1) / TILE_M / CLUSTER; }
    __device__ __forceinline__ static bool has_apart(u32 rows) { return (rows + TILE_M - 1) / TILE_M % CLUSTER != 0; }

    // The tile of `item`, which is not before `tile`'s, or the block's part of it; false when there is none.
    __device__ __forceinline__ bool find(u64 item, Part& tile) const {
        if (item >= items) return false;
        tile.item = item;
        u32 e = tile.expert;
        while (first_item[e + 1] <= item) e++;
        tile.expert = e;
        const u32 local = (u32)item - first_item[e], rows = rows_of_expert(e), wholes = wholes_in(rows);
        u32 whole;
        tile.apart = false;
        if (has_apart(rows)) {
            // two columns after two columns: their whole tiles, then the last one of both
            const u32 pair = local / (2 * wholes + 1), in_pair = local - pair * (2 * wholes + 1);
            const u32 shared = columns - 2 * pair < 2 ? wholes : 2 * wholes, odd = in_pair >= wholes ? 1 : 0;
            tile.apart = in_pair == shared;
            tile.column = 2 * pair + (tile.apart ? 0 : odd), whole = tile.apart ? wholes : in_pair - odd * wholes;
        } else {
            tile.column = local / wholes, whole = local - tile.column * wholes;
        }
        const u32 begin = whole * DEALT_ROWS, left = rows - begin;
        tile.first_row = first_row[e] + begin;
        tile.rows = left < DEALT_ROWS ? left : DEALT_ROWS;
        if (tile.apart) {
            tile.column += blockIdx.x % 2;
            if (tile.column >= columns) tile.rows = 0;
        } else if (CLUSTER == 2) {
            // half of its blocks of 64 rows each, the first block of the pair the odd one
            const u32 half = (tile.rows + 127) / 128 * 64, first = tile.rows < half ? tile.rows : half;
            if (blockIdx.x % 2 == 0) tile.rows = first;
            else tile.first_row += first, tile.rows -= first;
        }
        return true;
    }
};

// The items of a block, in turn. The first two are its share. Where tiles are shared and there is a counter, pairs take the others
// as they are counted, so that, whatever a tile takes, those that run together are neighbours: what these share is read from
// memory once.
struct Items {
    // more than the tiles from the first to the last that anybody works on
    static constexpr u32 SLOTS = 16;
    // [SLOTS] items, and barriers that tell that they are there
    u32 words, barriers;
    u64 counter;

    // By one thread, before the cluster meets.
    __device__ __forceinline__ void make() const {
        for (u32 i = 0; i < SLOTS; i++) {
            barrier_init(barriers + i * 8, 1);
            barrier_expect(barriers + i * 8, 4);
        }
    }

    __device__ __forceinline__ bool is_share(u32 turn) const { return !SHARED || turn < 2 || counter == 0; }

    __device__ __forceinline__ u32 of(u32 turn) const {
        if (is_share(turn)) return blockIdx.x / CLUSTER + turn * (gridDim.x / CLUSTER);
        const u32 slot = (turn - 2) % SLOTS;
        barrier_wait(barriers + slot * 8, (turn - 2) / SLOTS % 2);
        u32 item;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(item) : "r"(words + slot * 4) : "memory");
        return item;
    }

    // By a thread of each block that has seen the item of this turn: its slot is free for another.
    __device__ __forceinline__ void free(u32 turn) const {
        if (!is_share(turn)) barrier_expect(barriers + (turn - 2) % SLOTS * 8, 4);
    }

    // By one thread of the pair.
    __device__ __forceinline__ u32 count() const { return 2 * (gridDim.x / CLUSTER) + atomicAdd(reinterpret_cast<u32*>(counter), 1); }
    __device__ __forceinline__ void send(u32 turn, u32 item) const {
        const u32 slot = (turn - 2) % SLOTS;
#pragma unroll
        for (u32 block = 0; block < CLUSTER; block++) send_word(address_in(words + slot * 4, block), address_in(barriers + slot * 8, block), item);
    }
};

struct Producer {
    const WgmmaParams& q;
    const Tiles& tiles;
    const Items items;
    const Ring ring;
    // [2][TILE_M]: where the rows of this tile and of the next begin in x, in pieces of 16 bytes
    u32* begins;

    __device__ __forceinline__ void copy_tiles(u32 steps) const {
        Part tile = Tiles::none(), next;
        Place at = {0, 1};
        bool any = tiles.find(items.of(0), tile);
        u32 buffer = 0;
        if (GATHER && any) put_begins(tile, buffer, slot_in(tile));
        const bool first = !GATHER || threadIdx.x == 0, counts = SHARED && first && items.counter && blockIdx.x % CLUSTER == 0;
        for (u32 turn = 0; any; turn++) {
            next = tile;
            any = tiles.find(items.of(turn + 1), next);
            if (first) items.free(turn + 1);
            // asked for a tile ahead; whoever is told of it waits for it
            const bool more = counts && any;
            const u32 counted = more ? items.count() : 0;
            if (GATHER) {
                const u32 slot = any ? slot_in(next) : NO_ROW;
                if (tile.rows == TILE_M) gather_tile<true>(tile, at, steps, buffer);
                else gather_tile<false>(tile, at, steps, buffer);
                buffer ^= TILE_M;
                if (any) put_begins(next, buffer, slot);
            } else {
                copy_tile(tile, at, steps);
            }
            if (more) items.send(turn + 2, counted);
            tile = next;
        }
    }

    // The slot of the thread's row of a tile.
    __device__ __forceinline__ u32 slot_in(const Part& tile) const {
        return threadIdx.x < tile.rows ? slot_of(q.product, tile.first_row + threadIdx.x) : NO_ROW;
    }

    __device__ __forceinline__ void put_begins(const Part& tile, u32 buffer, u32 slot) const {
        const GroupedParams& p = q.product;
        if (threadIdx.x < TILE_M) begins[buffer + threadIdx.x] = slot == NO_ROW ? 0 : slot / p.top_k * (u32)(p.x.stride / 8);
        wait_threads<128>(3);
    }

    // The tile's first weight row; past the stack, whence zeros come, where the expert is elsewhere.
    __device__ __forceinline__ u32 weight_row(const Part& tile) const {
        const GroupedParams& p = q.product;
        const u32 place = tile.expert - p.first, rows = (u32)(GATED ? 2 * p.outputs : p.outputs);
        return place < p.here ? place * rows + tile.column * TILE_OUTPUTS : p.here * rows;
    }

    // Of a tile whose first weight row is `row`, the weights of the products from `column` on.
    __device__ __forceinline__ void copy_weights(const Part& tile, u32 row, u32 column, u32 stage, u32 full) const {
        const u32 upper = GATED ? (u32)q.product.outputs : TILE_N / 2, half = TILE_N / 2 * STEP * 2;
        if (TRANSPOSED) {
            // of what is for both blocks, each brings its half
            const bool both = CLUSTER == 2 && !tile.apart;
#pragma unroll
            for (u32 c = 0; c < TILE_N; c += 64) {
                const u32 to = stage + X_BYTES + c * STEP * 2, from = tile.column * TILE_N + c;
                if (!both) copy_box(to, q.weights, full, from, column, tile.expert);
                else if (c / (TILE_N / 2) == blockIdx.x % 2) copy_box_to_both(to, q.weights, full, from, column, tile.expert);
            }
        } else if (CLUSTER == 2 && !tile.apart) {
            const u32 own = blockIdx.x % 2;
            copy_box_to_both(stage + X_BYTES + own * half, q.weights, full, column, row + own * upper);
        } else {
            copy_box(stage + X_BYTES, q.weights, full, column, row);
            copy_box(stage + X_BYTES + half, q.weights, full, column, row + upper);
        }
    }

    __device__ __forceinline__ void copy_tile(const Part& tile, Place& at, u32 steps) const {
        const u32 row = weight_row(tile), blocks = (tile.rows + 63) / 64;
        for (u32 step = 0; step < steps; step++, at.next()) {
            const u32 stage = ring.stages + at.stage * STAGE_BYTES, full = ring.full + at.stage * 8;
            barrier_wait(ring.empty + at.stage * 8, at.parity);
            barrier_expect(full, TILE_N * STEP * 2 + blocks * BLOCK_BYTES);
            copy_weights(tile, row, step * STEP, stage, full);
#pragma unroll
            for (u32 b = 0; b < TILE_M / 64; b++)
                if (b < blocks) copy_box(stage + b * BLOCK_BYTES, q.x, full, step * STEP, tile.first_row + b * 64);
        }
    }

    template <bool FULL> __device__ __forceinline__ void gather_tile(const Part& tile, Place& at, u32 steps, u32 buffer) const {
        const GroupedParams& p = q.product;
        const u32 row = weight_row(tile), r = threadIdx.x / 8, piece = threadIdx.x % 8, inner = (u32)p.inner;
        const u8* from[COPIES];
#pragma unroll
        for (u32 i = 0; i < COPIES; i++) from[i] = reinterpret_cast<const u8*>(p.x.data) + ((u64)begins[buffer + r + i * 16] + piece) * 16;
        const u32 to = ring.stages + (r * 8 + (piece ^ r % 8)) * 16;
        const bool first = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0) == 0;
        u32 column = piece * 8;
#pragma unroll 1
        for (u32 step = 0; step < steps; step++, at.next(), column += STEP) {
            const u32 stage = at.stage * STAGE_BYTES, full = ring.full + at.stage * 8;
            barrier_wait(ring.empty + at.stage * 8, at.parity);
            if (first && elected()) {
                barrier_expect(full, TILE_N * STEP * 2);
                copy_weights(tile, row, step * STEP, ring.stages + stage, full);
            }
            const bool within = column < inner;
#pragma unroll
            for (u32 i = 0; i < COPIES; i++) {
                if (FULL || r + i * 16 < tile.rows) copy_async(to + stage + i * 2048, from[i], within);
                from[i] += STEP * 2;
            }
            barrier_arrive_copies(full);
        }
    }
};

// What a warpgroup does with sums.
struct Sums {
    const GroupedParams& p;
    const f32 scale;
    const Ring ring;
    const Items items;
    // of two
    const u32 group;

    // The warp has read a stage.
    __device__ __forceinline__ void free_stage(u32 stage) const {
        const u32 lane = threadIdx.x % 32;
        if (CLUSTER == 1 && lane == 0) barrier_arrive(ring.empty + stage * 8);
        if (CLUSTER == 2 && lane < 2) barrier_arrive_there(address_in(ring.empty + stage * 8, lane));
    }

    // A tile without rows of the warpgroup.
    __device__ __forceinline__ void pass(Place& at, u32 steps) const {
        pass_stages(ring, at, steps, [this](u32 stage) { free_stage(stage); });
    }

    // Which of the warp's 16 rows of each block are stored, a bit each, and the factors of the thread's two.
    struct Rows {
        u32 present[ROW_BLOCKS];
        f32 weight[ROW_BLOCKS][2];
    };

    // The warp's rows of a block, in the tile.
    __device__ __forceinline__ u32 first_row_of(u32 b) const { return (SHARED ? group * GROUP_ROWS : 0) + b * 64 + threadIdx.x / 32 % 4 * 16; }

    __device__ __forceinline__ Rows rows_in(const Part& tile) const {
        Rows rows;
        const u32 lane = threadIdx.x % 32;
        const bool here = expert_at<W_T>(p, tile.expert).matrix != 0;
#pragma unroll
        for (u32 b = 0; b < ROW_BLOCKS; b++) {
            const u32 row = first_row_of(b) + lane % 16;
            const u32 slot = here && row < tile.rows ? slot_of(p, tile.first_row + row) : NO_ROW;
            rows.present[b] = __ballot_sync(0xffffffffu, slot != NO_ROW) & 0xffff;
            const f32 own = slot == NO_ROW ? 1.0f : scale * input_weight(p, slot);
            rows.weight[b][0] = __shfl_sync(0xffffffffu, own, lane / 4);
            rows.weight[b][1] = __shfl_sync(0xffffffffu, own, lane / 4 + 8);
        }
        return rows;
    }

    // The outputs of 8 columns (without activation those of gate if not of `upper`), from the sums of a block: two of the
    // thread's first row, two of its second.
    __device__ __forceinline__ void outputs_of(const f32 (&sum)[TILE_N / 2], bool upper, u32 n, u64 bias, u64 i,
                                               const f32 (&weight)[2], f32 (&out)[4]) const {
        f32 gate_bias[2] = {}, up_bias[2] = {};
        if (BIAS && i < p.outputs) {
            if (GATED) load<2>(reinterpret_cast<const BIAS_T*>(bias) + i, gate_bias);
            load<2>(reinterpret_cast<const BIAS_T*>(bias) + (GATED ? p.outputs : 0) + i, up_bias);
        }
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            const f32 gate = GATED ? fmaf(weight[j / 2], sum[n * 4 + j], gate_bias[j % 2]) : 0.0f;
            const f32 up = fmaf(weight[j / 2], sum[(GATED ? TILE_N / 4 : 0) + n * 4 + j], up_bias[j % 2]);
            out[j] = ACTIVATE ? activate<FORM, FUNCTION>(gate, up, p.limit, p.alpha) : upper ? up : gate;
        }
    }

    // A chunk's outputs of 16 rows of a warp: of each 8 columns a word of the thread's first row and one of its second.
    __device__ __forceinline__ void pack(const f32 (&sum)[TILE_N / 2], u32 chunk, u64 bias, u64 first, const f32 (&weight)[2],
                                         u32 (&words)[16]) const {
        const u32 half = chunk * 64 / TILE_COLUMNS, begin = chunk * 64 % TILE_COLUMNS;
#pragma unroll
        for (u32 n = 0; n < 8 && begin + n * 8 < TILE_OUTPUTS; n++) {
            f32 out[4];
            outputs_of(sum, half + 1 == HALVES_STORED, begin / 8 + n, bias, first + begin + n * 8 + threadIdx.x % 4 * 2, weight, out);
            words[n * 2] = pair_of(W_T(), out[0], out[1]), words[n * 2 + 1] = pair_of(W_T(), out[2], out[3]);
        }
    }

    // They leave through the warp's shared memory, as pieces of 16 bytes. `present`: a bit a row.
    __device__ __forceinline__ void store_chunk(const u32 (&words)[16], u32 chunk, u64 first_row, u32 present, u64 first,
                                                u32 memory) const {
        const u32 lane = threadIdx.x % 32, row = lane % 16, piece = lane % 8;
        const u32 half = chunk * 64 / TILE_COLUMNS, begin = chunk * 64 % TILE_COLUMNS;
#pragma unroll
        for (u32 n = 0; n < 8 && begin + n * 8 < TILE_OUTPUTS; n += 2) {
            // of an odd number of columns by 8 the last ones are taken twice
            const u32 l = n * 2, r = begin + n * 8 + 8 < TILE_OUTPUTS ? l + 2 : l;
            const u32 pairs[4] = {words[l], words[l + 1], words[r], words[r + 1]};
            store_matrices(memory + row * 128 + ((n + lane / 16) ^ row % 8) * 16, pairs);
        }
        __syncwarp();
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 r = i * 4 + lane / 8;
            const u64 column = first + begin + piece * 8;
            const bool inside = begin + piece * 8 < TILE_OUTPUTS && column < p.outputs && (present >> r & 1);
            const uint4 v = load_shared(memory + r * 128 + (piece ^ r % 8) * 16);
            if (inside) store_global(row_of<u16>(p.out, first_row + r) + half * p.outputs + column, v);
        }
        __syncwarp();
    }

    // 16 rows of a warp, each thread its own outputs.
    __device__ __forceinline__ void store_sums(const f32 (&sum)[TILE_N / 2], u64 bias, const f32 (&weight)[2], u64 first_row, u32 present,
                                               u64 first) const {
        const u32 lane = threadIdx.x % 32;
#pragma unroll
        for (u32 n = 0; n < TILE_OUTPUTS / 8; n++)
#pragma unroll
            for (u32 h = 0; h < 2; h++) {
                const u32 at = (GATED ? TILE_N / 4 : 0) + n * 4 + h * 2;
                const f32 gate[2] = {sum[n * 4 + h * 2], sum[n * 4 + h * 2 + 1]}, up[2] = {sum[at], sum[at + 1]};
                if (present >> (lane / 4 + h * 8) & 1)
                    store_outputs<2>(p, bias, weight[h], first_row + lane / 4 + h * 8, first + n * 8 + lane % 4 * 2, gate, up);
            }
    }
};

template <class Consumer> __device__ __forceinline__ void grouped_wgmma(const WgmmaParams& q, u8* memory) {
    const GroupedParams& p = q.product;
    const u32 stages = shared_address(memory), store = stages + STAGES * STAGE_BYTES, barriers = store + 8 * STORE_BYTES;
    const Ring ring = {stages, barriers, barriers + STAGES * 8};
    const Items items = {barriers + STAGES * 16 + Items::SLOTS * 8, barriers + STAGES * 16, p.counter};
    const u32 group = threadIdx.x / 128;
    if (threadIdx.x == 0) {
        prefetch_map(q.weights);
        if (!GATHER) prefetch_map(q.x);
        for (u32 i = 0; i < STAGES; i++) {
            barrier_init(ring.full + i * 8, GATHER ? 128 + 1 : 1);
            barrier_init(ring.empty + i * 8, CLUSTER * (SHARED ? 8 : 4));
        }
        if (SHARED) items.make();
        fence_barriers();
    }
    u32* begins = reinterpret_cast<u32*>(memory + STAGES * STAGE_BYTES + 8 * STORE_BYTES + STAGES * 16 + Items::SLOTS * 12);
    Tiles tiles;
    tiles.make(p, begins + (GATHER ? 2 * TILE_M : 0));
    const u32 steps = (u32)((p.inner + STEP - 1) / STEP);
    // the other block's barriers are there
    if (CLUSTER == 2) wait_cluster();
    if (group == 0) {
        fewer_registers<PRODUCER_REGISTERS>();
        const Producer producer = {q, tiles, items, ring, begins};
        if (GATHER || (__shfl_sync(0xffffffffu, threadIdx.x / 32, 0) == 0 && elected())) producer.copy_tiles(steps);
    } else {
        more_registers<CONSUMER_REGISTERS>();
        const Consumer consumer = {{p, q.scale, ring, items, group - 1}};
        consumer.multiply_tiles(tiles, steps, store + (threadIdx.x / 32 - 4) * STORE_BYTES);
    }
    if (CLUSTER == 2) {
        // neither may end while the other still writes to its memory
        __syncwarp();
        wait_cluster();
    }
}
