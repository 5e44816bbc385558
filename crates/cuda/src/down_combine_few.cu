// down and combine of a few tokens, with all that is but the rows fetched while the launch before still makes them: a block a
// multiprocessor has some outputs, of every expert that is touched.
//
//   the experts that are touched, with weights; rings fill; then this launch's turn
//   tile by tile: a warp's columns of the tokens' rows come to registers AHEAD chunks before they are multiplied; the warps'
//     sums meet, and some threads put them by slot
//   a thread an output of a token: slots in order

#define AHEAD 3

extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) down_combine_few(const __grid_constant__ DownCombineFewParams q) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ Touched touched;
    const GroupedParams& p = q.combine.down;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, top_k = q.route.choice.top_k;
    const u32 inner = (u32)p.inner, chunks = (inner + CHUNK * WARPS - 1) / (CHUNK * WARPS), column = warp * chunks * CHUNK;
    const u32 first = (u32)(p.outputs * blockIdx.x / gridDim.x), count = (u32)(p.outputs * (blockIdx.x + 1) / gridDim.x) - first;
    f32* parts = reinterpret_cast<f32*>(memory);
    clear_lists(q.route.choice.experts_total, reinterpret_cast<u32*>(parts), touched);
    find_touched(q.route, p, true, false, reinterpret_cast<u32*>(parts), touched);
    __syncthreads();

    Ring ring(shared_address(parts + 2 * PART));
    f32* products = reinterpret_cast<f32*>(memory + 2 * PART * 4 + WARPS * STAGES * STAGE_BYTES);
    const u32 places = count > 0 ? touched.count : 0;
    // a chunk of an expert's rows from some output on
    struct Place {
        u32 n, o, chunk;
    };
    const auto advance = [&](Place& at) {
        if (++at.chunk < chunks) return;
        at.chunk = 0;
        at.o += ROWS;
        if (at.o < count) return;
        at.o = 0;
        at.n++;
    };
    // what is copied next
    Place next = {};
    const u32 own = column + lane % 8 * 8;
    const u64 offset = (first + lane / 8) * p.row_stride + own;
    const u16* row = nullptr;
    const auto fill = [&]() {
        if (next.n < places) {
            if (next.chunk == 0) row = reinterpret_cast<const u16*>(touched.matrix[next.n]) + next.o * p.row_stride + offset;
            const bool inside = own + next.chunk * CHUNK < inner;
#pragma unroll
            for (int r = 0; r < ROWS; r += 4) ring.copy(r / 4, row + r * p.row_stride, inside && next.o + r + lane / 8 < count);
            row += CHUNK;
            advance(next);
        }
        ring.filled();
    };
#pragma unroll 1
    for (u32 i = 0; i < STAGES; i++) fill();
    take_turn();
    // what is loaded next
    Place ahead = {};
    const u16* rows = row_of<const u16>(p.x, 0) + column + lane % 4 * 8;
    const auto load_rows = [&](u32 (&a)[CHUNK / 8]) {
        const u32 slot = ahead.n < places ? touched.slot[ahead.n][lane / 4] : NO_SLOT;
        const u32 k = ahead.chunk * CHUNK;
#pragma unroll
        for (int s = 0; s < 2; s++) {
            uint4 v = {};
            if (slot != NO_SLOT && column + k + s * 32 < inner)
                v = __ldcg(reinterpret_cast<const uint4*>(rows + slot * p.x.stride + k + s * 32));
            a[s * 4] = v.x, a[s * 4 + 1] = v.y, a[s * 4 + 2] = v.z, a[s * 4 + 3] = v.w;
        }
        advance(ahead);
    };
    u32 a[AHEAD][CHUNK / 8];
#pragma unroll
    for (u32 j = 0; j < AHEAD; j++) load_rows(a[j]);
    Place at = {};
    Sums sum = {};
    f32* part = parts;
    // who adds up takes turns
    u32 turn = threadIdx.x;
    while (at.n < places) {
#pragma unroll
        for (u32 j = 0; j < AHEAD; j++) {
            if (at.n >= places) break;
            u32 w[PAIRS][CHUNK / 16][4];
            ring.take(w);
            fill();
            multiply(w, a[j], sum);
            load_rows(a[j]);
            const Place tile = at;
            advance(at);
            if (at.chunk != 0) continue;
            give(part, sum);
            __syncthreads();
            const u32 i = turn % 64, group = turn / 64, o = tile.o + group * 8 + i / 8;
            const u32 slot = group < GROUPS && o < count ? touched.slot[tile.n][i % TOKENS] : NO_SLOT;
            if (slot != NO_SLOT) products[slot * count + o] = sum_of(part, group, i);
            turn = turn < GROUPS * 64 ? turn + 32 * WARPS - GROUPS * 64 : turn - GROUPS * 64;
            // the other of two: who writes it now has passed the barrier after which nobody reads it
            part = part == parts ? parts + PART : parts;
#pragma unroll
            for (int n = 0; n < PAIRS; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) sum[n][c] = 0.0f;
        }
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < (u32)q.route.tokens * count; i += 32 * WARPS) {
        const u32 t = i / count, o = i % count;
        f32 value = 0.0f;
        for (u32 slot = t * top_k; slot < (t + 1) * top_k; slot++) {
            const f32 bias = p.bias.data ? bias_at(p, expert_at<W_T>(p, touched.expert_of[slot]).bias, first + o) : 0.0f;
            value = fmaf(q.combine.weights.data ? touched.weight[slot] : 1.0f, products[slot * count + o] + bias, value);
        }
        store_combined(q.combine, t, first + o, value);
    }
}
