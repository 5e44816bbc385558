//! The activations of `config::Activation`, from gate and up.

use super::math::{normal, sigmoid, tanh};
use super::simd::{Simd, Task};
use fused_moe_core::config::{Activation, Function};

/// `f(x)`.
#[inline(always)]
pub(super) fn function<S: Simd>(s: S, f: Function, x: S::Vector) -> S::Vector {
    match f {
        Function::Silu => s.mul(x, sigmoid(s, x)),
        Function::GeluTanh => {
            // (1 + tanh(y)) / 2 = sigmoid(2y), which does not cancel; this is 2y / x.
            const SLOPE: f32 = 2.0 * 0.797_884_6;
            let y = s.fma(s.mul(x, x), s.splat(SLOPE * 0.044_715), s.splat(SLOPE));
            s.mul(x, sigmoid(s, s.mul(x, y)))
        }
        Function::GeluErf => s.mul(x, normal(s, x)),
        Function::Relu => s.max(s.splat(0.0), x),
        Function::ReluSquared => {
            let x = s.max(s.splat(0.0), x);
            s.mul(x, x)
        }
        Function::Identity => x,
    }
}

/// The activation of g and u.
#[inline(always)]
pub(super) fn apply<S: Simd>(s: S, activation: Activation, g: S::Vector, u: S::Vector) -> S::Vector {
    match activation {
        Activation::Gated(f) => s.mul(function(s, f, g), u),
        Activation::ClampedSilu { limit } => {
            s.mul(function(s, Function::Silu, s.min(s.splat(limit), g)), clamp(s, u, limit))
        }
        Activation::ClampedSwish { alpha, limit } => {
            let g = s.min(s.splat(limit), g);
            let swish = s.mul(g, sigmoid(s, s.mul(s.splat(alpha), g)));
            s.mul(s.add(clamp(s, u, limit), s.splat(1.0)), swish)
        }
        Activation::SiluThenClamp { limit } => {
            s.mul(s.min(s.splat(limit), function(s, Function::Silu, g)), clamp(s, u, limit))
        }
        Activation::SoftcappedSilu { gate_cap, up_cap } => {
            s.mul(s.mul(softcap(s, g, gate_cap), sigmoid(s, g)), softcap(s, u, up_cap))
        }
        Activation::Plain(f) => function(s, f, u),
    }
}

/// `cap * tanh(x / cap)`.
#[inline(always)]
pub(super) fn softcap<S: Simd>(s: S, x: S::Vector, cap: f32) -> S::Vector {
    s.mul(s.splat(cap), tanh(s, s.div(x, s.splat(cap))))
}

/// x between -limit and limit; NaN stays.
#[inline(always)]
pub(super) fn clamp<S: Simd>(s: S, x: S::Vector, limit: f32) -> S::Vector {
    s.min(s.splat(limit), s.max(s.splat(-limit), x))
}

/// Which buffers are read and written.
pub(super) enum Buffers<'a> {
    /// `gate = act(gate, up)`.
    IntoGate { gate: &'a mut [f32], up: &'a [f32] },
    /// `up = act(gate, up)`.
    IntoUp { gate: &'a [f32], up: &'a mut [f32] },
}

/// An activation over rows of gate and up.
pub(super) struct Activate<'a> {
    pub(super) activation: Activation,
    pub(super) buffers: Buffers<'a>,
}

impl Task for Activate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let activation = self.activation;
        match self.buffers {
            Buffers::IntoGate { gate, up } => {
                let n = gate.len().min(up.len());
                for (g, u) in gate[..n].chunks_mut(S::LANES).zip(up[..n].chunks(S::LANES)) {
                    s.store(apply(s, activation, s.load(g), s.load(u)), g);
                }
            }
            Buffers::IntoUp { gate, up } if activation.is_gated() => {
                let n = gate.len().min(up.len());
                for (g, u) in gate[..n].chunks(S::LANES).zip(up[..n].chunks_mut(S::LANES)) {
                    s.store(apply(s, activation, s.load(g), s.load(u)), u);
                }
            }
            Buffers::IntoUp { gate: _, up } => {
                for u in up.chunks_mut(S::LANES) {
                    s.store(apply(s, activation, s.splat(0.0), s.load(u)), u);
                }
            }
        }
    }
}
