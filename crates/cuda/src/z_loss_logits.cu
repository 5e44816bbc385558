// d_logits[t,e] = 2 * coefficient / T * z[t] * softmax(l[t])[e], a warp a token.

extern "C" __global__ void __launch_bounds__(256) z_loss_logits(const __grid_constant__ ZLossParams p) {
    const u32 lane = threadIdx.x % 32;
    for (u64 t = (u64)blockIdx.x * 8 + threadIdx.x / 32; t < p.tokens; t += (u64)gridDim.x * 8) {
        const LOGITS_T* logits = row_of<const LOGITS_T>(p.logits, t);
        const TokenZ token(p, logits, lane);
        const f32 factor = 2.0f * p.coefficient / (f32)p.tokens * token.z;
        for (u32 e = lane; e < p.experts_total; e += 32) {
            f32 d[1] = {factor * token.softmax.of(to_f32(logits[e]))};
            store_gradient<1>(p.out, p.accumulate, t, e, d);
        }
    }
}
