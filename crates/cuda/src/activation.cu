// out = act(g) * u; `step` is 2 where gate and up alternate. What a thread reads of ROWS rows is on its way at once.

extern "C" __global__ void __launch_bounds__(256, BLOCKS) activation(const __grid_constant__ ActivationParams p) {
    for (u64 first = (u64)blockIdx.y * ROWS; first < p.rows; first += (u64)gridDim.y * ROWS) {
        for (u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * VEC; i < p.width; i += (u64)gridDim.x * blockDim.x * VEC) {
            Piece gate[ROWS], up[ROWS];
#pragma unroll
            for (int n = 0; n < ROWS; n++) {
                if (first + n >= p.rows) continue;
                if (FORM != FORM_PLAIN) gate[n] = piece_of(p.gate, first + n, i * p.step);
                up[n] = piece_of(p.up, first + n, i * p.step);
            }
#pragma unroll
            for (int n = 0; n < ROWS; n++) {
                if (first + n >= p.rows) continue;
                f32 a[VEC];
#pragma unroll
                for (int j = 0; j < VEC; j++) {
                    const f32 g = FORM != FORM_PLAIN ? to_f32(gate[n].v[j]) : 0.0f;
                    a[j] = activate<FORM, FUNCTION>(g, to_f32(up[n].v[j]), p.limit, p.alpha);
                }
                put_piece(p.out, first + n, i, a);
            }
        }
    }
}
