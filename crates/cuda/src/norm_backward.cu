// d_x = f * (d_n * weight - x * f^2 * mean(d_n * weight * x)), f = rsqrt(mean(x^2) + eps): a block a token.

extern "C" __global__ void __launch_bounds__(256) norm_backward(const __grid_constant__ NormBackwardParams p) {
    __shared__ u64 parts[8];
    for (u64 t = blockIdx.x; t < p.tokens; t += gridDim.x) {
        f32 squares = 0.0f, along = 0.0f;
        for (u64 h = threadIdx.x; h < p.hidden; h += 256) {
            const f32 x = element(p.x, t, h), weight = p.weight.data ? element(p.weight, 0, h) : 1.0f;
            squares = fmaf(x, x, squares);
            along = fmaf(element(p.d_n, t, h) * weight, x, along);
        }
        squares = reduce<Sum, 256>(squares, parts);
        along = reduce<Sum, 256>(along, parts);
        const f32 factor = 1.0f / sqrtf(squares / (f32)p.hidden + p.eps);
        const f32 back = factor * factor * (along / (f32)p.hidden);
        for (u64 h = threadIdx.x; h < p.hidden; h += 256) {
            const f32 weight = p.weight.data ? element(p.weight, 0, h) : 1.0f;
            f32 d[1] = {factor * (element(p.d_n, t, h) * weight - element(p.x, t, h) * back)};
            store_gradient<1>(p.d, p.accumulate, t, h, d);
        }
    }
}
