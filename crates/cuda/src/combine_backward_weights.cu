// d_w[slot] = routed_scale * (sum_i y[row, i] * d[i] + sum_h bias[e, h] * d_out[t, h]), d being d_out[t] or a row of its own:
// a warp a slot.

__device__ __forceinline__ f32 dot_of(const Tensor& a, u64 i, const Tensor& b, u64 j, u64 width, bool at_once) {
    const u32 lane = threadIdx.x % 32;
    f32 sum = 0.0f;
    if (at_once) {
        for (u64 h = lane * VEC; h < width; h += 32 * VEC) {
            f32 u[VEC], v[VEC];
            load<VEC>(a, i, h, u);
            load<VEC>(b, j, h, v);
#pragma unroll
            for (int n = 0; n < VEC; n++) sum = fmaf(u[n], v[n], sum);
        }
    } else {
        for (u64 h = lane; h < width; h += 32) sum = fmaf(element(a, i, h), element(b, j, h), sum);
    }
    return reduce_warp<Sum>(sum);
}

extern "C" __global__ void __launch_bounds__(256) combine_backward_weights(const __grid_constant__ CombineBackwardWeightsParams p) {
    for (u64 slot = (u64)blockIdx.x * 8 + threadIdx.x / 32; slot < p.slots; slot += (u64)gridDim.x * 8) {
        const u64 row = p.slot_row ? reinterpret_cast<const u32*>(p.slot_row)[slot] : slot, t = slot / p.top_k;
        f32 d[1] = {0.0f};
        if (row < p.slots) {
            d[0] = dot_of(p.y, row, p.d, p.d_of_token ? t : row, p.width, true);
            const u32 e = p.bias.data ? row_of<const u32>(p.experts, t)[slot % p.top_k] : NO_EXPERT;
            if (e < p.experts_total) d[0] += dot_of(p.bias, e, p.d_out, t, p.hidden, false);
            d[0] *= p.routed_scale;
        }
        if (threadIdx.x % 32 == 0) store_gradient<1>(p.out, p.accumulate, t, slot % p.top_k, d);
    }
}
