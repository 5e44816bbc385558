use super::{Numbers, all, bits};
use fused_moe_core::config::{Activation, Function};

const FUNCTIONS: [Function; 6] =
    [Function::Silu, Function::GeluTanh, Function::GeluErf, Function::Relu, Function::ReluSquared, Function::Identity];

pub(super) fn activations() -> Vec<Activation> {
    let gated = FUNCTIONS.map(Activation::Gated);
    let plain = FUNCTIONS.map(Activation::Plain);
    let clamped = [
        Activation::ClampedSilu { limit: 7.0 },
        Activation::ClampedSwish { alpha: 1.702, limit: 7.0 },
        Activation::SiluThenClamp { limit: 2.5 },
        Activation::SoftcappedSilu { gate_cap: 4.0, up_cap: 25.0 },
    ];
    gated.into_iter().chain(plain).chain(clamped).collect()
}

fn sigmoid(x: f64) -> f64 {
    if x < 0.0 { x.exp() / (1.0 + x.exp()) } else { 1.0 / (1.0 + (-x).exp()) }
}

/// The upper tail of the standard normal distribution: a series near zero, Laplace's continued fraction beyond.
fn upper_tail(x: f64) -> f64 {
    let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
    if x > 3.0 {
        return density / (1..=200).rev().fold(x, |f, k| x + f64::from(k) / f);
    }
    let (mut term, mut sum) = (x, x);
    for k in 1..200 {
        term *= x * x / f64::from(2 * k + 1);
        sum += term;
    }
    0.5 - density * sum
}

fn function(f: Function, x: f64) -> f64 {
    match f {
        Function::Silu => x * sigmoid(x),
        Function::GeluTanh => x * sigmoid(2.0 * (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)),
        Function::GeluErf => x * if x < 0.0 { upper_tail(-x) } else { 1.0 - upper_tail(x) },
        Function::Relu => x.max(0.0),
        Function::ReluSquared => x.max(0.0).powi(2),
        Function::Identity => x,
    }
}

fn exact(activation: Activation, g: f64, u: f64) -> f64 {
    let silu = |g: f64| g * sigmoid(g);
    match activation {
        Activation::Gated(f) => function(f, g) * u,
        Activation::Plain(f) => function(f, u),
        Activation::ClampedSilu { limit } => {
            let limit = f64::from(limit);
            silu(g.min(limit)) * u.clamp(-limit, limit)
        }
        Activation::ClampedSwish { alpha, limit } => {
            let (alpha, limit) = (f64::from(alpha), f64::from(limit));
            let g = g.min(limit);
            (u.clamp(-limit, limit) + 1.0) * g * sigmoid(alpha * g)
        }
        Activation::SiluThenClamp { limit } => {
            let limit = f64::from(limit);
            silu(g).min(limit) * u.clamp(-limit, limit)
        }
        Activation::SoftcappedSilu { gate_cap, up_cap } => {
            let softcap = |x: f64, cap: f32| f64::from(cap) * (x / f64::from(cap)).tanh();
            softcap(g, gate_cap) * sigmoid(g) * softcap(u, up_cap)
        }
    }
}

#[test]
pub(super) fn activations_are_close_to_f64() {
    let g: Vec<f32> = (-200_000..=200_000).map(|i| i as f32 * 1e-3).chain((0..60).map(|i| 2f32.powi(-i))).collect();
    let ups: Vec<f32> = Numbers(1).vec::<f32>(g.len()).iter().map(|u| u * 12.0).collect();
    for kernels in all() {
        for activation in activations() {
            let up = if activation.is_gated() { &ups } else { &g };
            let mut out = up.clone();
            kernels.activation_into_up(activation, &g, &mut out);
            for ((g, u), got) in g.iter().zip(up).zip(&out) {
                let expected = exact(activation, f64::from(*g), f64::from(*u));
                let error = (f64::from(*got) - expected).abs();
                let bound = 1e-6 * expected.abs() + 1e-8 * f64::from((g.abs() + u.abs()).min(1.0));
                assert!(error <= bound, "{kernels:?} {activation:?}({g}, {u}) became {got:e}, not {expected:e}");
            }
        }
    }
}

#[test]
fn the_lower_tails_keep_their_digits() {
    for kernels in all() {
        for (f, from) in [(Function::Silu, -80.0), (Function::GeluErf, -6.0), (Function::GeluTanh, -4.0)] {
            let x: Vec<f32> = (0..10_000).map(|i| from * i as f32 / 10_000.0).collect();
            let mut out = x.clone();
            kernels.activation_into_up(Activation::Plain(f), &[], &mut out);
            for (x, got) in x.iter().zip(&out) {
                let expected = function(f, f64::from(*x));
                let error = (f64::from(*got) - expected).abs();
                assert!(error <= 3e-6 * expected.abs(), "{kernels:?} {f:?}({x}) became {got:e}, not {expected:e}");
            }
        }
    }
}

#[test]
fn what_is_not_finite() {
    for kernels in all() {
        let one = |activation, g: f32, u: f32| {
            let mut out = [u];
            kernels.activation_into_up(activation, &[g], &mut out);
            out[0]
        };
        for activation in activations() {
            assert!(one(activation, 1.0, f32::NAN).is_nan(), "{activation:?}");
            if activation.is_gated() {
                assert!(one(activation, f32::NAN, 1.0).is_nan(), "{activation:?}");
            }
        }
        for f in FUNCTIONS {
            let plain = Activation::Plain(f);
            assert_eq!(one(plain, 0.0, f32::INFINITY), f32::INFINITY, "{f:?}");
            assert_eq!(one(plain, 0.0, 0.0), 0.0, "{f:?}");
        }
        for f in [Function::Silu, Function::GeluTanh, Function::GeluErf] {
            assert_eq!(one(Activation::Plain(f), 0.0, -1e20), 0.0);
            assert_eq!(one(Activation::Plain(f), 0.0, 1e20), 1e20);
            assert!(one(Activation::Plain(f), 0.0, f32::NEG_INFINITY).is_nan());
        }
        assert_eq!(one(Activation::Gated(Function::Silu), -200.0, 1.0), 0.0);
        assert_eq!(one(Activation::ClampedSilu { limit: 7.0 }, f32::INFINITY, f32::NEG_INFINITY), {
            let mut out = [7.0];
            kernels.activation_into_up(Activation::Plain(Function::Silu), &[], &mut out);
            -7.0 * out[0]
        });
    }
}

#[test]
fn in_place_and_position_do_not_matter() {
    for kernels in all() {
        for activation in activations() {
            let (g, u): (Vec<f32>, Vec<f32>) = (Numbers(2).vec(67), Numbers(3).vec(67));
            let (mut gate, mut up) = (g.clone(), u.clone());
            kernels.activation_into_gate(activation, &mut gate, &u);
            kernels.activation_into_up(activation, &g, &mut up);
            assert_eq!(bits(&gate), bits(&up));
            for i in 0..67 {
                let mut alone = [u[i], 7.0];
                kernels.activation_into_up(activation, &g[i..=i], &mut alone[..1]);
                assert_eq!((alone[0].to_bits(), alone[1]), (up[i].to_bits(), 7.0));
            }
        }
        let mut up = [1.0, -1.0];
        kernels.activation_into_up(Activation::Plain(Function::Relu), &[], &mut up);
        assert_eq!(up, [1.0, 0.0]);
    }
}
