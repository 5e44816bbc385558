// out = residual + routed_scale * sum_k w[k] * (down_k . a[k] + bias_k) + shared, for the slots of one token: a warp an output,
// slots in order, SLOTS of them at once and of each UNROLL pieces.

#define WARPS 4

extern "C" __global__ void __launch_bounds__(32 * WARPS, 4) down_combine(const __grid_constant__ DownCombineParams q) {
    const GroupedParams& p = q.down;
    const u32 lane = threadIdx.x % 32, slots = (u32)p.rows;
    const u64 own = (u64)blockIdx.x * WARPS + threadIdx.x / 32, i = own < p.outputs ? own : p.outputs - 1;
    const u32* experts = reinterpret_cast<const u32*>(p.slot_experts);
    const f32* weights = row_of<const f32>(q.weights, 0);
    f32 value = 0.0f;
    for (u32 slot = 0; slot < slots; slot += SLOTS) {
        const W_T* matrix[SLOTS];
        // past this multiprocessor's own cache: they are read before this launch's turn
#pragma unroll
        for (u32 s = 0; s < SLOTS; s++)
            matrix[s] = reinterpret_cast<const W_T*>(expert_at<W_T>(p, __ldcg(experts + slot + s)).matrix) + i * p.row_stride;
        f32 sum[SLOTS] = {};
        for (u64 base = 0; base < p.inner; base += 32 * VEC * UNROLL) {
            const u64 first = base + lane * VEC;
            Pack<W_T, VEC> w[SLOTS][UNROLL];
#pragma unroll
            for (u32 s = 0; s < SLOTS; s++)
#pragma unroll
                for (u32 n = 0; n < UNROLL; n++) {
                    const u64 k = first + n * 32 * VEC;
                    w[s][n] = stream<W_T, VEC>(matrix[s] + k, k < p.inner);
                }
            // the first weights are on their way while the launch before still makes the rows
            if (slot == 0 && base == 0) take_turn();
#pragma unroll
            for (u32 s = 0; s < SLOTS; s++)
#pragma unroll
                for (u32 n = 0; n < UNROLL; n++) {
                    const u64 k = first + n * 32 * VEC;
                    if (k >= p.inner) break;
                    f32 v[VEC];
                    load<VEC>(row_of<const X_T>(p.x, slot + s) + k, v);
#pragma unroll
                    for (u32 j = 0; j < VEC; j++) sum[s] = fmaf(v[j], to_f32(w[s][n].v[j]), sum[s]);
                }
        }
#pragma unroll
        for (u32 s = 0; s < SLOTS; s++) value = fmaf(q.weights.data ? weights[slot + s] : 1.0f, sum[s], value);
    }
    value = reduce_warp<Sum>(value);
    if (lane != 0 || own >= p.outputs) return;
    for (u32 slot = 0; p.bias.data && slot < slots; slot++)
        value = fmaf(q.weights.data ? weights[slot] : 1.0f, bias_at(p, expert_at<W_T>(p, experts[slot]).bias, i), value);
    store_combined(q, i, value);
}
