// coefficient / T * sum_t z[t]^2, by one block: a warp every 32nd token.

extern "C" __global__ void __launch_bounds__(1024) z_loss(const __grid_constant__ ZLossParams p) {
    __shared__ u64 parts[32];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    f64 loss = 0.0;
    for (u64 t = warp; t < p.tokens; t += 32) {
        const TokenZ token(p, row_of<const LOGITS_T>(p.logits, t), lane);
        loss += (f64)token.z * token.z;
    }
    // each lane of a warp has the warp's sum
    loss = reduce<Sum, 1024>(lane == 0 ? loss : 0.0, parts);
    f32 d[1] = {p.tokens ? (f32)(loss * p.coefficient / p.tokens) : 0.0f};
    if (threadIdx.x == 0) store_gradient<1>(p.out, p.accumulate, 0, 0, d);
}
