// d_y[row of slot] = routed_scale * w[slot] * d_out[t]: `lanes` threads a slot, or a piece of one. What a thread reads of ROWS
// slots is on its way at once.

extern "C" __global__ void __launch_bounds__(256, BLOCKS) combine_backward_rows(const __grid_constant__ CombineBackwardRowsParams p) {
    const u32 group = threadIdx.x / p.lanes, groups = blockDim.x / p.lanes;
    for (u64 first = ((u64)blockIdx.x * groups + group) * ROWS; first < p.slots; first += (u64)gridDim.x * groups * ROWS) {
        u64 row[ROWS];
        f32 factor[ROWS];
#pragma unroll
        for (int n = 0; n < ROWS; n++) {
            const u64 slot = first + n;
            if (slot >= p.slots) continue;
            row[n] = p.slot_row ? reinterpret_cast<const u32*>(p.slot_row)[slot] : slot;
            factor[n] = p.routed_scale;
            if (p.weights.data) factor[n] *= row_of<const f32>(p.weights, (u32)slot / p.top_k)[(u32)slot % p.top_k];
        }
        for (u64 h = ((u64)blockIdx.y * p.lanes + threadIdx.x % p.lanes) * VEC; h < p.width; h += (u64)gridDim.y * p.lanes * VEC) {
            Piece d[ROWS];
#pragma unroll
            for (int n = 0; n < ROWS; n++)
                if (first + n < p.slots) d[n] = piece_of(p.d_out, (u32)(first + n) / p.top_k, h);
#pragma unroll
            for (int n = 0; n < ROWS; n++) {
                if (first + n >= p.slots || row[n] >= p.slots) continue;
                f32 out[VEC];
#pragma unroll
                for (int j = 0; j < VEC; j++) out[j] = factor[n] * to_f32(d[n].v[j]);
                put_piece(p.d_rows, row[n], h, out);
            }
        }
    }
}
