// d_y[row of slot] = routed_scale * w[slot] * d_out[t]: `lanes` threads a slot, or a piece of one.

extern "C" __global__ void __launch_bounds__(128) combine_backward_rows(const __grid_constant__ CombineBackwardRowsParams p) {
    const u32 group = threadIdx.x / p.lanes, groups = 128 / p.lanes;
    for (u64 slot = (u64)blockIdx.x * groups + group; slot < p.slots; slot += (u64)gridDim.x * groups) {
        const u64 row = p.slot_row ? reinterpret_cast<const u32*>(p.slot_row)[slot] : slot;
        if (row >= p.slots) continue;
        const u32 t = (u32)slot / p.top_k;
        const f32 factor = p.weights.data ? p.routed_scale * row_of<const f32>(p.weights, t)[(u32)slot % p.top_k] : p.routed_scale;
        for (u64 h = ((u64)blockIdx.y * p.lanes + threadIdx.x % p.lanes) * VEC; h < p.width; h += (u64)gridDim.y * p.lanes * VEC) {
            f32 d[VEC];
            load<VEC>(p.d_out, t, h, d);
#pragma unroll
            for (int j = 0; j < VEC; j++) d[j] *= factor;
            store<VEC>(p.d_rows, row, h, d);
        }
    }
}
