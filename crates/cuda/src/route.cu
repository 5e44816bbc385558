// Logits to experts and weights: THREADS threads a token, a warp (four tokens a block) or a block.

extern "C" __global__ void route(const __grid_constant__ RouteParams p) {
    take_turn();
#if LANE_LOGITS > 0
    // the same in all lanes, which the compiler is to see
    const u32 warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    for (u64 t = (u64)blockIdx.x * (blockDim.x / 32) + warp; t < p.tokens; t += (u64)gridDim.x * (blockDim.x / 32))
        route_in_registers<LOGITS_T, LANE_LOGITS>(p.choice, row_of<const LOGITS_T>(p.logits, t), lane).write(p.choice, t, lane);
#else
    extern __shared__ u64 shared[];
    __shared__ u64 parts[32];
    const u32 group = threadIdx.x / THREADS, groups = blockDim.x / THREADS;
    const u32 words = p.choice.experts_total + (p.choice.groups + 1) / 2;
    u64* mine = shared + (u64)group * words;
    const RouteScratch scratch = {mine, reinterpret_cast<f32*>(mine + p.choice.experts_total), parts};
    for (u64 t = (u64)blockIdx.x * groups + group; t < p.tokens; t += (u64)gridDim.x * groups) {
        route_token<LOGITS_T, THREADS>(p.choice, row_of<const LOGITS_T>(p.logits, t), t, threadIdx.x % THREADS, scratch);
        sync<THREADS>();
    }
#endif
}
