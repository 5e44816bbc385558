// Gate and up rows of one token's experts, with the activation, and its routes: a block a multiprocessor.
//
//   twice, the first time before this launch's turn and for nothing, but that it brings the instructions here:
//     the first warp finds the experts, in every block for itself; each warp fills its ring
//   each warp: outputs of all slots in turn, OUTPUTS at once, their weight rows through its ring; x from shared memory;
//     the first one lets the next launch begin when half is done, or all but LEFT stages, which take as long as that one needs
//     to be ready: before, its copies would delay these
//
// I is a multiple of OUTPUTS. So little room is taken that the next launch has its own beside it and fetches its first
// weights meanwhile.
#define HALVES (GATED ? 2 : 1)
#define OUTPUTS (WIDE / HALVES)
#define LEFT 10

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) gate_up_ring(const __grid_constant__ GateUpRingParams q) {
    extern __shared__ __align__(16) u8 memory[];
    __shared__ Chosen chosen;
    const GroupedParams& p = q.gate_up;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 inner = (u32)p.inner, spans = (inner + SPAN - 1) / SPAN;
    const u32 groups = (u32)p.outputs / OUTPUTS, units = (u32)p.rows * groups;
    const bool weighted = p.input_weights.data != 0;
    const u32 memory_of_warp = shared_address(memory) + (spans + warp * STAGES * WIDE) * SPAN * 2;
    const u32 begin = warp * gridDim.x + blockIdx.x, apart = WARPS * gridDim.x;
    // what is copied next
    Ring ring(memory_of_warp);
    u32 unit = begin, span = 0;
    const u16* row = nullptr;
    const auto find_rows = [&](u32 slot, u32 i) {
        if (unit >= units) return;
        row = reinterpret_cast<const u16*>(expert_at<W_T>(p, chosen.expert[slot]).matrix) + i * p.row_stride + lane * 8;
    };
    Choice choice;
    const u32 first_slot = begin / groups, first_output = begin % groups * OUTPUTS;
    const auto fill = [&](bool live) {
        if (unit < units) {
            const u32 k = span * SPAN;
#pragma unroll
            for (int n = 0; n < WIDE; n++)
                ring.copy(n, row + (n / OUTPUTS * p.outputs + n % OUTPUTS) * p.row_stride + k, live && k + lane * 8 < inner);
            if (++span == spans) {
                span = 0;
                unit += apart;
                find_rows(unit / groups, unit % groups * OUTPUTS);
            }
        }
        ring.filled();
    };
#pragma unroll 1
    for (u32 pass = 0; pass < 2; pass++) {
        const bool live = pass == 1;
        if (live) {
            wait_copies<0>();
            wait_for_launch_before();
            __syncthreads();
        } else if (warp == 1) {
            fetch(row_of<const W_T>(p.x, 0), p.inner);
        }
        for (u32 k = threadIdx.x * 8; k < inner; k += 32 * WARPS * 8)
            copy_async(shared_address(memory) + k * 2, row_of<const u16>(p.x, 0) + k, live);
        commit_copies();
        choice = find_experts(q.route, chosen);
        __syncthreads();
        ring = Ring(memory_of_warp);
        unit = begin;
        span = 0;
        find_rows(first_slot, first_output);
#pragma unroll 1
        for (u32 i = 0; i < STAGES - 1; i++) fill(live);
    }
    const bool writes = q.write && blockIdx.x == 0;
    if ((weighted || writes) && warp == 0) {
        const LaneRoute route = find_weights(q.route, choice, chosen);
        if (writes) write_routes(q.route, route);
    }
    // for x
    wait_copies<STAGES - 1>();
    __syncthreads();
    const u32 stages = begin < units ? (units - begin + apart - 1) / apart * spans : 0;
    const u32 half = stages / 2, most = stages > LEFT ? stages - LEFT : 0;
    u32 done = 0;
    for (u32 own = begin; own < units; own += apart) {
        Sums sums = {};
        for (u32 i = 0; i < spans; i++) {
            const u32 k = i * SPAN + lane * 8;
            uint4 v = {0, 0, 0, 0};
            if (k < inner) v = *reinterpret_cast<const uint4*>(memory + k * 2);
            ring.wait<STAGES - 1>();
            sums.add(ring, v);
            fill(true);
            if (warp == 0 && done++ == (half < most ? half : most)) let_next_launch_begin();
        }
        f32 sum[WIDE];
#pragma unroll
        for (int n = 0; n < WIDE; n++) sum[n] = sums.of_row(n);
        if (lane != 0) continue;
        const u32 slot = own / groups, i = own % groups * OUTPUTS;
        const Expert expert = expert_at<W_T>(p, chosen.expert[slot]);
        f32 gate[OUTPUTS], up[OUTPUTS];
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) {
            gate[o] = sum[o];
            up[o] = sum[WIDE - OUTPUTS + o];
        }
        store_outputs<OUTPUTS>(p, expert.bias, weighted ? chosen.weight[slot] : 1.0f, slot, i, gate, up);
    }
}
