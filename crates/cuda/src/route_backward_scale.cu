// d_expert_scale[e], a block an expert: each thread goes through every 256th token, those that chose e count.

extern "C" __global__ void __launch_bounds__(256) route_backward_scale(const __grid_constant__ RouteBackwardParams p) {
    __shared__ u64 parts[8];
    for (u32 e = blockIdx.x; e < p.experts_total; e += gridDim.x) {
        f64 sum = 0.0;
        for (u64 t = threadIdx.x; t < p.tokens; t += 256) {
            const u32* ids = row_of<const u32>(p.experts, t);
            bool chosen = false;
            for (u32 k = 0; k < p.top_k; k++) chosen |= ids[k] == e;
            if (!chosen || !any_finite<1>(row_of<const LOGITS_T>(p.logits, t), p.experts_total, 0, parts)) continue;
            const TokenBackward<LOGITS_T, 1> token(p, t, 0, parts);
            for (u32 k = 0; k < p.top_k; k++)
                if (ids[k] == e) sum += token.d_scale(k);
        }
        f32 d[1] = {(f32)reduce<Sum, 256>(sum, parts)};
        if (threadIdx.x == 0) store_gradient<1>(p.out, p.accumulate, 0, e, d);
        __syncthreads();
    }
}
