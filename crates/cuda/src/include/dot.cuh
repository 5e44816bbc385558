// Dot products of TOKENS rows of x with one row of weights, a warp each. A row's sum has the same order for any TOKENS.

// sum[i] = sum_h x[first + i, h] * norm_weight[h] * weight[h];  squares[i] = sum_h x[first + i, h]^2 if NORM
template <class X, class W, int TOKENS, int VEC, bool NORM>
__device__ __forceinline__ void dot_rows(const Tensor& x, u64 first, u64 count, const W* weight, const Tensor& norm_weight,
                                         u64 width, f32 (&sum)[TOKENS], f32 (&squares)[TOKENS]) {
    const u32 lane = threadIdx.x % 32;
    const X* rows[TOKENS];
#pragma unroll
    for (int i = 0; i < TOKENS; i++) {
        rows[i] = row_of<const X>(x, first + i < count ? first + i : count - 1);
        sum[i] = squares[i] = 0.0f;
    }
    const u64 whole = width / VEC * VEC;
    for (u64 h = (u64)lane * VEC; h < whole; h += 32 * VEC) {
        f32 w[VEC], n[VEC];
        load<VEC>(weight + h, w);
        if (NORM && norm_weight.data) load<VEC>(norm_weight, 0, h, n);
#pragma unroll
        for (int i = 0; i < TOKENS; i++) {
            f32 v[VEC];
            load<VEC>(rows[i] + h, v);
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                if (NORM) squares[i] = fmaf(v[j], v[j], squares[i]);
                if (NORM && norm_weight.data) v[j] *= n[j];
                sum[i] = fmaf(v[j], w[j], sum[i]);
            }
        }
    }
    if (VEC > 1 && whole + lane < width) {
        u64 h = whole + lane;
        f32 w = to_f32(weight[h]);
#pragma unroll
        for (int i = 0; i < TOKENS; i++) {
            f32 v = to_f32(rows[i][h]);
            if (NORM) squares[i] = fmaf(v, v, squares[i]);
            if (NORM && norm_weight.data) v *= element(norm_weight, 0, h);
            sum[i] = fmaf(v, w, sum[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < TOKENS; i++) {
        sum[i] = reduce_warp<Sum>(sum[i]);
        if (NORM) squares[i] = reduce_warp<Sum>(squares[i]);
    }
}
