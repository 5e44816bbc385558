// Gate and up rows of a few tokens' experts, with the activation, and their routes: a block a multiprocessor.
//
//   `rehearse`: once before this launch's turn and for nothing, but that it brings the instructions here; then once more:
//     each warp's columns of all tokens; the experts that are touched (the first block writes the routes); rings fill
//   a block has as many outputs of the touched experts as any other, some neighbours at a time: gate rows, then their up
//     rows are its tile; the warps' sums meet, some threads store the outputs of the tokens that chose the expert
//
// So little room is taken that the next launch has its own beside it and fetches its first weights meanwhile.
#define HALVES (GATED ? 2 : 1)
#define OUTPUTS (ROWS / HALVES)

// So many outputs of an expert, and how many there are of a block's from them on.
struct Portion {
    u32 place, first, count, left;
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) gate_up_few(const __grid_constant__ GateUpFewParams q) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ Touched touched;
    const GroupedParams& p = q.gate_up;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, tokens = (u32)q.route.tokens;
    const u32 inner = (u32)p.inner, outputs = (u32)p.outputs, column = warp * CHUNKS * CHUNK, own = column + lane % 8 * 8;
    const bool weighted = p.input_weights.data != 0;
    f32* parts = reinterpret_cast<f32*>(memory);
    Ring ring(0);
    u32 x[CHUNKS][CHUNK / 8];
    // on their way to registers, rows of x lie where this warp's ring will be
    static_assert(CHUNKS * TOKENS * CHUNK * 2 <= STAGES * STAGE_BYTES, "no room for rows of x");
    const u32 x_of_warp = shared_address(parts + 2 * PART) + warp * STAGES * STAGE_BYTES;
    const auto bound = [&](Portion& tile) {
        tile.count = OUTPUTS;
        if (outputs - tile.first < tile.count) tile.count = outputs - tile.first;
        if (tile.left < tile.count) tile.count = tile.left;
    };
    const auto advance = [&](Portion& tile) {
        tile.left -= tile.count;
        tile.first += tile.count;
        if (tile.first == outputs) {
            tile.first = 0;
            tile.place++;
        }
        bound(tile);
    };
    Portion begin = {}, next = {};
    // what is copied next
    u32 chunk = 0;
    const u16* row = nullptr;
    const auto find_row = [&]() {
        if (next.left > 0)
            row = reinterpret_cast<const u16*>(touched.matrix[next.place]) + (next.first + lane / 8) * p.row_stride + own;
    };
    const auto fill = [&](bool live) {
        if (next.left > 0) {
            const bool inside = live && own + chunk * CHUNK < inner;
#pragma unroll
            for (int r = 0; r < ROWS; r += 4)
                ring.copy(r / 4, row + (r / OUTPUTS * outputs + r % OUTPUTS) * p.row_stride,
                          inside && r % OUTPUTS + lane / 8 < next.count);
            row += CHUNK;
            if (++chunk == CHUNKS) {
                chunk = 0;
                advance(next);
                find_row();
            }
        }
        ring.filled();
    };
#pragma unroll 1
    for (u32 pass = q.rehearse ? 0 : 1; pass < 2; pass++) {
        const bool live = pass == 1, first = live && blockIdx.x == 0;
        wait_copies<0>();
        clear_lists(q.route.choice.experts_total, reinterpret_cast<u32*>(parts), touched);
        if (live) take_turn();
#pragma unroll
        for (u32 c = 0; c < CHUNKS; c++)
#pragma unroll
            for (u32 t = lane / 8; t < TOKENS; t += 4) {
                const bool inside = live && t < tokens && own + c * CHUNK < inner;
                const u16* from = row_of<const u16>(p.x, inside ? t : 0) + own + c * CHUNK;
                copy_async(x_of_warp + ((c * TOKENS + t) * 8 + (lane % 8 ^ t)) * 16, from, inside);
            }
        commit_copies();
        find_touched(q.route, p, first || weighted, first, reinterpret_cast<u32*>(parts), touched);
        wait_copies<0>();
        __syncwarp();
#pragma unroll
        for (u32 c = 0; c < CHUNKS; c++)
#pragma unroll
            for (u32 h = 0; h < 2; h++) {
                u32 (&half)[4] = reinterpret_cast<u32 (&)[4]>(x[c][h * 4]);
                load_matrices(half, x_of_warp + ((c * TOKENS + lane % 8) * 8 + (h * 4 + lane / 8 ^ lane % 8)) * 16);
            }
        __syncwarp();
        const u32 all = touched.count * outputs, each = all / gridDim.x, over = all % gridDim.x;
        const u32 from = each * blockIdx.x + over * blockIdx.x / gridDim.x;
        const u32 to = each * (blockIdx.x + 1) + over * (blockIdx.x + 1) / gridDim.x;
        begin = {from / outputs, from % outputs, 0, to - from};
        bound(begin);
        ring = Ring(shared_address(parts + 2 * PART));
        next = begin;
        chunk = 0;
        find_row();
#pragma unroll 1
        for (u32 i = 0; i < STAGES; i++) fill(live);
    }
    f32* part = parts;
    // who stores takes turns
    u32 i = threadIdx.x;
    for (Portion tile = begin; tile.left > 0; advance(tile)) {
        Sums sum = {};
#pragma unroll
        for (u32 c = 0; c < CHUNKS; c++) {
            u32 w[PAIRS][CHUNK / 16][4];
            ring.take(w);
            fill(true);
            multiply(w, x[c], sum);
        }
        give(part, sum);
        __syncthreads();
        const u32 slot = i < 64 ? touched.slot[tile.place][i % TOKENS] : NO_SLOT;
        if (slot != NO_SLOT) {
            const u64 bias = p.bias.data ? expert_at<W_T>(p, touched.expert_of[slot]).bias : 0;
            const f32 weight = weighted ? touched.weight[slot] : 1.0f;
#pragma unroll
            for (u32 n = 0; n < OUTPUTS / 8; n++) {
                const u32 o = tile.first + n * 8 + i / 8;
                if (n * 8 + i / 8 >= tile.count) break;
                const f32 gate = GATED ? finish(p, bias, weight, sum_of(part, n, i), o) : 0.0f;
                const f32 up = finish(p, bias, weight, sum_of(part, GROUPS - OUTPUTS / 8 + n, i), (GATED ? outputs : 0) + o);
                const f32 value[1] = {activate<FORM, FUNCTION>(gate, up, p.limit, p.alpha)};
                store<1>(row_of<W_T>(p.out, slot) + place_of(o), value);
            }
        }
        i = i < 64 ? i + 32 * WARPS - 64 : i - 64;
        // the other of two: who writes it now has passed the barrier after which nobody reads it
        part = part == parts ? parts + PART : parts;
    }
}
