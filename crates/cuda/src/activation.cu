// out = act(g) * u; `step` is 2 where gate and up alternate.

extern "C" __global__ void __launch_bounds__(256) activation(const __grid_constant__ ActivationParams p) {
    for (u64 r = blockIdx.y; r < p.rows; r += gridDim.y) {
        for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < p.width; i += (u64)gridDim.x * 256) {
            const f32 g = FORM == FORM_PLAIN ? 0.0f : element(p.gate, r, i * p.step);
            const f32 a[1] = {activate<FORM, FUNCTION>(g, element(p.up, r, i * p.step), p.limit, p.alpha)};
            store<1>(p.out, r, i, a);
        }
    }
}
