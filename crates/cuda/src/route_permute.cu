// route and permute in one launch of one block, for few tokens: a warp a token. As a token chooses an expert once, a word
// holds the tokens of an expert. Behind the offsets are the counters of the products that follow.

extern "C" __global__ void __launch_bounds__(1024) route_permute(const __grid_constant__ RoutePermuteParams q) {
    __shared__ u32 tokens_of[32 * LANE_LOGITS], first_row[32 * LANE_LOGITS];
    const RouteParams& p = q.route;
    const u32 experts = p.choice.experts_total, top_k = p.choice.top_k, t = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (u32 e = threadIdx.x; e < experts; e += blockDim.x) tokens_of[e] = 0;
    if (t < p.tokens) fetch(row_of<const LOGITS_T>(p.logits, t), experts);
    take_turn();
    __syncthreads();
    LaneRoute route = {};
    if (t < p.tokens) {
        route = route_in_registers<LOGITS_T, LANE_LOGITS>(p.choice, row_of<const LOGITS_T>(p.logits, t), lane);
        route.write(p.choice, t, lane);
        if (lane < top_k) atomicOr(&tokens_of[route.expert], 1u << t);
    }
    __syncthreads();
    u32* offsets = reinterpret_cast<u32*>(q.permute.offsets.data);
    if (t == 0) {
        // neighbouring experts are a lane's
        const u32 each = (experts + 31) / 32, begin = lane * each, end = begin + each < experts ? begin + each : experts;
        u32 own = 0;
        for (u32 e = begin; e < end; e++) own += __popc(tokens_of[e]);
        u32 sum = own;
#pragma unroll
        for (u32 d = 1; d < 32; d <<= 1) {
            const u32 left = __shfl_up_sync(0xffffffffu, sum, d);
            if (lane >= d) sum += left;
        }
        u32 row = sum - own;
        for (u32 e = begin; e < end; e++) {
            offsets[e] = first_row[e] = row;
            row += __popc(tokens_of[e]);
        }
        if (lane == 31) offsets[experts] = sum;
        if (lane < COUNTERS) offsets[experts + 1 + lane] = 0;
    }
    __syncthreads();
    if (t >= p.tokens || lane >= top_k) return;
    const u32 slot = t * top_k + lane, row = first_row[route.expert] + __popc(tokens_of[route.expert] & ((1u << t) - 1));
    reinterpret_cast<u32*>(q.permute.row_slot.data)[row] = slot;
    reinterpret_cast<u32*>(q.permute.slot_row.data)[slot] = row;
}
