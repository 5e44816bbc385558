// w[t,k] = p[t,id] / sum_j p[t,id_j] * scale[id], a warp a token.

extern "C" __global__ void __launch_bounds__(128) gather_weights(const __grid_constant__ GatherWeightsParams p) {
    const u32 lane = threadIdx.x % 32;
    for (u64 t = (u64)blockIdx.x * 4 + threadIdx.x / 32; t < p.tokens; t += (u64)gridDim.x * 4) {
        const SCORES_T* scores = row_of<const SCORES_T>(p.scores, t);
        const u32* experts = row_of<const u32>(p.experts, t);
        f32* weights = row_of<f32>(p.weights, t);
        f32 sum = 0.0f;
        u32 status = 0;
        for (u32 k = lane; k < p.top_k; k += 32) {
            if (experts[k] < p.experts_total) sum += to_f32(scores[experts[k]]);
            else if (experts[k] != NO_EXPERT) status = STATUS_EXPERT_OUT_OF_RANGE;
        }
        sum = reduce_warp<Sum>(sum);
        raise(p.status, status);
        for (u32 k = lane; k < p.top_k; k += 32) {
            const u32 e = experts[k];
            f32 w = 0.0f;
            if (e < p.experts_total && sum != 0.0f) {
                w = to_f32(scores[e]) / sum;
                if (p.scale.data) w *= element(p.scale, 0, e);
            }
            weights[k] = w;
        }
    }
}
