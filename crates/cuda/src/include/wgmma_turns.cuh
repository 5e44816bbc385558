// Two warpgroups take turns, a tile each, so that the products of one run behind the epilogue of the other.

struct Consumer : Sums {
    // Begins the products of the tile's first N blocks of 64 rows; returns the stage that the last of them read.
    template <int N> __device__ __forceinline__ u32 multiply_blocks(Place& at, u32 steps, f32 (&sum)[ROW_BLOCKS][TILE_N / 2]) const {
        u32 last = at.stage;
#pragma unroll
        for (int b = 0; b < N; b++) hold(sum[b]);
#pragma unroll 1
        for (u32 step = 0; step < steps; step++) {
            const u32 stage = ring.stages + at.stage * STAGE_BYTES;
            const u64 x = operand_at(stage), w = TRANSPOSED ? transposed_at(stage + X_BYTES) : operand_at(stage + X_BYTES);
            barrier_wait(ring.full + at.stage * 8, at.parity);
            if (GATHER) fence_async();
            begin_products();
#pragma unroll
            for (u32 k = 0; k < STEP / 16; k++)
#pragma unroll
                for (int b = 0; b < N; b++) multiply<TRANSPOSED>(W_T(), sum[b], x + b * (BLOCK_BYTES / 16) + k * 2, w + k * (TRANSPOSED ? 128 : 2), step | k);
            commit_products();
            wait_products<1>();
            if (step > 0) free_stage(last);
            last = at.stage;
            at.next();
        }
        return last;
    }

    // 16 rows of a warp, 64 columns at a time.
    __device__ __forceinline__ void store_pieces(const f32 (&sum)[TILE_N / 2], u64 bias, const f32 (&weight)[2], u64 first_row, u32 present,
                                                 u64 first, u32 memory) const {
#pragma unroll
        for (u32 chunk = 0; chunk < CHUNKS; chunk++) {
            u32 words[16];
            pack(sum, chunk, bias, first, weight, words);
            store_chunk(words, chunk, first_row, present, first, memory);
        }
    }

    __device__ __forceinline__ void store_tile(const Part& tile, const Rows& rows, const f32 (&sum)[ROW_BLOCKS][TILE_N / 2],
                                               u32 memory) const {
        const u64 bias = expert_at<W_T>(p, tile.expert).bias, first = (u64)tile.column * TILE_OUTPUTS;
#pragma unroll
        for (u32 b = 0; b < ROW_BLOCKS; b++) {
            if (rows.present[b] == 0) continue;
            const u64 row = tile.first_row + first_row_of(b);
            if (PIECES) store_pieces(sum[b], bias, rows.weight[b], row, rows.present[b], first, memory);
            else store_sums(sum[b], bias, rows.weight[b], row, rows.present[b], first);
        }
    }

    __device__ __forceinline__ void multiply_tiles(const Tiles& tiles, u32 steps, u32 memory) const {
        Place at = {0, 0};
        Part tile = Tiles::none(), next;
        if (group == 1) {
            at.skip(steps);
            tell_threads<256>(1);
        }
        bool any = tiles.find(items.of(group), tile);
        for (u32 turn = group + 2; any; turn += 2) {
            f32 sum[ROW_BLOCKS][TILE_N / 2];
            // a stage's barrier tells only its last two uses apart, and the other's come first
            wait_threads<256>(1 + group);
            u32 last = at.stage;
            const bool any_rows = CLUSTER == 1 || tile.rows > 0;
            if (!any_rows) pass(at, steps);
            else if (ROW_BLOCKS == 2 && tile.rows <= 64) last = multiply_blocks<1>(at, steps, sum);
            else last = multiply_blocks<ROW_BLOCKS>(at, steps, sum);
            tell_threads<256>(2 - group);
            // behind the last products
            const Rows rows = rows_in(tile);
            next = tile;
            any = tiles.find(items.of(turn), next);
            wait_products<0>();
#pragma unroll
            for (u32 b = 0; b < ROW_BLOCKS; b++) hold(sum[b]);
            if (any_rows) free_stage(last);
            at.skip(steps);
            store_tile(tile, rows, sum, memory);
            tile = next;
        }
    }
};
