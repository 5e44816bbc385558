// What the kernels for a few tokens share: the experts that these touch, which every block finds for itself, and the way of
// weights to the tensor cores.
//
// A block goes through tiles of ROWS rows of weights. A warp has the same columns of each tile, and a ring of its own that
// brings them a CHUNK at a time. Weights are the rows of a product and tokens its 8 columns, so that any number of tokens
// costs the same. The warps' sums of a tile meet in shared memory, where they are added up in order.
//
// Between the two launches rows lie in an order of their own: of 32 columns, lane 4g + q wants columns 2q and 2q + 1 of each
// 8, and finds them side by side.

#define CHUNK 64
#define TOKENS 8
#define ROWS (8 * GROUPS)
#define PAIRS ((GROUPS + 1) / 2)
#define STAGE_BYTES (ROWS * CHUNK * 2)
// Sums of a tile: [GROUPS][WARPS][8 rows][8 tokens].
#define PART (GROUPS * WARPS * 64)
#define MOST_SLOTS 128
#define NO_SLOT 0xff

// Where column i lies between the launches.
__device__ __forceinline__ u32 place_of(u32 i) { return i / 32 * 32 + i / 2 % 4 * 8 + i / 8 % 4 * 2 + i % 2; }

struct Touched {
    u32 count;
    // where the experts' matrices lie, in ascending order
    u64 matrix[MOST_SLOTS];
    // which slot of each token has the expert
    alignas(8) u8 slot[MOST_SLOTS][TOKENS];
    // by slot
    u32 expert_of[MOST_SLOTS];
    f32 weight[MOST_SLOTS];
};

// Before `find_touched`. tokens_of [E] is where sums will be: which tokens have an expert.
__device__ __forceinline__ void clear_lists(u32 experts, u32* tokens_of, Touched& to) {
    // who rehearses may still read them
    __syncthreads();
    for (u32 e = threadIdx.x; e < experts; e += 32 * WARPS) tokens_of[e] = 0;
    for (u32 n = threadIdx.x; n < MOST_SLOTS; n += 32 * WARPS) *reinterpret_cast<u64*>(to.slot[n]) = ~0ull;
    __syncthreads();
}

// A warp a token: routes of its logits where LANE_LOGITS says how many a lane has, else as they were written. All of it past
// this multiprocessor's own cache, as it may be read before this launch's turn. `weigh`: weights too, and `write`: for others.
// The tokens' slots are there for other threads behind the next barrier.
__device__ __forceinline__ void find_touched(const RouteParams& p, const GroupedParams& product, bool weigh, bool write, u32* tokens_of,
                                             Touched& to) {
    const u32 lane = threadIdx.x % 32, t = threadIdx.x / 32, experts = p.choice.experts_total, slot = t * p.choice.top_k + lane;
    // an expert's place among those that are touched, where the second tile's sums will be
    u32* place = tokens_of + PART;
    u32 expert = NO_EXPERT;
    if (t < p.tokens) {
        f32 weight = 0.0f;
#if LANE_LOGITS > 0
        const auto choice = choose_in_registers<LOGITS_T, LANE_LOGITS>(p.choice, row_of<const LOGITS_T>(p.logits, t), lane);
        if (weigh) weight = weight_in_registers(p.choice, choice, lane);
        if (write) LaneRoute{choice.expert, weight, choice.finite}.write(p.choice, t, lane);
        if (lane < p.choice.top_k) expert = choice.expert;
#else
        if (lane < p.choice.top_k) {
            expert = __ldcg(row_of<const u32>(p.choice.experts, t) + lane);
            if (weigh) weight = __ldcg(row_of<const f32>(p.choice.weights, t) + lane);
        }
#endif
        if (expert < experts) {
            to.expert_of[slot] = expert;
            to.weight[slot] = weight;
            atomicOr(&tokens_of[expert], 1u << t);
        }
    }
    __syncthreads();
    // each warp counts all that are touched, and lists some
    u32 count = 0;
#pragma unroll 4
    for (u32 base = 0; base < experts; base += 32) {
        const u32 e = base + lane;
        const bool touched = e < experts && tokens_of[e] != 0;
        const u32 all = __ballot_sync(0xffffffffu, touched), n = count + __popc(all & ((1u << lane) - 1));
        if (touched && base / 32 % WARPS == t) to.matrix[place[e] = n] = expert_at<W_T>(product, e).matrix;
        count += __popc(all);
    }
    if (threadIdx.x == 0) to.count = count;
    __syncthreads();
    if (expert < experts) to.slot[place[expert]][t] = (u8)slot;
}

// A warp's ring of STAGES times ROWS rows of a CHUNK. A row's pieces of 16 bytes are exchanged by its number, so that the
// same piece of 8 rows is in different banks.
struct Ring {
    // where this lane copies to next and first, and where it reads
    u32 to, first, from, read;
    __device__ __forceinline__ Ring(u32 memory) : read(0) {
        const u32 lane = threadIdx.x % 32;
        const u32 begin = memory + threadIdx.x / 32 * STAGES * STAGE_BYTES;
        first = to = begin + lane / 8 * CHUNK * 2 + (lane % 8 ^ lane / 8) * 16;
        // a lane's row of the four matrices of 8 x 8 that are read at once: two groups of rows, two pieces
        from = begin + lane % 8 * CHUNK * 2 + (lane / 16 ^ lane % 8) * 16;
    }
    // This lane's piece of rows 4n .. 4n + 4 of the stage that is filled, a row for 8 lanes; zeros if not `inside`.
    __device__ __forceinline__ void copy(int n, const u16* piece, bool inside) const {
        copy_async_once((to ^ n % 2 * 64) + n * 4 * CHUNK * 2, piece, inside);
    }
    __device__ __forceinline__ void filled() {
        commit_copies();
        to = to == first + (STAGES - 1) * STAGE_BYTES ? first : to + STAGE_BYTES;
    }
    // The oldest of STAGES stages that were filled, 16 columns after 16, which then is free. An odd group is there twice.
    __device__ __forceinline__ void take(u32 (&w)[PAIRS][CHUNK / 16][4]) {
        wait_copies<STAGES - 1>();
        __syncwarp();
        const u32 second = threadIdx.x % 32 / 8 % 2 * 8 * CHUNK * 2;
#pragma unroll
        for (int n = 0; n < PAIRS; n++)
#pragma unroll
            for (int k = 0; k < CHUNK / 16; k++)
                load_matrices(w[n][k], (from ^ k * 32) + read + n * 16 * CHUNK * 2 + (2 * n + 1 < GROUPS ? second : 0));
        __syncwarp();
        read = read == (STAGES - 1) * STAGE_BYTES ? 0 : read + STAGE_BYTES;
    }
};

typedef f32 Sums[PAIRS][4];

// sum += w . x of a chunk.
__device__ __forceinline__ void multiply(const u32 (&w)[PAIRS][CHUNK / 16][4], const u32 (&x)[CHUNK / 8], Sums& sum) {
#pragma unroll
    for (int k = 0; k < CHUNK / 16; k++)
#pragma unroll
        for (int n = 0; n < PAIRS; n++) mma(W_T(), sum[n], w[n][k], x[2 * k], x[2 * k + 1]);
}

// A warp's sums of a tile to where those of all warps meet.
__device__ __forceinline__ void give(f32* part, const Sums& sum) {
    part += threadIdx.x * 2;
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        const f32 own[2] = {sum[group / 2][group % 2 * 2], sum[group / 2][group % 2 * 2 + 1]};
        store<2>(part + group * WARPS * 64, own);
    }
}

// The sum of row i / 8 of a group, token i % 8.
__device__ __forceinline__ f32 sum_of(const f32* part, u32 group, u32 i) {
    f32 sum = 0.0f;
#pragma unroll
    for (u32 warp = 0; warp < WARPS; warp++) sum += part[(group * WARPS + warp) * 64 + i];
    return sum;
}
