//! Through the activation, from the saved pre-activation.

use super::activation::{PreActivation, activate, erfc, sigmoid};
use crate::config::{Activation, Function};
use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_PI, PI};

/// The gradient of a pre-activation, [`activation_backward`]'s result.
#[derive(Clone, Debug, PartialEq)]
pub struct ActivationGradient {
    /// `[R, I]`; empty without gate.
    pub gate: Vec<f64>,
    /// `[R, I]`.
    pub up: Vec<f64>,
}

impl ActivationGradient {
    /// As [`PreActivation::Halves`] lies: `[R, 2I]`, or `[R, I]` without gate.
    pub fn halves(&self, intermediate: usize) -> Vec<f64> {
        if self.gate.is_empty() {
            return self.up.clone();
        }
        let rows = self.gate.chunks_exact(intermediate.max(1)).zip(self.up.chunks_exact(intermediate.max(1)));
        rows.flat_map(|(gate, up)| gate.iter().chain(up).copied()).collect()
    }

    /// As [`PreActivation::Interleaved`] lies: `[R, 2I]`, or `[R, I]` without gate.
    pub fn interleaved(&self) -> Vec<f64> {
        if self.gate.is_empty() {
            return self.up.clone();
        }
        self.gate.iter().zip(&self.up).flat_map(|(&gate, &up)| [gate, up]).collect()
    }
}

/// `d_gate[r,i] = d_a[r,i] * da/dg` and `d_up[r,i] = d_a[r,i] * da/du` at `(g[r,i], u[r,i])`, see
/// [`activate_backward`].
///
/// - `pre_activation`: as [`activation`](fn@super::activation) read it
/// - `d_a`: `[R, I]`
///
/// ```
/// use fused_moe_core::{config::{Activation, Function}, reference::{PreActivation, activation_backward}};
/// let relu = Activation::Gated(Function::Relu);
/// let d = activation_backward(relu, PreActivation::Halves(&[1.0, -1.0, 3.0, 4.0]), &[10.0, 10.0], 2);
/// assert_eq!((d.gate, d.up), (vec![30.0, 0.0], vec![10.0, 0.0]));
/// ```
pub fn activation_backward(
    activation: Activation,
    pre_activation: PreActivation<'_>,
    d_a: &[f64],
    intermediate: usize,
) -> ActivationGradient {
    let gated = activation.is_gated();
    let mut gradient = ActivationGradient { gate: Vec::new(), up: Vec::with_capacity(d_a.len()) };
    for (n, d_a) in d_a.iter().enumerate() {
        let (r, i) = (n / intermediate, n % intermediate);
        let (g, u) = match pre_activation {
            PreActivation::Separate { gate, up } if gated => (gate[n], up[n]),
            PreActivation::Halves(z) if gated => {
                (z[r * 2 * intermediate + i], z[r * 2 * intermediate + intermediate + i])
            }
            PreActivation::Interleaved(z) if gated => (z[2 * n], z[2 * n + 1]),
            PreActivation::Separate { up: z, .. } | PreActivation::Halves(z) | PreActivation::Interleaved(z) => {
                (0.0, z[n])
            }
        };
        let [d_g, d_u] = activate_backward(activation, g, u);
        if gated {
            gradient.gate.push(d_a * d_g);
        }
        gradient.up.push(d_a * d_u);
    }
    gradient
}

/// `[da/dg, da/du]` of [`activate`]; the first is 0 without gate.
///
/// | activation | da/dg | da/du |
/// |---|---|---|
/// | `Gated(f)` | `f'(g) * u` | `f(g)` |
/// | `ClampedSilu` | `[g <= limit] * silu'(g) * clamp(u)` | `[abs(u) <= limit] * silu(min(g, limit))` |
/// | `ClampedSwish` | `[g <= limit] * (clamp(u) + 1) * swish'(g)` | `[abs(u) <= limit] * swish(min(g, limit))` |
/// | `SiluThenClamp` | `[silu(g) <= limit] * silu'(g) * clamp(u)` | `[abs(u) <= limit] * min(silu(g), limit)` |
/// | `SoftcappedSilu` | `(cap'(g) + cap(g) * (1 - s)) * s * cap(u)`, `s = sigmoid(g)` | `cap(g) * s * cap'(u)` |
/// | `Plain(f)` | 0 | `f'(u)` |
///
/// with `swish(g) = g * sigmoid(alpha * g)`, `clamp(u)` between `-limit` and `limit`, and the caps of gate and up in
/// `cap(x) = c * tanh(x / c)`, `cap'(x) = 1 - tanh(x / c)^2`.
///
/// **Kinks.** A clamp has slope 1 on its limits as between them, and 0 beyond; `Relu` has slope 0 at 0. These are the
/// choices of PyTorch's autograd. NaN in an operand gives NaN wherever the table's formula reads it.
pub fn activate_backward(activation: Activation, g: f64, u: f64) -> [f64; 2] {
    let within = |x: f64, limit: f64| if x > limit || x < -limit { 0.0 } else { 1.0 };
    let below = |x: f64, limit: f64| if x > limit { 0.0 } else { 1.0 };
    // The other factor of each product is the activation itself, with the operand that is derived put where it is one.
    match activation {
        Activation::Gated(f) => [slope(f, g) * u, activate(Activation::Plain(f), 0.0, g)],
        Activation::ClampedSilu { limit } => {
            let l = f64::from(limit);
            let silu = activate(Activation::Plain(Function::Silu), 0.0, at_most(g, l));
            [below(g, l) * slope(Function::Silu, at_most(g, l)) * clamp(u, l), within(u, l) * silu]
        }
        Activation::ClampedSwish { alpha, limit } => {
            let (alpha, l) = (f64::from(alpha), f64::from(limit));
            let m = at_most(g, l);
            let (s, rest) = (sigmoid(alpha * m), sigmoid(-alpha * m));
            [below(g, l) * (clamp(u, l) + 1.0) * (s + alpha * m * s * rest), within(u, l) * (m * s)]
        }
        Activation::SiluThenClamp { limit } => {
            let l = f64::from(limit);
            let silu = activate(Activation::Plain(Function::Silu), 0.0, g);
            [below(silu, l) * slope(Function::Silu, g) * clamp(u, l), within(u, l) * at_most(silu, l)]
        }
        Activation::SoftcappedSilu { gate_cap, up_cap } => {
            let ([gate, gate_slope], [up, up_slope]) = (softcap(g, f64::from(gate_cap)), softcap(u, f64::from(up_cap)));
            let (s, rest) = (sigmoid(g), sigmoid(-g));
            [(gate_slope + gate * rest) * s * up, gate * s * up_slope]
        }
        Activation::Plain(f) => [0.0, slope(f, u)],
    }
}

/// `f'(x)`.
fn slope(f: Function, x: f64) -> f64 {
    match f {
        Function::Silu => {
            let (s, rest) = (sigmoid(x), sigmoid(-x));
            s + x * s * rest
        }
        Function::GeluTanh => {
            // (1 + tanh(y)) / 2 = sigmoid(2y). Beyond 64 sigmoid(2y) is 0 or 1, and the powers of x might be infinite.
            let c = clamp(x, 64.0);
            let twice = 2.0 * FRAC_2_PI.sqrt();
            let y = twice * (c + 0.044715 * c * c * c);
            sigmoid(y) + c * sigmoid(y) * sigmoid(-y) * twice * (1.0 + 3.0 * 0.044715 * c * c)
        }
        Function::GeluErf => {
            let c = clamp(x, 64.0);
            0.5 * erfc(-c * FRAC_1_SQRT_2) + c * (-0.5 * c * c).exp() / (2.0 * PI).sqrt()
        }
        Function::Relu => {
            if x > 0.0 {
                1.0
            } else {
                0.0
            }
        }
        Function::ReluSquared => {
            if x <= 0.0 {
                0.0
            } else {
                2.0 * x
            }
        }
        Function::Identity => 1.0,
    }
}

/// `c * tanh(x / c)` and its derivative.
fn softcap(x: f64, c: f64) -> [f64; 2] {
    let y = x / c;
    // 1 - tanh(y)^2, which would cancel
    [c * y.tanh(), 4.0 * sigmoid(2.0 * y) * sigmoid(-2.0 * y)]
}

// comparisons written out pass NaN on
fn at_most(x: f64, limit: f64) -> f64 {
    if x > limit { limit } else { x }
}

fn clamp(x: f64, limit: f64) -> f64 {
    if x < -limit { -limit } else { at_most(x, limit) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FUNCTIONS: [Function; 6] = [
        Function::Silu,
        Function::GeluTanh,
        Function::GeluErf,
        Function::Relu,
        Function::ReluSquared,
        Function::Identity,
    ];

    fn all() -> Vec<Activation> {
        let mut all = vec![
            Activation::ClampedSilu { limit: 2.0 },
            Activation::ClampedSilu { limit: 0.5 },
            Activation::ClampedSwish { alpha: 1.702, limit: 2.0 },
            Activation::SiluThenClamp { limit: 1.5 },
            Activation::SoftcappedSilu { gate_cap: 1.5, up_cap: 0.75 },
            Activation::SoftcappedSilu { gate_cap: 4.0, up_cap: 25.0 },
        ];
        all.extend(FUNCTIONS.map(Activation::Gated));
        all.extend(FUNCTIONS.map(Activation::Plain));
        all
    }

    #[test]
    fn central_differences() {
        let step = 1e-5;
        // no point within a step of a kink of the activations above
        let points = [-30.0, -9.1, -2.3, -1.9, -0.51, -0.49, -1e-3, 1e-3, 0.3, 0.7, 1.4, 1.6, 1.9, 2.1, 7.3, 30.0];
        for activation in all() {
            for g in points {
                for u in points {
                    let [d_g, d_u] = activate_backward(activation, g, u);
                    let of = |g, u| activate(activation, g, u);
                    let expected = [
                        (of(g + step, u) - of(g - step, u)) / (2.0 * step),
                        (of(g, u + step) - of(g, u - step)) / (2.0 * step),
                    ];
                    for (found, expected) in [d_g, d_u].into_iter().zip(expected) {
                        let off = (found - expected).abs();
                        assert!(off < 3e-8 * (1.0 + u.abs() + g.abs()), "{activation:?} {g} {u}: {found} {expected}");
                    }
                }
            }
        }
    }

    #[test]
    fn kinks() {
        let relu = |x| activate_backward(Activation::Plain(Function::Relu), 0.0, x)[1];
        assert_eq!((relu(0.0), relu(-0.0), relu(1e-300)), (0.0, 0.0, 1.0));
        for activation in [Activation::ClampedSilu { limit: 2.0 }, Activation::ClampedSwish { alpha: 1.0, limit: 2.0 }]
        {
            let [on, _] = activate_backward(activation, 2.0, 1.0);
            let [beyond, _] = activate_backward(activation, 2.000001, 1.0);
            assert!(on > 0.5 && beyond == 0.0, "{activation:?}");
            for u in [2.0, -2.0] {
                assert!(activate_backward(activation, 1.0, u)[1] > 0.5);
                assert_eq!(activate_backward(activation, 1.0, u * 1.000001)[1], 0.0);
            }
        }
        let silu_of_one = activate(Activation::Plain(Function::Silu), 0.0, 1.0) as f32;
        let after = Activation::SiluThenClamp { limit: silu_of_one };
        assert_eq!(activate_backward(after, 1.001, 1.0)[0], 0.0);
        assert!(activate_backward(after, 0.999, 1.0)[0] > 0.5);
    }

    #[test]
    fn softcaps_by_hand() {
        let capped = Activation::SoftcappedSilu { gate_cap: 4.0, up_cap: 2.0 };
        // at 0 a cap is the identity
        let [d_g, d_u] = activate_backward(capped, 0.0, 3.0);
        assert_eq!((d_g, d_u), (0.5 * (2.0 * f64::tanh(1.5)), 0.0));
        let [_, d_u] = activate_backward(capped, 1.0, 0.0);
        assert_eq!(d_u, 4.0 * f64::tanh(0.25) * sigmoid(1.0));
        // far above its cap a slope is 4 exp(-2x / c), where 1 - tanh^2 has no digit left
        let [_, d_u] = activate_backward(capped, 1.0, 60.0);
        let expected = 4.0 * f64::tanh(0.25) * sigmoid(1.0) * 4.0 * f64::exp(-60.0);
        assert!((d_u / expected - 1.0).abs() < 1e-14, "{d_u:e} {expected:e}");
        assert_eq!(activate_backward(capped, -1e200, 1e200), [0.0, 0.0]);
        assert!(activate_backward(capped, f64::NAN, 1.0).iter().all(|d| d.is_nan()));
        assert!(activate_backward(capped, 1.0, f64::NAN).iter().all(|d| d.is_nan()));
    }

    #[test]
    fn large_numbers_stay_finite() {
        for f in FUNCTIONS {
            for x in [1e4, 1e200] {
                assert!(slope(f, x) >= 1.0 && slope(f, x) <= 2.0 * x, "{f:?}");
                assert!(f == Function::Identity || slope(f, -x) == 0.0, "{f:?}");
            }
            assert!(slope(f, f64::NAN).is_nan() || matches!(f, Function::Relu | Function::Identity), "{f:?}");
        }
    }

    #[test]
    fn arrangements_agree() {
        let (gate, up) = ([1.0, -2.0, 0.5, 4.0, -1.0, 3.0], [2.0, 1.0, -3.0, -4.0, 5.0, 0.1]);
        let halves = [1.0, -2.0, 0.5, 2.0, 1.0, -3.0, 4.0, -1.0, 3.0, -4.0, 5.0, 0.1];
        let interleaved = [1.0, 2.0, -2.0, 1.0, 0.5, -3.0, 4.0, -4.0, -1.0, 5.0, 3.0, 0.1];
        let d_a = [0.1, -0.2, 0.3, 1.0, 2.0, -3.0];
        for act in all() {
            let separate = activation_backward(act, PreActivation::Separate { gate: &gate, up: &up }, &d_a, 3);
            let (h, i) = if act.is_gated() { (&halves[..], &interleaved[..]) } else { (&up[..], &up[..]) };
            assert_eq!(activation_backward(act, PreActivation::Halves(h), &d_a, 3), separate);
            assert_eq!(activation_backward(act, PreActivation::Interleaved(i), &d_a, 3), separate);
            if act.is_gated() {
                assert_eq!(separate.halves(3)[3..6], separate.up[..3]);
                assert_eq!(separate.interleaved()[2], separate.gate[1]);
            } else {
                assert_eq!((separate.halves(3), separate.interleaved()), (separate.up.clone(), separate.up));
            }
        }
    }
}
