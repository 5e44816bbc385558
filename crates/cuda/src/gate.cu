// logits = softcap(scale * (n . router^T) + bias): a warp an expert, TOKENS tokens at once.

extern "C" __global__ void __launch_bounds__(256) gate(const __grid_constant__ GateParams p) {
    if (p.early) let_next_launch_begin();
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u64 expert = (u64)blockIdx.x * (blockDim.x / 32) + warp;
    const u64 e = expert < p.experts ? expert : p.experts - 1;
    if (blockIdx.y == 0) fetch(row_of<const ROUTER_T>(p.router, e), p.hidden);
    const u64 token = (u64)blockIdx.y * TOKENS + blockIdx.x;
    if (warp == 0 && blockIdx.x < TOKENS && token < p.tokens) fetch(row_of<const X_T>(p.x, token), p.hidden);
    take_turn();
    const u64 groups = (p.tokens + TOKENS - 1) / TOKENS;
    for (u64 group = blockIdx.y; group < groups; group += gridDim.y) {
        const u64 first = group * TOKENS;
        f32 sum[TOKENS], squares[TOKENS];
        const ROUTER_T* router = row_of<const ROUTER_T>(p.router, e);
        if (p.norm) dot_rows<X_T, ROUTER_T, TOKENS, VEC, true>(p.x, first, p.tokens, router, p.norm_weight, p.hidden, sum, squares);
        else dot_rows<X_T, ROUTER_T, TOKENS, VEC, false>(p.x, first, p.tokens, router, p.norm_weight, p.hidden, sum, squares);
#pragma unroll
        for (int i = 0; i < TOKENS; i++) {
            const u64 t = first + i;
            const f32 factor = norm_factor(p, squares[i]);
            if (t < p.tokens && expert < p.experts && lane == 0)
                row_of<f32>(p.logits, t)[expert] = finish_logit(p, sum[i], factor, expert);
            if (p.normed.data && blockIdx.x == 0 && t < p.tokens)
                write_normed<X_T>(p, t, factor, threadIdx.x, blockDim.x);
        }
    }
}
