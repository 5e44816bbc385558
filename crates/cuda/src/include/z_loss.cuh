// z[t] = ln(sum_e exp(l[t,e])), by a warp; 0 and no terms where no logit is finite.

struct TokenZ {
    Softmax<f32> softmax;
    f32 z;
    __device__ __forceinline__ TokenZ(const ZLossParams& p, const LOGITS_T* logits, u32 lane) : softmax{-INFINITE, 0.0f}, z(0.0f) {
        if (!any_finite<32>(logits, p.experts_total, lane, nullptr)) return;
        softmax = softmax_of<f32, 32>(p.experts_total, lane, nullptr, [&](u32 e) { return to_f32(logits[e]); });
        z = softmax.max + logf(softmax.sum);
    }
};
