// d_gate = w * d_a * da/dg, d_up = w * d_a * da/du, and a once more; `step` is 2 where gate and up alternate. What a thread
// reads of ROWS rows is on its way at once.

__device__ __forceinline__ f32 weight_of(const ActivationBackwardParams& p, u64 row) {
    const u32 slot = p.row_slot ? reinterpret_cast<const u32*>(p.row_slot)[row] : (u32)row;
    if (p.row_slot && slot >= p.rows) return 0.0f;
    return p.weights.data ? p.scale * row_of<const f32>(p.weights, slot / p.weight_columns)[slot % p.weight_columns] : p.scale;
}

extern "C" __global__ void __launch_bounds__(256, BLOCKS) activation_backward(const __grid_constant__ ActivationBackwardParams p) {
    for (u64 first = (u64)blockIdx.y * ROWS; first < p.rows; first += (u64)gridDim.y * ROWS) {
        f32 weight[ROWS];
#pragma unroll
        for (int n = 0; n < ROWS; n++) weight[n] = first + n < p.rows ? weight_of(p, first + n) : 0.0f;
        for (u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * VEC; i < p.width; i += (u64)gridDim.x * blockDim.x * VEC) {
            Piece gate[ROWS], up[ROWS], d[ROWS];
#pragma unroll
            for (int n = 0; n < ROWS; n++) {
                if (first + n >= p.rows) continue;
                if (FORM != FORM_PLAIN) gate[n] = piece_of(p.gate, first + n, i * p.step);
                up[n] = piece_of(p.up, first + n, i * p.step);
                d[n] = piece_of(p.d_a, first + n, i);
            }
#pragma unroll
            for (int n = 0; n < ROWS; n++) {
                const u64 r = first + n;
                if (r >= p.rows) continue;
                f32 a[VEC], d_gate[VEC], d_up[VEC];
#pragma unroll
                for (int j = 0; j < VEC; j++) {
                    const f32 g = FORM != FORM_PLAIN ? to_f32(gate[n].v[j]) : 0.0f, own = weight[n] * to_f32(d[n].v[j]);
                    const Slopes s = slopes<FORM, FUNCTION>(g, to_f32(up[n].v[j]), p.limit, p.alpha, a[j]);
                    d_gate[j] = own * s.gate;
                    d_up[j] = own * s.up;
                }
                if (FORM != FORM_PLAIN) put_piece(p.d_gate, r, i * p.step, d_gate);
                put_piece(p.d_up, r, i * p.step, d_up);
                if (p.a.data) put_piece(p.a, r, i, a);
            }
        }
    }
}
