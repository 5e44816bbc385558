// The load-balancing loss of one sequence of L tokens:
//
//   factor * sum_t mean[t],  mean[t] = sum_e p[t,e] * slots[e],  factor = coefficient * E / (K * L^2 * N)

struct Sequence {
    u64 begin, end;
    f64 factor;
};

// Sequence s and its slots of each expert, by the whole block. An end below one before it counts as that one.
__device__ __forceinline__ Sequence sequence_of(const LoadBalanceLossParams& p, u64 s, u32* slots, u64* parts) {
    const u32* ends = reinterpret_cast<const u32*>(p.sequences);
    const u32 tokens = (u32)p.tokens;
    u32 begin = 0, end = tokens;
    if (ends) {
        for (u64 i = threadIdx.x; i <= s; i += THREADS) begin = begin > ends[i] ? begin : ends[i];
        begin = reduce<Max, THREADS>(begin, parts);
        begin = begin < tokens ? begin : tokens;
        end = ends[s + 1] < tokens ? ends[s + 1] : tokens;
        if (end < begin) end = begin;
    }
    const f64 length = end - begin;
    const Sequence sequence = {begin, end, (f64)p.coefficient * p.experts_total / (p.top_k * length * length * p.sequence_count)};
    __syncthreads();
    for (u32 e = threadIdx.x; e < p.experts_total; e += THREADS) slots[e] = 0;
    __syncthreads();
    for (u64 i = (u64)begin * p.top_k + threadIdx.x; i < (u64)end * p.top_k; i += THREADS) {
        const u32 e = row_of<const u32>(p.experts, i / p.top_k)[i % p.top_k];
        // whole numbers: their sum has no order
        if (e < p.experts_total) atomicAdd(slots + e, 1u);
    }
    __syncthreads();
    return sequence;
}

// A token's mean, by a warp; false where it has no probabilities. Sums are f64: what cancels is to cancel.
struct TokenLoss {
    Scores<f32> scores;
    f64 sum, mean;

    __device__ __forceinline__ bool make(const LoadBalanceLossParams& p, const LOGITS_T* logits, const u32* slots, u32 lane) {
        if (!any_finite<32>(logits, p.experts_total, lane, nullptr)) return false;
        scores = scores_of<f32, 32>(p.score, logits, p.experts_total, lane, nullptr);
        sum = mean = 0.0;
        for (u32 e = lane; e < p.experts_total; e += 32) {
            const f32 s = scores.of(to_f32(logits[e]));
            sum += s;
            mean += (f64)s * slots[e];
        }
        sum = reduce_warp<Sum>(sum);
        mean = reduce_warp<Sum>(mean) / sum;
        return sum != 0.0;
    }
};
