// Dot products of ROWS rows of x with one row of weights, a warp each. A row's sum has the same order for any ROWS.

// sum[i] = sum_h x[first + i, h] * norm_weight[h] * weight[h];  squares[i] = sum_h x[first + i, h]^2, or 0 if not SQUARES
template <class X, class W, int ROWS, int WIDE, bool SQUARES>
__device__ __forceinline__ void dot_rows(const Tensor& tokens, u64 first, u64 count, const W* weight, const Tensor& norm_weight,
                                         u64 width, f32 (&sum)[ROWS], f32 (&squares)[ROWS]) {
    const u32 lane = threadIdx.x % 32;
    const X* rows[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        rows[i] = row_of<const X>(tokens, first + i < count ? first + i : count - 1);
        sum[i] = squares[i] = 0.0f;
    }
    const u64 whole = width / WIDE * WIDE;
    // loads of a row that are on their way at once
    constexpr int AHEAD = SQUARES ? 2 : ROWS > 2 ? 4 : 8;
    for (u64 begin = (u64)lane * WIDE; begin < whole; begin += AHEAD * 32 * WIDE) {
        Pack<W, WIDE> w[AHEAD];
        Pack<X, WIDE> v[AHEAD][ROWS];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const u64 h = begin + a * 32 * WIDE;
            if (h >= whole) break;
            w[a] = *reinterpret_cast<const Pack<W, WIDE>*>(weight + h);
#pragma unroll
            for (int i = 0; i < ROWS; i++) v[a][i] = *reinterpret_cast<const Pack<X, WIDE>*>(rows[i] + h);
        }
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const u64 h = begin + a * 32 * WIDE;
            if (h >= whole) break;
            f32 n[WIDE];
            if (norm_weight.data) load<WIDE>(norm_weight, 0, h, n);
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int j = 0; j < WIDE; j++) {
                    f32 x = to_f32(v[a][i].v[j]);
                    if (SQUARES) squares[i] = fmaf(x, x, squares[i]);
                    if (norm_weight.data) x *= n[j];
                    sum[i] = fmaf(x, to_f32(w[a].v[j]), sum[i]);
                }
        }
    }
    if (WIDE > 1 && whole + lane < width) {
        u64 h = whole + lane;
        f32 w = to_f32(weight[h]);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            f32 v = to_f32(rows[i][h]);
            if (SQUARES) squares[i] = fmaf(v, v, squares[i]);
            if (norm_weight.data) v *= element(norm_weight, 0, h);
            sum[i] = fmaf(v, w, sum[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        sum[i] = reduce_warp<Sum>(sum[i]);
        if (SQUARES) squares[i] = reduce_warp<Sum>(squares[i]);
    }
}
