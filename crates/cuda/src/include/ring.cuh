// What the kernels for one token share: its routes, which every block finds for itself, and each warp's own ring.
//
// SPAN columns are what a warp reads of a row at once: 16 bytes a lane. It has WIDE rows at a time, which share what they
// multiply.

// A ring of STAGES times WIDE spans in shared memory, filled by asynchronous copies. A lane reads what it copied itself, so
// nobody waits for anyone.
struct Ring {
    u32 memory, read, write;
    __device__ __forceinline__ Ring(u32 memory) : memory(memory + threadIdx.x % 32 * 16), read(0), write(0) {}

    static __device__ __forceinline__ u32 after(u32 stage) { return stage + 1 == STAGES ? 0 : stage + 1; }
    // One span of the stage that is filled; zeros if not `inside`.
    __device__ __forceinline__ void copy(int n, const u16* from, bool inside) const {
        copy_async_once(memory + (write * WIDE + n) * SPAN * 2, from, inside);
    }
    __device__ __forceinline__ void filled() {
        commit_copies();
        write = after(write);
    }
    // For the oldest stage of FILLED.
    template <int FILLED> __device__ __forceinline__ void wait() const { wait_copies<FILLED - 1>(); }
    __device__ __forceinline__ uint4 span(int n) const {
        uint4 v;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(memory + (read * WIDE + n) * SPAN * 2)
                     : "memory");
        return v;
    }
};

// Dot products of WIDE rows with one vector, on tensor cores although each lane multiplies its own columns alone: the four lanes
// of a group have a row of the left operand, in which the weight rows 2 n and 2 n + 1 lie eight apart, and the column of the
// same number of the right one. What a row makes of the other groups' columns is not read.
struct Sums {
    f32 c[WIDE / 2][4];
    // The oldest stage times `v`, 8 columns; then the stage is free.
    __device__ __forceinline__ void add(Ring& ring, uint4 v) {
        uint4 w[WIDE];
#pragma unroll
        for (int n = 0; n < WIDE; n++) w[n] = ring.span(n);
#pragma unroll
        for (int n = 0; n < WIDE; n += 2) {
            const u32 near[4] = {w[n].x, w[n + 1].x, w[n].y, w[n + 1].y}, far[4] = {w[n].z, w[n + 1].z, w[n].w, w[n + 1].w};
            mma(W_T(), c[n / 2], near, v.x, v.y);
            mma(W_T(), c[n / 2], far, v.z, v.w);
        }
        ring.read = Ring::after(ring.read);
    }
    __device__ __forceinline__ f32 of_row(int n) const {
        const u32 lane = threadIdx.x % 32, group = lane / 4;
        const f32 own = group % 2 ? c[n / 2][n % 2 * 2 + 1] : c[n / 2][n % 2 * 2];
        return reduce_warp<Sum>(lane % 4 == group / 2 ? own : 0.0f);
    }
};

struct Chosen {
    u32 expert[32];
    f32 weight[32];
};

#if LANE_LOGITS > 0
typedef LaneChoice<LANE_LOGITS> Choice;
#else
struct Choice {
    u32 expert;
};
#endif

// The token's experts, by the first warp: of its logits where LANE_LOGITS says how many a lane has, else as they were written. All
// of it past this multiprocessor's own cache, as it may be read before this launch's turn.
__device__ __forceinline__ Choice find_experts(const RouteParams& p, Chosen& chosen) {
    const u32 lane = threadIdx.x;
    Choice choice = {};
    if (lane >= 32) return choice;
#if LANE_LOGITS > 0
    __shared__ __align__(16) u64 scratch[CHOICE_SCRATCH];
    choice = choose_in_registers<LOGITS_T, LANE_LOGITS>(p.choice, row_of<const LOGITS_T>(p.logits, 0), lane, scratch);
#else
    if (lane < p.choice.top_k) choice.expert = __ldcg(row_of<const u32>(p.choice.experts, 0) + lane);
#endif
    chosen.expert[lane] = choice.expert;
    return choice;
}

// And their weights, by the same.
__device__ __forceinline__ LaneRoute find_weights(const RouteParams& p, const Choice& choice, Chosen& chosen) {
    const u32 lane = threadIdx.x;
#if LANE_LOGITS > 0
    const LaneRoute route = {choice.expert, weight_in_registers(p.choice, choice, lane), choice.finite};
#else
    const LaneRoute route = {choice.expert, lane < p.choice.top_k ? __ldcg(row_of<const f32>(p.choice.weights, 0) + lane) : 0.0f, true};
#endif
    chosen.weight[lane] = route.weight;
    return route;
}

// The routes for others, where they are not there, by the same.
__device__ __forceinline__ void write_routes(const RouteParams& p, const LaneRoute& route) {
    if (LANE_LOGITS > 0) route.write(p.choice, 0, threadIdx.x);
}
