// The derivatives of activation.cuh, BRIEF where its SIGMOID is. On its limits a clamp has the slope that it has between them;
// relu has slope 0 at 0.

// The sigmoid of a number and of its opposite, of one exponential.
struct Sigmoids {
    f32 of, rest;
};

__device__ __forceinline__ Sigmoids sigmoids(f32 x) {
    const f32 e = BRIEF ? brief_exp(-fabsf(x)) : expf(-fabsf(x));
    const f32 large = BRIEF ? brief_reciprocal(1.0f + e) : 1.0f / (1.0f + e), small = e * large;
    return x < 0.0f ? Sigmoids{small, large} : Sigmoids{large, small};
}

template <int F> __device__ __forceinline__ f32 slope(f32 x) {
    if (F == FUNCTION_SILU) {
        const Sigmoids s = sigmoids(x);
        return s.of + x * s.of * s.rest;
    }
    if (F == FUNCTION_GELU_TANH) {
        // beyond 64 it is 0 or 1, and the powers of x might be infinite
        const f32 c = clamp(x, 64.0f), y = 1.5957691216057308f * (c + 0.044715f * c * c * c);
        return SIGMOID(y) + c * SIGMOID(y) * SIGMOID(-y) * 1.5957691216057308f * (1.0f + 3.0f * 0.044715f * c * c);
    }
    if (F == FUNCTION_GELU_ERF) {
        const f32 c = clamp(x, 64.0f);
        return 0.5f * erfcf(-0.70710678118654752f * c) + c * expf(-0.5f * c * c) * 0.39894228040143268f;
    }
    if (F == FUNCTION_RELU) return x > 0.0f ? 1.0f : 0.0f;
    if (F == FUNCTION_RELU_SQUARED) return x <= 0.0f ? 0.0f : 2.0f * x;
    return 1.0f;
}

// 1 - tanh(x / cap)^2, which would cancel
__device__ __forceinline__ f32 softcap_slope(f32 x, f32 cap) {
    const f32 y = 2.0f * (x / cap);
    return 4.0f * SIGMOID(y) * SIGMOID(-y);
}

__device__ __forceinline__ f32 within(f32 x, f32 limit) { return x > limit || x < -limit ? 0.0f : 1.0f; }
__device__ __forceinline__ f32 below(f32 x, f32 limit) { return x > limit ? 0.0f : 1.0f; }

struct Slopes {
    f32 gate, up;
};

// `limit` and `alpha` as activate has them; `a` is what it gives.
template <int A, int F> __device__ __forceinline__ Slopes slopes(f32 g, f32 u, f32 limit, f32 alpha, f32& a) {
    if (A == FORM_GATED && F == FUNCTION_SILU) {
        const Sigmoids s = sigmoids(g);
        const f32 silu = g * s.of;
        a = silu * u;
        return {(s.of + silu * s.rest) * u, silu};
    }
    a = activate<A, F>(g, u, limit, alpha);
    if (A == FORM_GATED) return {slope<F>(g) * u, function<F>(g)};
    if (A == FORM_CLAMPED_SILU) {
        const f32 m = at_most(g, limit);
        return {below(g, limit) * slope<FUNCTION_SILU>(m) * clamp(u, limit), within(u, limit) * silu(m)};
    }
    if (A == FORM_CLAMPED_SWISH) {
        const f32 m = at_most(g, limit), s = SIGMOID(alpha * m), rest = SIGMOID(-alpha * m);
        return {below(g, limit) * (clamp(u, limit) + 1.0f) * (s + alpha * m * s * rest), within(u, limit) * (m * s)};
    }
    if (A == FORM_SILU_THEN_CLAMP) {
        const f32 whole = silu(g);
        return {below(whole, limit) * slope<FUNCTION_SILU>(g) * clamp(u, limit), within(u, limit) * at_most(whole, limit)};
    }
    if (A == FORM_SOFTCAPPED_SILU) {
        const f32 s = SIGMOID(g), rest = SIGMOID(-g), gate = softcap(g, limit);
        return {(softcap_slope(g, limit) + gate * rest) * s * softcap(u, alpha), gate * s * softcap_slope(u, alpha)};
    }
    return {0.0f, slope<F>(u)};
}
