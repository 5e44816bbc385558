//! From the gradient of the logits to those of the router, its norm and the tokens.

use super::norm_backward::{NormBackward, rms_norm_backward};
use super::{LinearBackward, linear_backward, rms_norm};
use crate::config::GateConfig;

/// Operands of [`gate_backward`]; `x`, `router`, `bias`, `norm_weight`, `config` and the sizes as
/// [`gate`](fn@super::gate) had them.
#[derive(Clone, Copy, Debug)]
pub struct GateBackward<'a> {
    /// The gradient of the logits, `[T, E]`.
    pub d_logits: &'a [f64],
    /// The gradient of the normalised tokens from whoever else read them (experts that the norm feeds), `[T, H]`. Without
    /// a norm, of x.
    pub d_normed: Option<&'a [f64]>,
    /// `[T, H]`.
    pub x: &'a [f64],
    /// `[E, H]`.
    pub router: &'a [f64],
    /// `[E]`, or absent for zeros.
    pub bias: Option<&'a [f64]>,
    /// `[H]`, or absent for ones.
    pub norm_weight: Option<&'a [f64]>,
    /// Norm, scale and softcap.
    pub config: GateConfig,
    /// T.
    pub tokens: usize,
    /// H.
    pub hidden: usize,
    /// E.
    pub experts: usize,
}

/// What [`gate_backward`] returns.
#[derive(Clone, Debug, PartialEq)]
pub struct GateGradients {
    /// `[T, H]`.
    pub x: Vec<f64>,
    /// `[E, H]`.
    pub router: Vec<f64>,
    /// `[E]`, whether there is a bias or zeros in its place.
    pub bias: Vec<f64>,
    /// `[H]`; empty without a norm.
    pub norm_weight: Vec<f64>,
}

/// The gradients of [`gate`](fn@super::gate): with `l = scale * (n . router^T) + bias` before the softcap,
///
/// ```text
/// d_l[t,e]       = d_logits[t,e] * (1 - tanh(l[t,e] / c)^2)                  as it is without a softcap
/// d_router[e,h]  = scale * sum_t d_l[t,e] * n[t,h]
/// d_bias[e]      = sum_t d_l[t,e]
/// d_n[t,h]       = scale * sum_e d_l[t,e] * router[e,h] + d_normed[t,h]
/// d_x            = d_n, or through the norm as rms_norm_backward has it
/// ```
///
/// ```
/// use fused_moe_core::{config::GateConfig, reference::{GateBackward, gate_backward}};
/// let d = gate_backward(&GateBackward { d_logits: &[1.0, 10.0], d_normed: None, x: &[3.0], router: &[5.0, 7.0], bias: None,
///     norm_weight: None, config: GateConfig { scale: 2.0, ..GateConfig::default() }, tokens: 1, hidden: 1, experts: 2 });
/// assert_eq!((d.x, d.router, d.bias), (vec![150.0], vec![6.0, 60.0], vec![1.0, 10.0]));
/// ```
pub fn gate_backward(op: &GateBackward<'_>) -> GateGradients {
    let (hidden, experts, scale) = (op.hidden, op.experts, f64::from(op.config.scale));
    let normed = match op.config.norm {
        Some(norm) => rms_norm(op.x, op.norm_weight, f64::from(norm.eps), hidden),
        None => op.x.to_vec(),
    };
    let (mut d_products, mut d_bias) = (Vec::with_capacity(op.d_logits.len()), vec![0.0; experts]);
    for t in 0..op.tokens {
        for (e, d_bias) in d_bias.iter_mut().enumerate() {
            let mut d_l = op.d_logits[t * experts + e];
            if let Some(cap) = op.config.softcap.map(f64::from) {
                let (n, router) = (&normed[t * hidden..(t + 1) * hidden], &op.router[e * hidden..(e + 1) * hidden]);
                let product: f64 = n.iter().zip(router).map(|(n, r)| n * r).sum();
                let tanh = ((scale * product + op.bias.map_or(0.0, |bias| bias[e])) / cap).tanh();
                d_l *= 1.0 - tanh * tanh;
            }
            *d_bias += d_l;
            d_products.push(scale * d_l);
        }
    }
    let (rows, inputs, outputs) = (op.tokens, hidden, experts);
    let d_y = &d_products;
    let product = linear_backward(&LinearBackward { x: &normed, weight: op.router, d_y, rows, inputs, outputs });
    let mut d_n = product.x;
    if let Some(d_normed) = op.d_normed {
        d_n.iter_mut().zip(d_normed).for_each(|(d, more)| *d += more);
    }
    let (x, norm_weight) = match op.config.norm {
        Some(norm) => {
            let (weight, eps) = (op.norm_weight, f64::from(norm.eps));
            let d = rms_norm_backward(&NormBackward { x: op.x, weight, eps, d_n: &d_n, hidden });
            (d.x, d.weight)
        }
        None => (d_n, Vec::new()),
    };
    GateGradients { x, router: product.weight, bias: d_bias, norm_weight }
}
