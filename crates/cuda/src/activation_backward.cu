// d_gate = w * d_a * da/dg, d_up = w * d_a * da/du, and a once more; `step` is 2 where gate and up alternate.

extern "C" __global__ void __launch_bounds__(256) activation_backward(const __grid_constant__ ActivationBackwardParams p) {
    for (u64 r = blockIdx.y; r < p.rows; r += gridDim.y) {
        f32 weight = p.scale;
        const u32 slot = p.row_slot ? reinterpret_cast<const u32*>(p.row_slot)[r] : (u32)r;
        if (p.row_slot && slot >= p.rows) weight = 0.0f;
        else if (p.weights.data) weight *= row_of<const f32>(p.weights, slot / p.weight_columns)[slot % p.weight_columns];
        for (u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * VEC; i < p.width; i += (u64)gridDim.x * blockDim.x * VEC) {
            f32 g[VEC] = {}, u[VEC], d[VEC], a[VEC], d_g[VEC];
            if (FORM != FORM_PLAIN) load<VEC>(p.gate, r, i * p.step, g);
            load<VEC>(p.up, r, i * p.step, u);
            load<VEC>(p.d_a, r, i, d);
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                const Slopes s = slopes<FORM, FUNCTION>(g[j], u[j], p.limit, p.alpha, a[j]);
                d_g[j] = weight * d[j] * s.gate;
                d[j] = weight * d[j] * s.up;
            }
            if (FORM != FORM_PLAIN) store<VEC>(p.d_gate, r, i * p.step, d_g);
            store<VEC>(p.d_up, r, i * p.step, d);
            if (p.a.data) store<VEC>(p.a, r, i, a);
        }
    }
}
