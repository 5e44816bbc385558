// Two warpgroups share each tile, half of its rows each, so that a step of its products asks the least of shared memory. Outputs
// wait in registers, two in a word, and leave behind the first products of the next tile.

struct Consumer : Sums {
    // The outputs of a tile on their way.
    struct Outputs {
        u32 words[CHUNKS][16];
        u64 first_row, first;
        u32 present;
    };

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
    __device__ __forceinline__ void finish(const Part& tile, const Rows& rows, const f32 (&sum)[TILE_N / 2], Outputs& out) const {
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

    __device__ __forceinline__ void multiply_tiles(const Tiles& tiles, u32 steps, u32 memory) const {
        Place at = {0, 0};
        Part tile = Tiles::none(), next;
        bool any = tiles.find(items.of(0), tile);
        Outputs out;
        out.present = 0;
        for (u32 turn = 1; any; turn++) {
            next = tile;
            if (tile.rows > group * GROUP_ROWS) {
                f32 sum[TILE_N / 2];
                u32 last = at.stage;
                hold(sum);
                multiply_and_store<0>(at, steps, last, sum, out, memory);
#pragma unroll 1
                for (u32 step = CHUNKS; step < steps; step++) multiply_step(at, step, last, sum);
                // behind the last products
                const Rows rows = rows_in(tile);
                any = tiles.find(items.of(turn), next);
                wait_products<0>();
                hold(sum);
                free_stage(last);
                finish(tile, rows, sum, out);
            } else {
                store(out, memory);
                out.present = 0;
                pass(at, steps);
                any = tiles.find(items.of(turn), next);
            }
            tile = next;
        }
        store(out, memory);
    }
};
