// What becomes of an output of down_combine: `value` is the sum over the slots.
__device__ __forceinline__ void store_combined(const DownCombineParams& q, u64 i, f32 value) {
    value *= q.routed_scale;
    if (q.shared.data) {
        const f32 factor = q.shared_scale * (q.logit.data ? sigmoid(element(q.logit, 0, 0)) : 1.0f);
        value = fmaf(factor, element(q.shared, 0, i), value);
    }
    if (q.residual.data) value += element(q.residual, 0, i);
    const f32 y[1] = {value};
    store<1>(q.out, 0, i, y);
}
