// route and permute in one launch of one cluster: of a block's tokens a warp has every so many. As a token chooses an expert
// once, a bit of a word says whether it did. Behind the offsets are the counters of the products that follow.
//
//   each warp, for each of its tokens: the route; the token's bit in the words of its experts
//   each block: sends every block how many of its tokens chose each expert
//   a warp: the experts' first rows, and where this block's begin
//   each warp, for each of its tokens: the route and the rows of its slots
#define MOST_EXPERTS (32 * LANE_LOGITS)
#define MOST_TOKENS (WARPS * ROUNDS)

// Counts of four experts, a byte each, as two words of two.
struct Counts {
    u32 even, odd;
    __device__ __forceinline__ void add(u32 bytes) {
        even += bytes & 0x00ff00ffu;
        odd += bytes >> 8 & 0x00ff00ffu;
    }
    __device__ __forceinline__ u32 of(u32 i) const { return (i % 2 ? odd : even) >> i / 2 * 16 & 0xffffu; }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS) route_permute(const __grid_constant__ RoutePermuteParams q) {
    __shared__ u32 tokens_of[ROUNDS][MOST_EXPERTS], first_row[MOST_EXPERTS];
    __shared__ u32 counts[MOST_BLOCKS][MOST_EXPERTS / 4];
    __shared__ u32 chosen[MOST_TOKENS][32];
    __shared__ f32 weights[MOST_TOKENS][32];
    __shared__ Inbox inbox;
    const RouteParams& p = q.route;
    const u32 experts = p.choice.experts_total, top_k = p.choice.top_k, tokens = (u32)p.tokens;
    // the same in all lanes, which the compiler is to see
    const u32 warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32, warps = blockDim.x / 32, blocks = gridDim.x;
    const u32 each = (tokens + blocks - 1) / blocks, rounds = (each + warps - 1) / warps;
    const u32 first = blockIdx.x * each, end = first + each < tokens ? first + each : tokens;
#pragma unroll 1
    for (u32 t = first + warp; t < end; t += warps) {
        const u32 line = 128 / sizeof(LOGITS_T);
        if (lane * line < experts) asm volatile("prefetch.global.L2 [%0];" ::"l"(row_of<const LOGITS_T>(p.logits, t) + lane * line));
    }
    if (threadIdx.x == 0) inbox.expect(blocks * sizeof(counts[0]));
#pragma unroll 1
    for (u32 i = threadIdx.x; i < rounds * MOST_EXPERTS; i += blockDim.x) tokens_of[0][i] = 0;
    __syncthreads();
    if (blocks > 1) meet_cluster();
    take_turn();

    u32 round = 0;
#pragma unroll 1
    for (u32 t = first + warp; t < end; t += warps, round++) {
        const LaneRoute route = route_in_registers<LOGITS_T, LANE_LOGITS>(p.choice, row_of<const LOGITS_T>(p.logits, t), lane);
        if (lane == 0 && !route.finite) raise(p.choice.status, STATUS_NO_FINITE_SCORE);
        chosen[t - first][lane] = route.expert;
        weights[t - first][lane] = route.weight;
        if (lane < top_k) atomicOr(&tokens_of[round][route.expert], 1u << warp);
    }
    __syncthreads();
#pragma unroll 1
    for (u32 i = threadIdx.x; i < blocks * (MOST_EXPERTS / 4); i += blockDim.x) {
        const u32 four = i % (MOST_EXPERTS / 4);
        u32 bytes = 0;
#pragma unroll 1
        for (u32 r = 0; r < rounds; r++)
#pragma unroll
            for (u32 n = 0; n < 4; n++) bytes += __popc(tokens_of[r][four * 4 + n]) << 8 * n;
        if (blocks == 1) counts[0][four] = bytes;
        else inbox.send(&counts[blockIdx.x][four], bytes, i / (MOST_EXPERTS / 4));
    }
    if (blocks == 1) __syncthreads();
    if (warp == 0) {
        if (blocks > 1) inbox.wait();
        // neighbouring experts are a lane's
        Counts all[LANE_LOGITS / 4] = {}, before[LANE_LOGITS / 4] = {};
        u32 own = 0;
#pragma unroll
        for (u32 i = 0; i < LANE_LOGITS / 4; i++) {
#pragma unroll
            for (u32 b = 0; b < MOST_BLOCKS; b++) {
                const u32 bytes = b < blocks ? counts[b][lane * (LANE_LOGITS / 4) + i] : 0;
                all[i].add(bytes);
                if (b < blockIdx.x) before[i].add(bytes);
            }
#pragma unroll
            for (u32 n = 0; n < 4; n++) own += all[i].of(n);
        }
        u32 sum = own;
#pragma unroll
        for (u32 d = 1; d < 32; d <<= 1) {
            const u32 left = __shfl_up_sync(0xffffffffu, sum, d);
            if (lane >= d) sum += left;
        }
        u32* offsets = reinterpret_cast<u32*>(q.permute.offsets.data);
        u32 row = sum - own;
#pragma unroll
        for (u32 i = 0; i < LANE_LOGITS; i++) {
            const u32 e = lane * LANE_LOGITS + i;
            first_row[e] = row + before[i / 4].of(i % 4);
            // behind the last expert the offset is the end
            if (blockIdx.x == 0 && e <= experts) offsets[e] = row;
            row += all[i / 4].of(i % 4);
        }
        if (blockIdx.x == 0 && lane == 31 && experts == MOST_EXPERTS) offsets[experts] = row;
        if (blockIdx.x == 0 && lane < COUNTERS) offsets[experts + 1 + lane] = 0;
    }
    __syncthreads();
    round = 0;
#pragma unroll 1
    for (u32 t = first + warp; t < end; t += warps, round++) {
        if (lane >= top_k) continue;
        const u32 e = chosen[t - first][lane], slot = t * top_k + lane;
        u32 row = first_row[e] + __popc(tokens_of[round][e] & ((1u << warp) - 1));
#pragma unroll 1
        for (u32 r = 0; r < round; r++) row += __popc(tokens_of[r][e]);
        reinterpret_cast<u32*>(q.permute.row_slot.data)[row] = slot;
        reinterpret_cast<u32*>(q.permute.slot_row.data)[slot] = row;
        row_of<u32>(p.choice.experts, t)[lane] = e;
        row_of<f32>(p.choice.weights, t)[lane] = weights[t - first][lane];
    }
}
