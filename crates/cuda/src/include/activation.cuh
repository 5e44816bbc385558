// act(g) * u and its relatives; FORM and FUNCTION say which. min, max and clamp pass NaN on.

#ifndef SIGMOID
#define SIGMOID sigmoid
#endif
#define FORM_GATED 0
#define FORM_CLAMPED_SILU 1
#define FORM_CLAMPED_SWISH 2
#define FORM_SILU_THEN_CLAMP 3
#define FORM_PLAIN 4
#define FORM_SOFTCAPPED_SILU 5
#define FUNCTION_SILU 0
#define FUNCTION_GELU_TANH 1
#define FUNCTION_GELU_ERF 2
#define FUNCTION_RELU 3
#define FUNCTION_RELU_SQUARED 4
#define FUNCTION_IDENTITY 5

__device__ __forceinline__ f32 at_most(f32 x, f32 limit) { return x > limit ? limit : x; }
__device__ __forceinline__ f32 clamp(f32 x, f32 limit) { return x < -limit ? -limit : at_most(x, limit); }
__device__ __forceinline__ f32 silu(f32 x) { return x * SIGMOID(x); }
__device__ __forceinline__ f32 softcap(f32 x, f32 cap) { return cap * tanhf(x / cap); }
__device__ __forceinline__ f32 relu(f32 x) { return x <= 0.0f ? 0.0f : x; }

template <int F> __device__ __forceinline__ f32 function(f32 x) {
    if (F == FUNCTION_SILU) return silu(x);
    // 0.5 (1 + tanh z) is sigmoid(2 z), which keeps its digits where tanh is near -1
    if (F == FUNCTION_GELU_TANH) return x * SIGMOID(1.5957691216057308f * (x + 0.044715f * x * x * x));
    if (F == FUNCTION_GELU_ERF) return 0.5f * x * erfcf(-0.70710678118654752f * x);
    if (F == FUNCTION_RELU) return relu(x);
    if (F == FUNCTION_RELU_SQUARED) return relu(x) * relu(x);
    return x;
}

// `limit` and `alpha` are the two caps of the softcapped form.
template <int A, int F> __device__ __forceinline__ f32 activate(f32 g, f32 u, f32 limit, f32 alpha) {
    if (A == FORM_GATED) return function<F>(g) * u;
    if (A == FORM_CLAMPED_SILU) return silu(at_most(g, limit)) * clamp(u, limit);
    if (A == FORM_CLAMPED_SWISH) {
        f32 m = at_most(g, limit);
        return (clamp(u, limit) + 1.0f) * (m * SIGMOID(alpha * m));
    }
    if (A == FORM_SILU_THEN_CLAMP) return at_most(silu(g), limit) * clamp(u, limit);
    if (A == FORM_SOFTCAPPED_SILU) return softcap(g, limit) * SIGMOID(g) * softcap(u, alpha);
    return function<F>(u);
}
