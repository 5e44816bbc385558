// Two warpgroups share each tile, half of its rows each, so that a step of its products asks the least of shared memory. Outputs
// wait in registers, two in a word, and leave behind the first products of the next tile.

struct Consumer : Sums {
    // The outputs of a tile on their way.
    struct Outputs {
        u32 words[CHUNKS][16];
        u64 first_row, first;
        u32 present;
    };

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

    __device__ __forceinline__ void multiply_step(Place& at, u32 step, u32& last, f32 (&sum)[TILE_N / 2]) const {
        const u32 stage = ring.stages + at.stage * STAGE_BYTES;
        const u64 x = operand_at(stage + group * GROUP_ROWS * (STEP * 2));
        const u64 w = TRANSPOSED ? transposed_at(stage + X_BYTES) : operand_at(stage + X_BYTES);
        barrier_wait(ring.full + at.stage * 8, at.parity);
        if (GATHER) fence_async();
        begin_products();
#pragma unroll
        for (u32 k = 0; k < STEP / 16; k++) multiply<TRANSPOSED>(W_T(), sum, x + k * 2, w + k * (TRANSPOSED ? 128 : 2), step | k);
        commit_products();
        wait_products<1>();
        if (step > 0) free_stage(last);
        last = at.stage;
        at.next();
    }

    // The first products of a tile, a step for each chunk of the outputs before.
    template <u32 CHUNK>
    __device__ __forceinline__ void multiply_and_store(Place& at, u32 steps, u32& last, f32 (&sum)[TILE_N / 2], const Outputs& out,
                                                       u32 memory) const {
        if constexpr (CHUNK < CHUNKS) {
            if (CHUNK < steps) multiply_step(at, CHUNK, last, sum);
            if (PIECES && out.present) store_chunk(out.words[CHUNK], CHUNK, out.first_row, out.present, out.first, memory);
            multiply_and_store<CHUNK + 1>(at, steps, last, sum, out, memory);
        }
    }

    __device__ __forceinline__ void store(const Outputs& out, u32 memory) const {
        if (!PIECES || out.present == 0) return;
#pragma unroll
        for (u32 chunk = 0; chunk < CHUNKS; chunk++) store_chunk(out.words[chunk], chunk, out.first_row, out.present, out.first, memory);
    }

    // The outputs of a tile; they are stored at once where there are no pieces.
    __device__ __forceinline__ void finish(const Tile& tile, const Rows& rows, const f32 (&sum)[TILE_N / 2], Outputs& out) const {
        const u64 bias = expert_at<W_T>(p, tile.expert).bias;
        out.present = rows.present[0], out.first = (u64)tile.column * TILE_OUTPUTS, out.first_row = tile.first_row + first_row_of(0);
        if (out.present == 0) return;
        if (!PIECES) {
            store_sums(sum, bias, rows.weight[0], out.first_row, out.present, out.first);
            return;
        }
#pragma unroll
        for (u32 chunk = 0; chunk < CHUNKS; chunk++) pack(sum, chunk, bias, out.first, rows.weight[0], out.words[chunk]);
    }

    // A tile without rows of the warpgroup.
    __device__ __forceinline__ void skip_tile(Place& at, u32 steps) const {
#pragma unroll 1
        for (u32 step = 0; step < steps; step++, at.next()) {
            barrier_wait(ring.full + at.stage * 8, at.parity);
            free_stage(at.stage);
        }
    }

    __device__ __forceinline__ void multiply_tiles(const Tiles& tiles, u32 steps, u32 memory) const {
        Place at = {0, 0};
        Tile tile = Tiles::none(), next;
        const u64 apart = gridDim.x / CLUSTER;
        bool any = tiles.find(blockIdx.x / CLUSTER, tile);
        Outputs out;
        out.present = 0;
        while (any) {
            next = tile;
            if (tile.rows > group * GROUP_ROWS) {
                f32 sum[TILE_N / 2];
                u32 last = NOTHING;
                hold(sum);
                multiply_and_store<0>(at, steps, last, sum, out, memory);
#pragma unroll 1
                for (u32 step = CHUNKS; step < steps; step++) multiply_step(at, step, last, sum);
                // behind the last products
                const Rows rows = rows_in(tile);
                any = tiles.find(tile.item + apart, next);
                wait_products<0>();
                hold(sum);
                if (last != NOTHING) free_stage(last);
                finish(tile, rows, sum, out);
            } else {
                store(out, memory);
                out.present = 0;
                skip_tile(at, steps);
                any = tiles.find(tile.item + apart, next);
            }
            tile = next;
        }
        store(out, memory);
    }
};
