// From the gradient of a token's routing weights to that of what they started as. Selection is a constant. In f64: quotients
// of differences lose their digits.
//
//   v[k] = value[k] * scale[e] if before; n = norm(v); g[k] = d_w[k] * weight_scale (* scale[e] if after)
//   d_v[k] = g[k] / n - sum_j g[j] v[j] / n^2 * slope[k]
//
// Nothing is kept: each number is made where it is needed.

#define NORMALIZE_SUM 1
#define NORMALIZE_SUM_AT_LEAST 2
#define NORMALIZE_LP 3
#define SCALE_BEFORE 1
#define SCALE_AFTER 2
#define PASSES 2

template <class L, int N> struct TokenBackward {
    const RouteBackwardParams& p;
    const L* logits;
    const u32* ids;
    const f32* d_weights;
    Scores<f64> scores;
    // over the chosen, or of each pass of the sparse mixer
    Softmax<f64> chosen[PASSES];
    f64 divisor, slope_of_sum, along;

    __device__ __forceinline__ f32 logit(u32 e) const { return to_f32(logits[e]); }
    __device__ __forceinline__ u32 expert(u32 k) const { return ids[k] < p.experts_total ? ids[k] : NO_EXPERT; }

    // The logits that a pass takes its softmax over, -inf in place of the others.
    __device__ __forceinline__ f32 masked(u32 pass, u32 e) const {
        const f64 max = expert(pass) == NO_EXPERT ? (f64)NOT_A_NUMBER : (f64)logit(ids[pass]), l = logit(e);
        const f64 larger = fabs(l) > max ? fabs(l) : max;
        const bool near = l == max || max - l <= 2.0 * p.jitter * larger;
        return near && !(pass == 1 && e == ids[0]) ? logit(e) : -INFINITE;
    }

    __device__ __forceinline__ f64 value(u32 k) const {
        const u32 e = expert(k);
        if (e == NO_EXPERT) return 0.0;
        if (p.sparse_mixer) return chosen[k].of(masked(k, e));
        return p.softmax_of_chosen ? chosen[0].of(logit(e)) : scores.of(logit(e));
    }
    __device__ __forceinline__ f64 scale(u32 e, u32 when) const {
        return p.scale_when == when ? (f64)element(p.scale, 0, e) : 1.0;
    }
    __device__ __forceinline__ f64 scaled(u32 k) const {
        return expert(k) == NO_EXPERT ? 0.0 : value(k) * scale(ids[k], SCALE_BEFORE);
    }
    __device__ __forceinline__ f64 d_weight(u32 k) const { return (f64)d_weights[k] * p.weight_scale; }

    __device__ __forceinline__ TokenBackward(const RouteBackwardParams& params, u64 t, u32 lane, u64* parts)
        : p(params), logits(row_of<const L>(params.logits, t)), ids(row_of<const u32>(params.experts, t)),
          d_weights(row_of<const f32>(params.d_weights, t)) {
        scores.kind = p.score;
        if (p.sparse_mixer) {
#pragma unroll
            for (u32 pass = 0; pass < PASSES; pass++)
                if (pass < p.top_k) chosen[pass] = softmax_of<f64, N>(p.experts_total, lane, parts, [&](u32 e) { return masked(pass, e); });
        } else if (p.softmax_of_chosen) {
            chosen[0] = softmax_of<f64, N>(p.top_k, lane, parts, [&](u32 k) { return expert(k) == NO_EXPERT ? -INFINITE : logit(ids[k]); });
        } else {
            scores = scores_of<f64, N>(p.score, logits, p.experts_total, lane, parts);
        }
        f64 sum = 0.0, product = 0.0;
        for (u32 k = lane; k < p.top_k; k += N) {
            const f64 v = scaled(k);
            sum += p.normalize == NORMALIZE_LP ? pow(fabs(v), (f64)p.normalize_by) : v;
            if (expert(k) != NO_EXPERT) product += d_weight(k) * scale(ids[k], SCALE_AFTER) * v;
        }
        sum = all_of<Sum, N>(sum, parts);
        along = all_of<Sum, N>(product, parts);
        const f64 by = p.normalize_by;
        divisor = 1.0;
        slope_of_sum = 0.0;
        if (p.normalize == NORMALIZE_SUM || (p.normalize == NORMALIZE_SUM_AT_LEAST && !(sum < by))) slope_of_sum = 1.0;
        if (p.normalize == NORMALIZE_SUM) divisor = sum + by;
        if (p.normalize == NORMALIZE_SUM_AT_LEAST) divisor = sum < by ? by : sum;
        if (p.normalize == NORMALIZE_LP) divisor = pow(sum, 1.0 / by);
    }

    __device__ __forceinline__ f64 slope(f64 v) const {
        if (p.normalize != NORMALIZE_LP) return slope_of_sum;
        if (v == 0.0) return 0.0;
        const f64 s = pow(fabs(v) / divisor, (f64)p.normalize_by - 1.0);
        return v < 0.0 ? -s : s;
    }
    // The gradient of v[k]; 0 where a slot has no expert.
    __device__ __forceinline__ f64 d_scaled(u32 k) const {
        if (expert(k) == NO_EXPERT || divisor == 0.0) return 0.0;
        return d_weight(k) * scale(ids[k], SCALE_AFTER) / divisor - along / (divisor * divisor) * slope(scaled(k));
    }
    __device__ __forceinline__ f64 d_value(u32 k) const {
        return expert(k) == NO_EXPERT ? 0.0 : d_scaled(k) * scale(ids[k], SCALE_BEFORE);
    }
    // What slot k adds to the gradient of its expert's scale.
    __device__ __forceinline__ f64 d_scale(u32 k) const {
        if (divisor == 0.0) return 0.0;
        return p.scale_when == SCALE_AFTER ? d_weight(k) * scaled(k) / divisor : d_scaled(k) * value(k);
    }
};
