// The gradients of a grouped product. What all their kernels share: where rows are found, and what they are multiplied by.
//
//   rows      out[r, k]    = scale * weight[r] * sum_n d[r, n] * matrix[e, n, k]       r one of the rows of e
//   matrices  out[e, n, k] = scale * sum_r weight[r] * d[r, n] * x[r, k]               over the rows of e
//   bias      out[e, n]    = scale * sum_r weight[r] * d[r, n]
//
// d or x may be gathered: row r is then row_slot[r] / top_k of it. N = p.outputs, K = p.inputs.

__device__ __forceinline__ u64 source_of(const GroupedBackwardParams& p, bool gathered, u32 row, u32 slot) {
    return gathered ? slot / p.grouped.top_k : row;
}

// The slope of the soft-cap whose result is given.
__device__ __forceinline__ f32 slope_of_cap(const GroupedBackwardParams& p, u64 row, u64 col) {
    const f32 y = row_of<const f32>(p.capped, row)[col] / p.softcap;
    return 1.0f - y * y;
}
