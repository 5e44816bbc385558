// out = act(g) * u; `step` is 2 where gate and up alternate.

extern "C" __global__ void __launch_bounds__(256) activation(const __grid_constant__ ActivationParams p) {
    for (u64 r = blockIdx.y; r < p.rows; r += gridDim.y) {
        const GATE_T* gate = row_of<const GATE_T>(p.gate, r);
        const UP_T* up = row_of<const UP_T>(p.up, r);
        OUT_T* out = row_of<OUT_T>(p.out, r);
        for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < p.width; i += (u64)gridDim.x * 256) {
            const f32 g = FORM == FORM_PLAIN ? 0.0f : to_f32(gate[i * p.step]);
            put(&out[i], activate<FORM, FUNCTION>(g, to_f32(up[i * p.step]), p.limit, p.alpha));
        }
    }
}
