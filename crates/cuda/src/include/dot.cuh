// Dot products of ROWS rows of x with one row of weights, a warp each. A row's sum has the same order for any ROWS.

// sum[i] = sum_h x[first + i, h] * norm_weight[h] * weight[h];  squares[i] = sum_h x[first + i, h]^2
template <class X, class W, int ROWS, int WIDE>
__device__ __forceinline__ void dot_rows(const Tensor& x, u64 first, u64 count, const W* weight, const Tensor& norm_weight,
                                         u64 width, f32 (&sum)[ROWS], f32 (&squares)[ROWS]) {
    const u32 lane = threadIdx.x % 32;
    const X* rows[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        rows[i] = row_of<const X>(x, first + i < count ? first + i : count - 1);
        sum[i] = squares[i] = 0.0f;
    }
    const u64 whole = width / WIDE * WIDE;
    for (u64 h = (u64)lane * WIDE; h < whole; h += 32 * WIDE) {
        f32 w[WIDE], n[WIDE];
        load<WIDE>(weight + h, w);
        if (norm_weight.data) load<WIDE>(norm_weight, 0, h, n);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            f32 v[WIDE];
            load<WIDE>(rows[i] + h, v);
#pragma unroll
            for (int j = 0; j < WIDE; j++) {
                squares[i] = fmaf(v[j], v[j], squares[i]);
                if (norm_weight.data) v[j] *= n[j];
                sum[i] = fmaf(v[j], w[j], sum[i]);
            }
        }
    }
    if (WIDE > 1 && whole + lane < width) {
        u64 h = whole + lane;
        f32 w = to_f32(weight[h]);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            f32 v = to_f32(rows[i][h]);
            squares[i] = fmaf(v, v, squares[i]);
            if (norm_weight.data) v *= element(norm_weight, 0, h);
            sum[i] = fmaf(v, w, sum[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        sum[i] = reduce_warp<Sum>(sum[i]);
        squares[i] = reduce_warp<Sum>(squares[i]);
    }
}
