// act(g) * u and its relatives; FORM and FUNCTION say which. NaN is passed on by its bits: a driver may make min and max of
// a comparison and a choice, and those drop it.

const FORM_GATED = 0u;
const FORM_CLAMPED_SILU = 1u;
const FORM_CLAMPED_SWISH = 2u;
const FORM_SILU_THEN_CLAMP = 3u;
const FORM_PLAIN = 4u;
const FORM_SOFTCAPPED_SILU = 5u;
const FUNCTION_SILU = 0u;
const FUNCTION_GELU_TANH = 1u;
const FUNCTION_GELU_ERF = 2u;
const FUNCTION_RELU = 3u;
const FUNCTION_RELU_SQUARED = 4u;
const FUNCTION_IDENTITY = 5u;

fn at_most(x: f32, limit: f32) -> f32 { return unless_nan(x, select(x, limit, x > limit)); }
fn within(x: f32, limit: f32) -> f32 { return unless_nan(x, select(at_most(x, limit), -limit, x < -limit)); }
fn silu(x: f32) -> f32 { return x * sigmoid(x); }
fn softcap(x: f32, cap: f32) -> f32 { return unless_nan(x, cap * tanh_of(x / cap)); }
fn relu(x: f32) -> f32 { return unless_nan(x, select(x, 0.0, x <= 0.0)); }

fn activation_function(x: f32) -> f32 {
    switch (FUNCTION) {
        case FUNCTION_SILU: { return silu(x); }
        // 0.5 (1 + tanh z) is sigmoid(2 z), which keeps its digits where tanh is near -1
        case FUNCTION_GELU_TANH: { return x * sigmoid(1.5957691216057308 * fma(0.044715 * x * x, x, x)); }
        case FUNCTION_GELU_ERF: { return 0.5 * x * erfc(-0.70710678118654752 * x); }
        case FUNCTION_RELU: { return relu(x); }
        case FUNCTION_RELU_SQUARED: { return relu(x) * relu(x); }
        default: { return x; }
    }
}

// `limit` and `alpha` are the two caps of the softcapped form.
fn activate(g: f32, u: f32, limit: f32, alpha: f32) -> f32 {
    switch (FORM) {
        case FORM_GATED: { return activation_function(g) * u; }
        case FORM_CLAMPED_SILU: { return silu(at_most(g, limit)) * within(u, limit); }
        case FORM_CLAMPED_SWISH: {
            let m = at_most(g, limit);
            return (within(u, limit) + 1.0) * (m * sigmoid(alpha * m));
        }
        case FORM_SILU_THEN_CLAMP: { return at_most(silu(g), limit) * within(u, limit); }
        case FORM_SOFTCAPPED_SILU: { return softcap(g, limit) * sigmoid(g) * softcap(u, alpha); }
        default: { return activation_function(u); }
    }
}
