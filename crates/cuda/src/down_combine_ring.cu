// down_combine with all that is but the rows fetched while the launch before still makes them: a block a multiprocessor has
// some outputs, a warp every WARPS-th pair of WIDE of them and a slot, whose rows of weights go through its ring.
//
//   the first warp finds the routes, each warp fills its ring; the next launch may begin: it waits for this one by itself
//   this launch's turn
//   the token's rows to shared memory; dot products to shared memory; a thread an output: slots in order

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) down_combine_ring(const __grid_constant__ DownCombineRingParams q) {
    extern __shared__ __align__(16) u8 memory[];
    __shared__ Chosen chosen;
    const GroupedParams& p = q.combine.down;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 inner = (u32)p.inner, slots = (u32)p.rows, spans = (inner + SPAN - 1) / SPAN;
    const u32 most = (u32)((p.outputs + gridDim.x - 1) / gridDim.x);
    const u32 first = (u32)(p.outputs * blockIdx.x / gridDim.x), count = (u32)(p.outputs * (blockIdx.x + 1) / gridDim.x) - first;
    const u32 units = (count + WIDE - 1) / WIDE * slots;
    const Choice choice = find_experts(q.route, chosen);
    __syncthreads();

    f32* products = reinterpret_cast<f32*>(memory + slots * spans * SPAN * 2);
    Ring ring(shared_address(products) + (most * slots + 3) / 4 * 16 + warp * STAGES * WIDE * SPAN * 2);
    // what is copied next
    u32 unit = warp, span = 0, rows = 0;
    const u16* row = nullptr;
    const auto find_rows = [&]() {
        if (unit >= units) return;
        const u32 o = unit / slots * WIDE;
        rows = count - o;
        row = reinterpret_cast<const u16*>(expert_at<W_T>(p, chosen.expert[unit % slots]).matrix) + (first + o) * p.row_stride + lane * 8;
    };
    const auto fill = [&]() {
        if (unit < units) {
            const u32 k = span * SPAN;
#pragma unroll
            for (int n = 0; n < WIDE; n++) ring.copy(n, row + n * p.row_stride + k, n < rows && k + lane * 8 < inner);
            if (++span == spans) {
                span = 0;
                unit += WARPS;
                find_rows();
            }
        }
        ring.filled();
    };
    find_rows();
#pragma unroll 1
    for (u32 i = 0; i < STAGES; i++) fill();
    LaneRoute route = {};
    if (warp == 0) route = find_weights(q.route, choice, chosen);
    let_next_launch_begin();
    wait_for_launch_before();
    if (blockIdx.x == 0 && warp == 0) write_routes(q.route, route);
    u16* a = reinterpret_cast<u16*>(memory);
#pragma unroll 4
    for (u32 i = threadIdx.x; i < slots * spans * 32; i += 32 * WARPS) {
        const u32 slot = i / (spans * 32), k = i % (spans * 32) * 8;
        if (k < inner) *reinterpret_cast<uint4*>(a + i * 8) = __ldcg(reinterpret_cast<const uint4*>(row_of<const u16>(p.x, slot) + k));
    }
    __syncthreads();
    for (u32 own = warp; own < units; own += WARPS) {
        const u32 slot = own % slots, o = own / slots * WIDE;
        Sums sums = {};
        for (u32 i = 0; i < spans; i++) {
            const u32 k = i * SPAN + lane * 8;
            uint4 v = {0, 0, 0, 0};
            if (k < inner) v = *reinterpret_cast<const uint4*>(a + slot * spans * SPAN + k);
            ring.wait<STAGES>();
            sums.add(ring, v);
            fill();
        }
        f32 sum[WIDE];
#pragma unroll
        for (int n = 0; n < WIDE; n++) sum[n] = sums.of_row(n);
#pragma unroll
        for (int n = 0; n < WIDE; n++)
            if (lane == n && o + n < count) products[(o + n) * slots + slot] = sum[n];
    }
    __syncthreads();
    for (u32 o = threadIdx.x; o < count; o += 32 * WARPS) {
        f32 value = 0.0f;
#pragma unroll 4
        for (u32 slot = 0; slot < slots; slot++) {
            const f32 bias = p.bias.data ? bias_at(p, expert_at<W_T>(p, chosen.expert[slot]).bias, first + o) : 0.0f;
            value = fmaf(q.combine.weights.data ? chosen.weight[slot] : 1.0f, products[o * slots + slot] + bias, value);
        }
        store_combined(q.combine, first + o, value);
    }
}
