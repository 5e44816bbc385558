// Two warpgroups take turns, a tile each, so that the products of one run behind the epilogue of the other.

struct Consumer : Sums {
    // Begins the products of the tile's first N blocks of 64 rows; returns the stage that the last of them read.
    template <int N> __device__ __forceinline__ u32 multiply_blocks(Place& at, u32 steps, f32 (&sum)[ROW_BLOCKS][TILE_N / 2]) const {
        u32 last = NOTHING;
#pragma unroll
        for (int b = 0; b < N; b++) hold(sum[b]);
#pragma unroll 1
        for (u32 step = 0; step < steps; step++) {
            const u32 stage = ring.stages + at.stage * STAGE_BYTES;
            const u64 x = operand_at(stage), w = TRANSPOSED ? transposed_at(stage + X_BYTES) : operand_at(stage + X_BYTES);
            barrier_wait(ring.full + at.stage * 8, at.parity);
            if (N == 0) {
                free_stage(at.stage);
                at.next();
                continue;
            }
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

    // Ends the products.
    __device__ __forceinline__ void finish_blocks(u32 last, f32 (&sum)[ROW_BLOCKS][TILE_N / 2]) const {
        wait_products<0>();
#pragma unroll
        for (int b = 0; b < ROW_BLOCKS; b++) hold(sum[b]);
        if (last != NOTHING) free_stage(last);
    }

    // 16 rows of a warp, 64 columns at a time through its shared memory, then as pieces of 16 bytes. `present`: a bit a row.
    __device__ __forceinline__ void store_pieces(const f32 (&sum)[TILE_N / 2], u64 bias, const f32 (&weight)[2], u64 first_row, u32 present,
                                                 u64 first, u32 memory) const {
        const u32 lane = threadIdx.x % 32, row = lane % 16, piece = lane % 8;
#pragma unroll
        for (u32 c = 0; c < HALVES_STORED * TILE_COLUMNS; c += 64) {
            const u32 half = c / TILE_COLUMNS, begin = c % TILE_COLUMNS;
#pragma unroll
            for (u32 n = 0; n < 8 && begin + n * 8 < TILE_OUTPUTS; n += 2) {
                f32 left[4], right[4];
                // of an odd number of groups the last one is taken twice
                const u32 l = begin / 8 + n, r = l + 1 < TILE_OUTPUTS / 8 ? l + 1 : l;
                outputs_of(sum, half + 1 == HALVES_STORED, l, bias, first + l * 8 + lane % 4 * 2, weight, left);
                outputs_of(sum, half + 1 == HALVES_STORED, r, bias, first + r * 8 + lane % 4 * 2, weight, right);
                const u32 pairs[4] = {pair_of(W_T(), left[0], left[1]), pair_of(W_T(), left[2], left[3]),
                                      pair_of(W_T(), right[0], right[1]), pair_of(W_T(), right[2], right[3])};
                store_matrices(memory + row * 128 + ((n + lane / 16) ^ row % 8) * 16, pairs);
            }
            __syncwarp();
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const u32 r = i * 4 + lane / 8;
                const u64 column = first + begin + piece * 8;
                const bool inside = begin + piece * 8 < TILE_OUTPUTS && column < p.outputs && (present >> r & 1);
                const uint4 v = load_shared(memory + r * 128 + (piece ^ r % 8) * 16);
                if (inside) *reinterpret_cast<uint4*>(row_of<u16>(p.out, first_row + r) + half * p.outputs + column) = v;
            }
            __syncwarp();
        }
    }

    __device__ __forceinline__ void store_tile(const Tile& tile, const Rows& rows, const f32 (&sum)[ROW_BLOCKS][TILE_N / 2],
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
        Tile tile = Tiles::none(), next;
        if (group == 1) {
            at.skip(steps);
            tell_threads<256>(1);
        }
        const u64 apart = gridDim.x / CLUSTER;
        bool any = tiles.find(blockIdx.x / CLUSTER + group * apart, tile);
        while (any) {
            f32 sum[ROW_BLOCKS][TILE_N / 2];
            // a stage's barrier tells only its last two uses apart, and the other's come first
            wait_threads<256>(1 + group);
            u32 last;
            if (CLUSTER == 2 && tile.rows == 0) last = multiply_blocks<0>(at, steps, sum);
            else if (ROW_BLOCKS == 2 && tile.rows <= 64) last = multiply_blocks<1>(at, steps, sum);
            else last = multiply_blocks<ROW_BLOCKS>(at, steps, sum);
            tell_threads<256>(2 - group);
            // behind the last products
            const Rows rows = rows_in(tile);
            next = tile;
            any = tiles.find(tile.item + 2 * apart, next);
            finish_blocks(last, sum);
            at.skip(steps);
            store_tile(tile, rows, sum, memory);
            tile = next;
        }
    }
};
