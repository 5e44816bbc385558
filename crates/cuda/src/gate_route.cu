// gate and route in one launch, a block a token: the logits by warps, then the choice by one of them.

extern "C" __global__ void __launch_bounds__(THREADS) gate_route(const __grid_constant__ GateRouteParams q) {
    take_turn();
    extern __shared__ u64 shared[];
    const GateParams& p = q.gate;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const RouteScratch scratch = {shared, reinterpret_cast<f32*>(shared + p.experts), nullptr};
    for (u64 t = blockIdx.x; t < p.tokens; t += gridDim.x) {
        f32* logits = row_of<f32>(p.logits, t);
        for (u64 e = warp; e < p.experts; e += THREADS / 32) {
            f32 sum[1], squares[1];
            const ROUTER_T* router = row_of<const ROUTER_T>(p.router, e);
            if (p.norm) dot_rows<X_T, ROUTER_T, 1, VEC, true>(p.x, t, p.tokens, router, p.norm_weight, p.hidden, sum, squares);
            else dot_rows<X_T, ROUTER_T, 1, VEC, false>(p.x, t, p.tokens, router, p.norm_weight, p.hidden, sum, squares);
            const f32 factor = norm_factor(p, squares[0]);
            if (lane == 0) logits[e] = finish_logit(p, sum[0], factor, e);
            if (e == 0 && p.normed.data) write_normed<X_T>(p, t, factor, lane, 32);
        }
        __syncthreads();
        if (warp == 0) route_token<f32, 32>(q.choice, logits, t, lane, scratch);
        __syncthreads();
    }
}
