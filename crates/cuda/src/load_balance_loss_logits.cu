// d_logits of the load-balancing loss: blocks share the tokens of a sequence, a warp a token.

extern "C" __global__ void __launch_bounds__(THREADS) load_balance_loss_logits(const __grid_constant__ LoadBalanceLossParams p) {
    extern __shared__ u32 slots[];
    __shared__ u64 parts[32];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (u64 s = blockIdx.y; s < p.sequence_count; s += gridDim.y) {
        const Sequence sequence = sequence_of(p, s, slots, parts);
        for (u64 t = sequence.begin + (u64)blockIdx.x * 8 + warp; t < sequence.end; t += (u64)gridDim.x * 8) {
            const LOGITS_T* logits = row_of<const LOGITS_T>(p.logits, t);
            TokenLoss token;
            if (!token.make(p, logits, slots, lane)) continue;
            const bool softmax = p.score == SCORE_SOFTMAX;
            const auto d_score = [&](u32 e) { return sequence.factor * (slots[e] - token.mean) / token.sum; };
            f64 along = 0.0;
            for (u32 e = lane; e < p.experts_total; e += 32) along += token.scores.of(to_f32(logits[e])) * d_score(e);
            along = reduce_warp<Sum>(along);
            for (u32 e = lane; e < p.experts_total; e += 32) {
                f32 d[1] = {token.scores.through(to_f32(logits[e]), (f32)(d_score(e) - (softmax ? along : 0.0)), 0.0f)};
                store_gradient<1>(p.out, p.accumulate, t, e, d);
            }
        }
        __syncthreads();
    }
}
