// The load-balancing loss, by one block: a warp every 32nd token.

extern "C" __global__ void __launch_bounds__(THREADS) load_balance_loss(const __grid_constant__ LoadBalanceLossParams p) {
    extern __shared__ u32 slots[];
    __shared__ u64 parts[32];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    f64 loss = 0.0;
    for (u64 s = 0; s < p.sequence_count; s++) {
        const Sequence sequence = sequence_of(p, s, slots, parts);
        for (u64 t = sequence.begin + warp; t < sequence.end; t += 32) {
            TokenLoss token;
            if (token.make(p, row_of<const LOGITS_T>(p.logits, t), slots, lane)) loss += sequence.factor * token.mean;
        }
    }
    // each lane of a warp has the warp's sum
    loss = reduce<Sum, THREADS>(lane == 0 ? loss : 0.0, parts);
    f32 d[1] = {(f32)loss};
    if (threadIdx.x == 0) store_gradient<1>(p.out, p.accumulate, 0, 0, d);
}
