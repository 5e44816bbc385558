//! The derivatives of `config::Activation`, from gate and up.

use super::activation::{apply, clamp, function, softcap};
use super::math::{exp, normal};
use super::simd::{Simd, Task};
use fused_moe_core::config::{Activation, Function};

/// `1 / (1 + e^-x)` and one less it, both to full precision.
#[inline(always)]
fn sigmoids<S: Simd>(s: S, x: S::Vector) -> [S::Vector; 2] {
    let one = s.splat(1.0);
    let e = exp(s, s.sub(s.splat(0.0), s.abs(x)));
    let sum = s.add(one, e);
    [s.div(s.if_negative(x, e, one), sum), s.div(s.if_negative(x, one, e), sum)]
}

/// `f'(x)`.
#[inline(always)]
fn slope<S: Simd>(s: S, f: Function, x: S::Vector) -> S::Vector {
    // Beyond it every function here is 0 or x to the last bit, and the powers of x would overflow.
    const FAR: f32 = 64.0;
    match f {
        Function::Silu => swish(s, 1.0, x),
        Function::GeluTanh => {
            const SLOPE: f32 = 2.0 * 0.797_884_6;
            let c = clamp(s, x, FAR);
            let square = s.mul(c, c);
            let y = s.mul(c, s.fma(square, s.splat(SLOPE * 0.044_715), s.splat(SLOPE)));
            let [value, rest] = sigmoids(s, y);
            let inner = s.fma(square, s.splat(3.0 * SLOPE * 0.044_715), s.splat(SLOPE));
            s.fma(s.mul(s.mul(c, value), rest), inner, value)
        }
        Function::GeluErf => {
            const DENSITY: f32 = 0.398_942_3;
            let c = clamp(s, x, FAR);
            let density = s.mul(exp(s, s.mul(s.splat(-0.5), s.mul(c, c))), s.splat(DENSITY));
            s.fma(c, density, normal(s, c))
        }
        Function::Relu => s.if_negative(s.sub(s.splat(0.0), x), s.splat(1.0), s.splat(0.0)),
        Function::ReluSquared => {
            let x = s.max(s.splat(0.0), x);
            s.add(x, x)
        }
        Function::Identity => s.splat(1.0),
    }
}

/// The derivative of `x * sigmoid(alpha * x)`.
#[inline(always)]
fn swish<S: Simd>(s: S, alpha: f32, x: S::Vector) -> S::Vector {
    let x = s.mul(s.splat(alpha), x);
    let [value, rest] = sigmoids(s, x);
    s.fma(s.mul(x, value), rest, value)
}

/// 1 where x is at most the limit, else 0.
#[inline(always)]
fn below<S: Simd>(s: S, x: S::Vector, limit: f32) -> S::Vector {
    s.if_negative(s.sub(s.splat(limit), x), s.splat(0.0), s.splat(1.0))
}

/// The derivative of `cap * tanh(x / cap)`, as a product of sigmoids: `1 - tanh^2` would cancel.
#[inline(always)]
fn softcap_slope<S: Simd>(s: S, x: S::Vector, cap: f32) -> S::Vector {
    let [value, rest] = sigmoids(s, s.div(s.add(x, x), s.splat(cap)));
    s.mul(s.splat(4.0), s.mul(value, rest))
}

/// The derivatives by g and by u; the first means nothing without gate.
#[inline(always)]
fn derivatives<S: Simd>(s: S, activation: Activation, g: S::Vector, u: S::Vector) -> [S::Vector; 2] {
    let within = |limit| below(s, s.abs(u), limit);
    match activation {
        Activation::Gated(f) => [s.mul(slope(s, f, g), u), function(s, f, g)],
        Activation::ClampedSilu { limit } => {
            let m = s.min(s.splat(limit), g);
            let by_gate = s.mul(s.mul(below(s, g, limit), swish(s, 1.0, m)), clamp(s, u, limit));
            [by_gate, s.mul(within(limit), function(s, Function::Silu, m))]
        }
        Activation::ClampedSwish { alpha, limit } => {
            let m = s.min(s.splat(limit), g);
            let [value, _] = sigmoids(s, s.mul(s.splat(alpha), m));
            let factor = s.add(clamp(s, u, limit), s.splat(1.0));
            [s.mul(s.mul(below(s, g, limit), swish(s, alpha, m)), factor), s.mul(within(limit), s.mul(m, value))]
        }
        Activation::SiluThenClamp { limit } => {
            let silu = function(s, Function::Silu, g);
            let by_gate = s.mul(s.mul(below(s, silu, limit), swish(s, 1.0, g)), clamp(s, u, limit));
            [by_gate, s.mul(within(limit), s.min(s.splat(limit), silu))]
        }
        Activation::SoftcappedSilu { gate_cap, up_cap } => {
            let [value, rest] = sigmoids(s, g);
            let gate = softcap(s, g, gate_cap);
            let by_gate = s.mul(s.fma(gate, rest, softcap_slope(s, g, gate_cap)), value);
            let by_up = s.mul(s.mul(gate, value), softcap_slope(s, u, up_cap));
            [s.mul(by_gate, softcap(s, u, up_cap)), by_up]
        }
        Activation::Plain(f) => [s.splat(0.0), slope(s, f, u)],
    }
}

/// `gate = d_a * w * da/dg`, `up = d_a * w * da/du`, `d_a = a`, from gate, up and d_a.
pub(super) struct ActivateBackward<'a> {
    pub(super) activation: Activation,
    pub(super) gate: &'a mut [f32],
    pub(super) up: &'a mut [f32],
    pub(super) d_a: &'a mut [f32],
    pub(super) weight: f32,
}

impl Task for ActivateBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { activation, gate, up, d_a, weight } = self;
        let weight = s.splat(weight);
        if !activation.is_gated() {
            let n = up.len().min(d_a.len());
            for (u, d_a) in up[..n].chunks_mut(S::LANES).zip(d_a[..n].chunks_mut(S::LANES)) {
                let (up, d) = (s.load(u), s.mul(weight, s.load(d_a)));
                let [_, by_up] = derivatives(s, activation, up, up);
                s.store(s.mul(d, by_up), u);
                s.store(apply(s, activation, up, up), d_a);
            }
            return;
        }
        let n = gate.len().min(up.len()).min(d_a.len());
        let rows = gate[..n].chunks_mut(S::LANES).zip(up[..n].chunks_mut(S::LANES));
        for ((g, u), d_a) in rows.zip(d_a[..n].chunks_mut(S::LANES)) {
            let (gate, up, d) = (s.load(g), s.load(u), s.mul(weight, s.load(d_a)));
            let [by_gate, by_up] = derivatives(s, activation, gate, up);
            s.store(s.mul(d, by_gate), g);
            s.store(s.mul(d, by_up), u);
            s.store(apply(s, activation, gate, up), d_a);
        }
    }
}
