// d_logits from d_weights: THREADS threads a token, a warp (four tokens a block) or a block.
//
//   shared memory of a token: d_value [K], then the gradients [E] of the scores, or of the logits of the chosen

extern "C" __global__ void route_backward(const __grid_constant__ RouteBackwardParams p) {
    extern __shared__ u64 shared[];
    __shared__ u64 parts[32];
    const u32 lane = threadIdx.x % THREADS, group = threadIdx.x / THREADS, groups = blockDim.x / THREADS;
    f64* d_values = reinterpret_cast<f64*>(shared) + (u64)group * (p.top_k + p.experts_total);
    f64* d = d_values + p.top_k;
    for (u64 t = (u64)blockIdx.x * groups + group; t < p.tokens; t += (u64)gridDim.x * groups) {
        const LOGITS_T* logits = row_of<const LOGITS_T>(p.logits, t);
        if (!any_finite<THREADS>(logits, p.experts_total, lane, parts)) {
            for (u32 e = lane; e < p.experts_total; e += THREADS) {
                f32 none[1] = {0.0f};
                store_gradient<1>(p.out, p.accumulate, t, e, none);
            }
            continue;
        }
        const TokenBackward<LOGITS_T, THREADS> token(p, t, lane, parts);
        f64 along = 0.0;
        for (u32 k = lane; k < p.top_k; k += THREADS) {
            d_values[k] = token.d_value(k);
            if (!p.sparse_mixer) along += token.value(k) * d_values[k];
        }
        along = all_of<Sum, THREADS>(along, parts);
        for (u32 e = lane; e < p.experts_total; e += THREADS) d[e] = 0.0;
        sync<THREADS>();
        if (lane == 0 && !p.sparse_mixer) {
            // in the order of the slots: a table may name an expert twice
            for (u32 k = 0; k < p.top_k; k++) {
                const u32 e = token.expert(k);
                if (e == NO_EXPERT) continue;
                d[e] += p.softmax_of_chosen ? token.value(k) * (d_values[k] - along) : d_values[k];
            }
        }
        sync<THREADS>();
        for (u32 e = lane; e < p.experts_total; e += THREADS) {
            f64 sum = d[e];
            if (p.sparse_mixer) {
#pragma unroll
                for (u32 pass = 0; pass < PASSES; pass++) {
                    if (pass >= p.top_k || token.expert(pass) == NO_EXPERT) continue;
                    const f64 own = e == token.ids[pass] ? d_values[pass] : 0.0;
                    sum += token.chosen[pass].of(token.masked(pass, e)) * (own - token.value(pass) * d_values[pass]);
                }
            } else if (!p.softmax_of_chosen) {
                sum = token.scores.through(to_f32(logits[e]), sum, along);
            }
            f32 out[1] = {(f32)sum};
            store_gradient<1>(p.out, p.accumulate, t, e, out);
        }
        sync<THREADS>();
    }
}
