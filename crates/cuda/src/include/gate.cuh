// What becomes of a router sum.

// 1 where there is no norm
__device__ __forceinline__ f32 norm_factor(const GateParams& p, f32 squares) {
    return p.norm ? 1.0f / sqrtf(squares / (f32)p.hidden + p.eps) : 1.0f;
}

__device__ __forceinline__ f32 finish_logit(const GateParams& p, f32 sum, f32 factor, u64 e) {
    f32 logit = p.scale * (sum * factor);
    if (p.bias.data) logit += element(p.bias, 0, e);
    return p.softcap > 0.0f ? p.softcap * tanhf(logit / p.softcap) : logit;
}

// Writes n[t] by the threads of a group, `lane` of `lanes`.
template <class X>
__device__ __forceinline__ void write_normed(const GateParams& p, u64 t, f32 factor, u32 lane, u32 lanes) {
    const X* x = row_of<const X>(p.x, t);
    for (u64 h = lane; h < p.hidden; h += lanes) {
        f32 n[1] = {to_f32(x[h]) * factor};
        if (p.norm_weight.data) n[0] *= element(p.norm_weight, 0, h);
        store<1>(p.normed, t, h, n);
    }
}
