//! Between gate_up and down.

use crate::config::{Activation, Function};
use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_PI, FRAC_2_SQRT_PI};

/// Where gate and up lie. An activation without gate reads up alone: the field, or `[R, I]` in place of `[R, 2I]`.
#[derive(Clone, Copy, Debug)]
pub enum PreActivation<'a> {
    /// Two buffers.
    Separate {
        /// `[R, I]`; not read without gate.
        gate: &'a [f64],
        /// `[R, I]`.
        up: &'a [f64],
    },
    /// `[R, 2I]`: a row is `g[0..I]`, then `u[0..I]`.
    Halves(&'a [f64]),
    /// `[R, 2I]`: a row is `g[0] u[0] g[1] u[1] ...`.
    Interleaved(&'a [f64]),
}

/// `a[r,i] = act(g[r,i], u[r,i])`, see [`activate`]. Returns `[R, I]`.
///
/// ```
/// use fused_moe_core::{config::{Activation, Function}, reference::{PreActivation, activation}};
/// let relu = Activation::Gated(Function::Relu);
/// assert_eq!(activation(relu, PreActivation::Halves(&[1.0, -1.0, 3.0, 4.0]), 1, 2), [3.0, 0.0]);
/// assert_eq!(activation(relu, PreActivation::Interleaved(&[1.0, 3.0, -1.0, 4.0]), 1, 2), [3.0, 0.0]);
/// ```
pub fn activation(
    activation: Activation,
    pre_activation: PreActivation<'_>,
    rows: usize,
    intermediate: usize,
) -> Vec<f64> {
    let gated = activation.is_gated();
    let mut a = Vec::with_capacity(rows * intermediate);
    for r in 0..rows {
        for i in 0..intermediate {
            let (g, u) = match pre_activation {
                PreActivation::Separate { gate, up } if gated => (gate[r * intermediate + i], up[r * intermediate + i]),
                PreActivation::Halves(z) if gated => {
                    (z[r * 2 * intermediate + i], z[r * 2 * intermediate + intermediate + i])
                }
                PreActivation::Interleaved(z) if gated => {
                    (z[r * 2 * intermediate + 2 * i], z[r * 2 * intermediate + 2 * i + 1])
                }
                PreActivation::Separate { up: z, .. } | PreActivation::Halves(z) | PreActivation::Interleaved(z) => {
                    (0.0, z[r * intermediate + i])
                }
            };
            a.push(activate(activation, g, u));
        }
    }
    a
}

/// One element, from its gate `g` and its up `u`. An activation without gate does not read `g`.
///
/// | activation | value |
/// |---|---|
/// | `Gated(f)` | `f(g) * u` |
/// | `ClampedSilu` | `silu(min(g, limit)) * clamp(u, -limit, limit)` |
/// | `ClampedSwish` | `(clamp(u, -limit, limit) + 1) * m * sigmoid(alpha * m)`, `m = min(g, limit)` |
/// | `SiluThenClamp` | `min(silu(g), limit) * clamp(u, -limit, limit)` |
/// | `SoftcappedSilu` | `cap(g, gate_cap) * sigmoid(g) * cap(u, up_cap)`, `cap(x, c) = c * tanh(x / c)` |
/// | `Plain(f)` | `f(u)` |
///
/// and the functions f:
///
/// | function | value |
/// |---|---|
/// | `Silu` | `x * sigmoid(x)` |
/// | `GeluTanh` | `0.5 * x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 * x^3)))` |
/// | `GeluErf` | `0.5 * x * (1 + erf(x / sqrt(2)))` |
/// | `Relu` | `max(x, 0)` |
/// | `ReluSquared` | `max(x, 0)^2` |
/// | `Identity` | `x` |
///
/// NaN in either operand that is read gives NaN: min, max and clamp pass it on. `Silu` and both `Gelu` of -inf are NaN
/// (`-inf * 0`), as the formulas have it. The constants of the configuration are f32 and are used at that value.
pub fn activate(activation: Activation, g: f64, u: f64) -> f64 {
    match activation {
        Activation::Gated(f) => function(f, g) * u,
        Activation::ClampedSilu { limit } => {
            let limit = f64::from(limit);
            silu(at_most(g, limit)) * clamp(u, limit)
        }
        Activation::ClampedSwish { alpha, limit } => {
            let (alpha, limit) = (f64::from(alpha), f64::from(limit));
            let m = at_most(g, limit);
            (clamp(u, limit) + 1.0) * (m * sigmoid(alpha * m))
        }
        Activation::SiluThenClamp { limit } => {
            let limit = f64::from(limit);
            at_most(silu(g), limit) * clamp(u, limit)
        }
        Activation::SoftcappedSilu { gate_cap, up_cap } => {
            softcap(g, f64::from(gate_cap)) * sigmoid(g) * softcap(u, f64::from(up_cap))
        }
        Activation::Plain(f) => function(f, u),
    }
}

fn function(f: Function, x: f64) -> f64 {
    match f {
        Function::Silu => silu(x),
        Function::GeluTanh => 0.5 * x * (1.0 + (FRAC_2_PI.sqrt() * (x + 0.044715 * x * x * x)).tanh()),
        // 1 + erf(z) = erfc(-z), which keeps its digits where erf(z) is near -1
        Function::GeluErf => 0.5 * x * erfc(-x * FRAC_1_SQRT_2),
        Function::Relu => relu(x),
        Function::ReluSquared => relu(x) * relu(x),
        Function::Identity => x,
    }
}

fn softcap(x: f64, cap: f64) -> f64 {
    cap * (x / cap).tanh()
}

fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}

// f64::min, max and clamp drop NaN in one place or the other; comparisons written out pass it on
fn relu(x: f64) -> f64 {
    if x <= 0.0 { 0.0 } else { x }
}

fn at_most(x: f64, limit: f64) -> f64 {
    if x > limit { limit } else { x }
}

fn clamp(x: f64, limit: f64) -> f64 {
    if x < -limit { -limit } else { at_most(x, limit) }
}

/// `1 / (1 + exp(-x))`, without overflow: 0 at -inf, 1 at +inf, NaN at NaN.
pub fn sigmoid(x: f64) -> f64 {
    if x < 0.0 {
        let e = x.exp();
        e / (1.0 + e)
    } else {
        1.0 / (1.0 + (-x).exp())
    }
}

/// `2/sqrt(pi) * integral from 0 to x of exp(-t^2) dt`, to a few 1e-16.
///
/// Source: Abramowitz and Stegun, *Handbook of Mathematical Functions*, 7.1.6 (a series whose terms are all of one sign)
/// below 1.5, and one less [`erfc`] above.
pub fn erf(x: f64) -> f64 {
    if x.abs() < 1.5 { erf_series(x) } else { 1.0 - erfc(x) }
}

/// `1 - erf(x)`, to a relative 2e-14 for x up to about 26, where it leaves the normal numbers.
///
/// Source: Abramowitz and Stegun, *Handbook of Mathematical Functions*, 7.1.14 (a continued fraction) above 1.5, the
/// series of [`erf`] below.
pub fn erfc(x: f64) -> f64 {
    if x.abs() < 1.5 || x.is_nan() {
        1.0 - erf_series(x)
    } else if x < 0.0 {
        2.0 - erfc_fraction(-x)
    } else {
        erfc_fraction(x)
    }
}

/// `2/sqrt(pi) * exp(-x^2) * sum_n 2^n x^(2n+1) / (1*3*...*(2n+1))`.
fn erf_series(x: f64) -> f64 {
    let mut term = x;
    let mut sum = x;
    for n in 1..60 {
        term *= 2.0 * x * x / f64::from(2 * n + 1);
        sum += term;
    }
    FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

/// `exp(-x^2)/sqrt(pi) / (x + (1/2)/(x + (2/2)/(x + (3/2)/(x + ...))))`, from the inside out.
fn erfc_fraction(x: f64) -> f64 {
    let mut denominator = x;
    for n in (1..=150).rev() {
        denominator = x + 0.5 * f64::from(n) / denominator;
    }
    0.5 * FRAC_2_SQRT_PI * (-x * x).exp() / denominator
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAN: f64 = f64::NAN;
    const INF: f64 = f64::INFINITY;

    const ALL: [Activation; 17] = [
        Activation::Gated(Function::Silu),
        Activation::Gated(Function::GeluTanh),
        Activation::Gated(Function::GeluErf),
        Activation::Gated(Function::Relu),
        Activation::Gated(Function::ReluSquared),
        Activation::Gated(Function::Identity),
        Activation::ClampedSilu { limit: 2.0 },
        Activation::ClampedSwish { alpha: 1.5, limit: 2.0 },
        Activation::SiluThenClamp { limit: 2.0 },
        Activation::SoftcappedSilu { gate_cap: 4.0, up_cap: 25.0 },
        Activation::Plain(Function::Silu),
        Activation::Plain(Function::GeluTanh),
        Activation::Plain(Function::GeluErf),
        Activation::Plain(Function::Relu),
        Activation::Plain(Function::ReluSquared),
        Activation::Plain(Function::Identity),
        Activation::ClampedSilu { limit: 0.5 },
    ];

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() <= 2e-15 * expected.abs().max(1e-300), "{found:e} is not {expected:e}");
    }

    #[test]
    fn sigmoid_at_the_ends() {
        assert_eq!(sigmoid(0.0), 0.5);
        assert_eq!((sigmoid(INF), sigmoid(-INF), sigmoid(1e4), sigmoid(-1e4)), (1.0, 0.0, 1.0, 0.0));
        assert!(sigmoid(NAN).is_nan());
        close(sigmoid(-700.0), (-700f64).exp());
        close(sigmoid(2.0), 0.880_797_077_977_882_4);
    }

    #[test]
    fn erf_and_erfc_against_a_table() {
        let table = [
            (0.001, 0.0011283787909692365, 0.9988716212090307),
            (0.1, 0.1124629160182849, 0.8875370839817152),
            (0.5, 0.5204998778130465, 0.4795001221869535),
            (1.0, 0.8427007929497149, 0.15729920705028513),
            (1.499, 0.9659860376518566, 0.03401396234814331),
            (1.5, 0.9661051464753108, 0.033894853524689274),
            (2.0, 0.9953222650189527, 0.004677734981047265),
            (3.0, 0.9999779095030014, 2.2090496998585438e-05),
            (5.0, 0.9999999999984626, 1.5374597944280351e-12),
            (25.0, 1.0, 8.300172571196522e-274),
            (-0.5, -0.5204998778130465, 1.5204998778130465),
            (-2.0, -0.9953222650189527, 1.9953222650189528),
            (-7.0, -1.0, 2.0),
        ];
        for (x, expected, complement) in table {
            assert!((erf(x) - expected).abs() < 5e-16, "erf({x}) = {}", erf(x));
            assert!((erfc(x) / complement - 1.0).abs() < 2e-14, "erfc({x}) = {}", erfc(x));
        }
        assert_eq!((erf(0.0), erf(INF), erf(-INF), erfc(INF), erfc(-INF)), (0.0, 1.0, -1.0, 0.0, 2.0));
        assert!(erf(NAN).is_nan() && erfc(NAN).is_nan());
    }

    #[test]
    fn functions_by_hand() {
        let f = |f, x| activate(Activation::Plain(f), NAN, x);
        close(f(Function::Silu, 1.0), 0.731_058_578_630_004_9);
        close(f(Function::Silu, -1.0), -0.268_941_421_369_995_1);
        close(f(Function::GeluTanh, 1.0), 0.841_191_990_608_276_8);
        close(f(Function::GeluErf, 1.0), 0.841_344_746_068_542_9);
        close(f(Function::GeluErf, -1.0), -0.158_655_253_931_457_05);
        assert_eq!((f(Function::Relu, -3.0), f(Function::Relu, 3.0)), (0.0, 3.0));
        assert_eq!((f(Function::ReluSquared, -3.0), f(Function::ReluSquared, 3.0)), (0.0, 9.0));
        assert_eq!(f(Function::Identity, -3.0), -3.0);
        assert_eq!(f(Function::GeluTanh, 1e200), 1e200);
    }

    #[test]
    fn gates_multiply() {
        assert_eq!(activate(Activation::Gated(Function::Relu), 3.0, -5.0), -15.0);
        assert_eq!(activate(Activation::Gated(Function::Identity), -3.0, -5.0), 15.0);
    }

    #[test]
    fn clamps_by_hand() {
        let s = sigmoid;
        let silu = Activation::ClampedSilu { limit: 2.0 };
        assert_eq!(activate(silu, 5.0, 5.0), 2.0 * s(2.0) * 2.0);
        assert_eq!(activate(silu, -5.0, -5.0), -5.0 * s(-5.0) * -2.0);
        let swish = Activation::ClampedSwish { alpha: 1.5, limit: 2.0 };
        assert_eq!(activate(swish, 5.0, 5.0), 3.0 * (2.0 * s(3.0)));
        assert_eq!(activate(swish, -5.0, -5.0), -(-5.0 * s(-7.5)));
        assert_eq!(activate(swish, 1.0, 0.5), 1.5 * s(1.5));
        let after = Activation::SiluThenClamp { limit: 2.0 };
        assert_eq!(activate(after, 5.0, 5.0), 4.0);
        assert_eq!(activate(after, 1.0, -5.0), s(1.0) * -2.0);
        let capped = Activation::SoftcappedSilu { gate_cap: 4.0, up_cap: 2.0 };
        assert_eq!(activate(capped, 5.0, -3.0), 4.0 * f64::tanh(1.25) * s(5.0) * (2.0 * f64::tanh(-1.5)));
        // the limit is on the gate before silu in one and after it in the other
        assert_ne!(activate(silu, 5.0, 1.0), activate(after, 5.0, 1.0));
    }

    #[test]
    fn nan_is_passed_on() {
        for act in ALL {
            assert!(activate(act, 1.0, NAN).is_nan(), "{act:?}");
            assert_eq!(activate(act, NAN, 1.0).is_nan(), act.is_gated(), "{act:?}");
        }
    }

    #[test]
    fn zero_rows_stay_zero() {
        for act in ALL {
            assert_eq!(activate(act, 0.0, 0.0), 0.0, "{act:?}");
        }
    }

    #[test]
    fn arrangements_agree() {
        let (gate, up) = ([1.0, -2.0, 0.5, 4.0, -1.0, 3.0], [2.0, 1.0, -3.0, -4.0, 5.0, 0.1]);
        let halves = [1.0, -2.0, 0.5, 2.0, 1.0, -3.0, 4.0, -1.0, 3.0, -4.0, 5.0, 0.1];
        let interleaved = [1.0, 2.0, -2.0, 1.0, 0.5, -3.0, 4.0, -4.0, -1.0, 5.0, 3.0, 0.1];
        for act in ALL {
            let separate = activation(act, PreActivation::Separate { gate: &gate, up: &up }, 2, 3);
            for i in 0..6 {
                assert_eq!(separate[i], activate(act, gate[i], up[i]));
            }
            let (halves, interleaved) =
                if act.is_gated() { (&halves[..], &interleaved[..]) } else { (&up[..], &up[..]) };
            assert_eq!(activation(act, PreActivation::Halves(halves), 2, 3), separate);
            assert_eq!(activation(act, PreActivation::Interleaved(interleaved), 2, 3), separate);
        }
        assert!(activation(ALL[0], PreActivation::Halves(&[]), 0, 3).is_empty());
    }
}
