// d_y[t] = scale * s[t] * d_out[t], d_gate[t] = scale * sum_h y[t,h] * d_out[t,h], times the sigmoid's slope for a logit:
// a block a token.

extern "C" __global__ void __launch_bounds__(128) combine_backward_shared(const __grid_constant__ CombineBackwardSharedParams p) {
    __shared__ u64 parts[4];
    for (u64 t = blockIdx.x; t < p.tokens; t += gridDim.x) {
        f32 factor = p.scale, slope = p.scale;
        if (p.factor.data) factor *= element(p.factor, t, 0);
        if (p.logit.data) {
            const f32 logit = element(p.logit, t, 0), s = sigmoid(logit);
            factor *= s;
            slope *= s * sigmoid(-logit);
        }
        f32 sum = 0.0f;
        for (u64 h = (u64)threadIdx.x * VEC; h < p.hidden; h += 128 * VEC) {
            f32 d[VEC], y[VEC];
            load<VEC>(p.d_out, t, h, d);
            if (p.d_gate.data) {
                load<VEC>(p.y, t, h, y);
#pragma unroll
                for (int j = 0; j < VEC; j++) sum = fmaf(y[j], d[j], sum);
            }
            if (!p.d_y.data) continue;
#pragma unroll
            for (int j = 0; j < VEC; j++) d[j] *= factor;
            store<VEC>(p.d_y, t, h, d);
        }
        if (!p.d_gate.data) continue;
        f32 d[1] = {slope * reduce<Sum, 128>(sum, parts)};
        if (threadIdx.x == 0) store_gradient<1>(p.d_gate, p.accumulate, t, 0, d);
    }
}
