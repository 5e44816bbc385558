// The scores of a token's logits and their derivatives, in numbers of type R, by N threads: a warp, a block, or each thread
// for itself (N = 1).

typedef double f64;

#define SCORE_SOFTMAX 0
#define SCORE_SIGMOID 1
#define SCORE_SQRT_SOFTPLUS 2
#define SCORE_LOGIT 3

template <class Op, int N, class T> __device__ __forceinline__ T all_of(T x, u64* parts) {
    return N == 1 ? x : reduce<Op, N == 1 ? 32 : N>(x, parts);
}

template <class R> __device__ __forceinline__ R sigmoid_of(R x) {
    const R e = exp(-fabs(x));
    return x < (R)0 ? e / ((R)1 + e) : (R)1 / ((R)1 + e);
}

// A NaN is an absent term, a term equal to the maximum counts 1.
template <class R> struct Softmax {
    f32 max;
    R sum;
    __device__ __forceinline__ R term(f32 x) const {
        if (is_nan(x) || x == -INFINITE) return (R)0;
        return x == max ? (R)1 : exp((R)x - (R)max);
    }
    __device__ __forceinline__ R of(f32 x) const { return sum == (R)0 ? (R)0 : term(x) / sum; }
};

// value(i) for i below n.
template <class R, int N, class Value>
__device__ __forceinline__ Softmax<R> softmax_of(u32 n, u32 lane, u64* parts, Value value) {
    Softmax<R> softmax = {-INFINITE, (R)0};
    for (u32 i = lane; i < n; i += N) {
        const f32 x = value(i);
        if (x > softmax.max) softmax.max = x;
    }
    softmax.max = all_of<Max, N>(softmax.max, parts);
    for (u32 i = lane; i < n; i += N) softmax.sum += softmax.term(value(i));
    softmax.sum = all_of<Sum, N>(softmax.sum, parts);
    return softmax;
}

// What the score of a logit is.
template <class R> struct Scores {
    u32 kind;
    Softmax<R> softmax;
    __device__ __forceinline__ R of(f32 logit) const {
        const R l = logit;
        if (is_nan(logit)) return (R)0;
        if (kind == SCORE_SOFTMAX) return softmax.of(logit);
        if (kind == SCORE_SIGMOID) return sigmoid_of(l);
        // far below zero softplus is exp, and its root is there where it is not
        if (kind == SCORE_SQRT_SOFTPLUS && l < (R)-20) return exp((R)0.5 * l);
        if (kind == SCORE_SQRT_SOFTPLUS) return sqrt(log1p(exp(-fabs(l))) + (l > (R)0 ? l : (R)0));
        return l;
    }
    // From the gradient of the score to that of the logit; `along` is the sum over the token of scores times gradients.
    __device__ __forceinline__ R through(f32 logit, R d, R along) const {
        const R l = logit;
        if (kind == SCORE_SOFTMAX) return softmax.of(logit) * (d - along);
        if (is_nan(logit)) return (R)0;
        if (kind == SCORE_SIGMOID) return d * sigmoid_of(l) * sigmoid_of(-l);
        if (kind == SCORE_LOGIT) return d;
        const R s = of(logit);
        return s == (R)0 ? (R)0 : d * sigmoid_of(l) / ((R)2 * s);
    }
};

template <class R, int N, class L>
__device__ __forceinline__ Scores<R> scores_of(u32 kind, const L* logits, u32 experts, u32 lane, u64* parts) {
    Scores<R> scores = {kind, {-INFINITE, (R)0}};
    if (kind == SCORE_SOFTMAX) scores.softmax = softmax_of<R, N>(experts, lane, parts, [&](u32 e) { return to_f32(logits[e]); });
    return scores;
}

template <int N, class L> __device__ __forceinline__ bool any_finite(const L* logits, u32 experts, u32 lane, u64* parts) {
    u32 finite = 0;
    for (u32 e = lane; e < experts; e += N) finite |= is_finite(to_f32(logits[e]));
    return all_of<Or, N>(finite, parts) != 0;
}
