// d_gate = w * d_a * da/dg, d_up = w * d_a * da/du, w * a, and the gradient of the row's weight, scale * sum_i a[i] * d_a[i]:
// a warp a row. What a lane reads of ROWS pieces of it is on its way at once. The weight of a slot without row has gradient 0.

__device__ __forceinline__ void put_weight(const ActivationWeightsBackwardParams& q, u32 slot, f32 d) {
    row_of<f32>(q.d_weights, slot / (u32)q.columns)[slot % (u32)q.columns] = d;
}

extern "C" __global__ void __launch_bounds__(256, BLOCKS) activation_weights_backward(const __grid_constant__ ActivationWeightsBackwardParams q) {
    const ActivationBackwardParams& p = q.activation;
    const u32 lane = threadIdx.x % 32;
    const u64 row = (u64)blockIdx.x * 8 + threadIdx.x / 32;
    if (row >= p.rows) return;
    if (lane == 0 && reinterpret_cast<const u32*>(q.slot_row)[row] >= p.rows) put_weight(q, (u32)row, 0.0f);
    const u32 slot = reinterpret_cast<const u32*>(p.row_slot)[row];
    if (slot >= p.rows) return;
    const f32 weight = p.weights.data ? p.scale * row_of<const f32>(p.weights, slot / p.weight_columns)[slot % p.weight_columns] : p.scale;
    f32 sum = 0.0f;
    for (u64 first = lane * VEC; first < p.width; first += 32 * VEC * ROWS) {
        Piece gate[ROWS], up[ROWS], d[ROWS];
#pragma unroll
        for (int n = 0; n < ROWS; n++) {
            const u64 i = first + n * 32 * VEC;
            if (i >= p.width) continue;
            if (FORM != FORM_PLAIN) gate[n] = piece_of(p.gate, row, i);
            up[n] = piece_of(p.up, row, i);
            d[n] = piece_of(p.d_a, row, i);
        }
#pragma unroll
        for (int n = 0; n < ROWS; n++) {
            const u64 i = first + n * 32 * VEC;
            if (i >= p.width) continue;
            f32 a[VEC], d_gate[VEC], d_up[VEC];
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                const f32 g = FORM != FORM_PLAIN ? to_f32(gate[n].v[j]) : 0.0f, d_a = to_f32(d[n].v[j]);
                const Slopes s = slopes<FORM, FUNCTION>(g, to_f32(up[n].v[j]), p.limit, p.alpha, a[j]);
                sum = fmaf(a[j], d_a, sum);
                d_gate[j] = weight * d_a * s.gate;
                d_up[j] = weight * d_a * s.up;
                a[j] *= weight;
            }
            if (FORM != FORM_PLAIN) put_piece(p.d_gate, row, i, d_gate);
            put_piece(p.d_up, row, i, d_up);
            put_piece(p.a, row, i, a);
        }
    }
    sum = reduce_warp<Sum>(sum);
    if (lane == 0) put_weight(q, slot, p.scale * sum);
}
