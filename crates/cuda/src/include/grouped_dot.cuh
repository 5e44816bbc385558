// The grouped product for few rows: weights stream past, a warp for every ROW_GROUP outputs, up to ROWS rows of an expert
// at once.
//
//   each warp: UNROLL loads of 16 bytes of each of its weight rows, all on their way together; times the x rows
//              (from the first-level cache); sums over the warp
//
// blockIdx.y is the first of its rows. Rows are grouped by expert, or (p.slot_experts) are the slots themselves.
#define WARPS 4
#define HALVES (GATED ? 2 : 1)

struct DotRows {
    u32 expert, first, count;
};

// Which rows are the block's; none: another block has them.
__device__ __forceinline__ DotRows rows_of_block(const GroupedParams& p, u32 row) {
    if (p.slot_experts) {
        const u32 e = reinterpret_cast<const u32*>(p.slot_experts)[row];
        return {e, row, e < p.experts ? 1u : 0u};
    }
    u32 e = 0;
    if (p.offsets) {
        const u32* offsets = reinterpret_cast<const u32*>(p.offsets);
        u32 before = 0;
        for (u32 i = threadIdx.x % 32 + 1; i <= p.experts; i += 32) before += offsets[i] <= row;
        e = __reduce_add_sync(0xffffffffu, before);
        if (e >= p.experts) return {0, 0, 0};
    }
    const RowRange range = rows_of(p, e);
    if (row < range.begin || row >= range.end || (row - range.begin) % ROWS != 0) return {0, 0, 0};
    return {e, row, range.end - row < ROWS ? range.end - row : ROWS};
}

struct DotOperands {
    const W_T* weights[HALVES][OUTPUTS];
    const X_T* x[ROWS];
    u32 rows;
};

// The products of UNROLL pieces of each row from `base` on; the last of them may end beyond the row unless WHOLE.
template <bool WHOLE>
__device__ __forceinline__ void multiply_pieces(const DotOperands& d, u64 base, u64 inner, f32 (&sum)[HALVES][OUTPUTS][ROWS]) {
    Pack<W_T, VEC> w[HALVES][OUTPUTS][UNROLL];
#pragma unroll
    for (u32 n = 0; n < UNROLL; n++)
#pragma unroll
        for (u32 h = 0; h < HALVES; h++)
#pragma unroll
            for (u32 o = 0; o < OUTPUTS; o++) {
                const u64 k = base + n * 32 * VEC;
                w[h][o][n] = stream<W_T, VEC>(d.weights[h][o] + k, WHOLE || k < inner);
            }
#pragma unroll
    for (u32 n = 0; n < UNROLL; n++) {
        const u64 k = base + n * 32 * VEC;
        if (!WHOLE && k >= inner) break;
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            if (r > 0 && r >= d.rows) break;
            f32 v[VEC];
            load<VEC>(d.x[r] + k, v);
#pragma unroll
            for (u32 h = 0; h < HALVES; h++)
#pragma unroll
                for (u32 o = 0; o < OUTPUTS; o++)
#pragma unroll
                    for (u32 j = 0; j < VEC; j++) sum[h][o][r] = fmaf(v[j], to_f32(w[h][o][n].v[j]), sum[h][o][r]);
        }
    }
}

__device__ __forceinline__ void grouped_dot(const GroupedParams& p) {
    const DotRows rows = rows_of_block(p, blockIdx.y);
    if (rows.count == 0) return;
    const Expert expert = expert_at<W_T>(p, rows.expert);
    const u32 lane = threadIdx.x % 32;
    const u64 first = ((u64)blockIdx.x * WARPS + threadIdx.x / 32) * OUTPUTS;
    if (!expert.matrix || first >= p.outputs) return;

    DotOperands d;
    d.rows = rows.count;
#pragma unroll
    for (u32 o = 0; o < OUTPUTS; o++) {
        const u64 i = first + o < p.outputs ? first + o : first;
#pragma unroll
        for (u32 h = 0; h < HALVES; h++) d.weights[h][o] = reinterpret_cast<const W_T*>(expert.matrix) + (h * p.outputs + i) * p.row_stride;
    }
    u32 slots[ROWS];
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
        slots[r] = r < rows.count ? slot_of(p, rows.first + r) : NO_ROW;
        d.x[r] = x_row<X_T>(p, slots[r] == NO_ROW ? 0 : slots[r]);
    }
    f32 sum[HALVES][OUTPUTS][ROWS] = {};
    const u64 stride = 32 * VEC * UNROLL, whole = p.inner / stride * stride;
    for (u64 base = 0; base < whole; base += stride) multiply_pieces<true>(d, base + lane * VEC, p.inner, sum);
    if (whole < p.inner) multiply_pieces<false>(d, whole + lane * VEC, p.inner, sum);
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
        if (r >= rows.count) break;
        f32 gate[OUTPUTS], up[OUTPUTS];
#pragma unroll
        for (u32 o = 0; o < OUTPUTS; o++) {
            gate[o] = GATED ? reduce_warp<Sum>(sum[0][o][r]) : 0.0f;
            up[o] = reduce_warp<Sum>(sum[HALVES - 1][o][r]);
        }
        if (lane != 0 || slots[r] == NO_ROW) continue;
        store_outputs<OUTPUTS>(p, expert.bias, input_weight(p, slots[r]), rows.first + r, first, gate, up);
    }
}
