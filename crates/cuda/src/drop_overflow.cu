// experts = NO_EXPERT, weights = 0 where so many slots of the expert and the sequence come before: a warp a token.
//
// Only the token's own routes are read and written; whose the other slots are is told by the permutation, where those of an
// expert stand in slot order, so that those of a sequence are neighbours.

#define LIMIT_SLOTS 0
#define LIMIT_FRACTION 1
#define LIMIT_EVEN_SHARE 2

// The tokens of a sequence.
struct Sequence {
    u64 begin, end;
};

__device__ __forceinline__ Sequence sequence_of(const DropOverflowParams& p, u64 t) {
    if (!p.sequences.data) return {0, p.tokens};
    const u32* ends = reinterpret_cast<const u32*>(p.sequences.data);
    // how many of the inner ends are not behind t
    u32 n = 0, most = p.sequence_count - 1;
    while (n < most) {
        const u32 middle = n + (most - n) / 2;
        if (ends[middle + 1] <= t) n = middle + 1;
        else most = middle;
    }
    const u64 begin = n == 0 ? 0 : ends[n], end = n + 1 == p.sequence_count ? p.tokens : ends[n + 1];
    return {begin, end < p.tokens ? end : p.tokens};
}

// How many slots an expert takes of a sequence of so many tokens.
__device__ __forceinline__ u64 limit_of(const DropOverflowParams& p, u64 tokens) {
    if (p.limit_kind == LIMIT_SLOTS) return p.limit;
    if (p.limit_kind == LIMIT_EVEN_SHARE) return p.limit * ((tokens + p.experts_total - 1) / p.experts_total);
    const f64 most = ceil(p.fraction * (f64)tokens);
    return most < 4294967296.0 ? (u64)most : NO_ROW;
}

// The first row of begin .. end whose slot is not before `slot`.
__device__ __forceinline__ u32 first_row(const u32* row_slot, u32 begin, u32 end, u64 slot) {
    while (begin < end) {
        const u32 middle = begin + (end - begin) / 2;
        if (row_slot[middle] < slot) begin = middle + 1;
        else end = middle;
    }
    return begin;
}

__device__ __forceinline__ f32 importance_of(const DropOverflowParams& p, u64 t) {
    const f32 x = element(p.importance, t, 0);
    return is_nan(x) ? -INFINITE : x;
}

// How many slots of expert e and the sequence come before the k-th of token t.
__device__ __forceinline__ u32 slots_before(const DropOverflowParams& p, Sequence sequence, u64 t, u32 k, u32 e) {
    const u32* offsets = reinterpret_cast<const u32*>(p.offsets.data);
    const u32* row_slot = reinterpret_cast<const u32*>(p.row_slot.data);
    const u32 last = offsets[e + 1] < p.slots ? offsets[e + 1] : (u32)p.slots;
    const u32 begin = first_row(row_slot, offsets[e], last, sequence.begin * p.top_k);
    const u32 end = first_row(row_slot, begin, last, sequence.end * p.top_k);
    const f32 own = p.by_score ? importance_of(p, t) : 0.0f;
    u32 before = 0;
    for (u64 row = (u64)begin + threadIdx.x % 32; row < end; row += 32) {
        const u32 s = row_slot[row] / p.top_k, j = row_slot[row] % p.top_k;
        bool first = s < t;
        if (p.by_score && j == k && s < p.tokens) {
            const f32 other = importance_of(p, s);
            first = other > own || (other == own && s < t);
        }
        before += j < k || (j == k && first);
    }
    return reduce_warp<Sum>(before);
}

extern "C" __global__ void __launch_bounds__(128) drop_overflow(const __grid_constant__ DropOverflowParams p) {
    const u32 lane = threadIdx.x % 32;
    const u32* slot_row = reinterpret_cast<const u32*>(p.slot_row.data);
    for (u64 t = (u64)blockIdx.x * 4 + threadIdx.x / 32; t < p.tokens; t += (u64)gridDim.x * 4) {
        const Sequence sequence = sequence_of(p, t);
        const u64 limit = limit_of(p, sequence.end - sequence.begin);
        u32* experts = row_of<u32>(p.experts, t);
        f32* weights = row_of<f32>(p.weights, t);
        for (u32 k = 0; k < p.top_k; k++) {
            const u32 e = experts[k];
            if (e >= p.experts_total || slot_row[t * p.top_k + k] == NO_ROW) continue;
            if (slots_before(p, sequence, t, k, e) >= limit && lane == 0) {
                experts[k] = NO_EXPERT;
                weights[k] = 0.0f;
            }
        }
        if (!p.renormalize) continue;
        __syncwarp();
        f32 sum = 0.0f;
        for (u32 k = lane; k < p.top_k; k += 32) sum += weights[k];
        sum = reduce_warp<Sum>(sum);
        const f32 divisor = sum < p.least_sum ? p.least_sum : sum;
        for (u32 k = lane; k < p.top_k; k += 32) weights[k] = divisor == 0.0f ? 0.0f : weights[k] / divisor;
    }
}
