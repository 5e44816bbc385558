// What becomes of an output of a token: `value` is the sum over its slots.
__device__ __forceinline__ void store_combined(const DownCombineParams& q, u64 t, u64 i, f32 value) {
    value *= q.routed_scale;
    if (q.shared.data) {
        const f32 factor = q.shared_scale * (q.logit.data ? sigmoid(element(q.logit, t, 0)) : 1.0f);
        value = fmaf(factor, element(q.shared, t, i), value);
    }
    if (q.residual.data) value += element(q.residual, t, i);
    const f32 y[1] = {value};
    store<1>(q.out, t, i, y);
}
// Of the only one.
__device__ __forceinline__ void store_combined(const DownCombineParams& q, u64 i, f32 value) { store_combined(q, 0, i, value); }
