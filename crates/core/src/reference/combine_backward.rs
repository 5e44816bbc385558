//! From tokens back to the experts' rows.

use super::{Shared, SharedGate, sigmoid};
use crate::NO_ROW;

/// Operands of [`combine_backward`]; `y`, `slot_row`, `weights`, `routed_scale`, `shared` and the sizes as
/// [`combine`](fn@super::combine) had them.
#[derive(Clone, Copy, Debug)]
pub struct CombineBackward<'a> {
    /// The gradient of the result, `[T, H]`.
    pub d_out: &'a [f64],
    /// Slots `[T, K, H]`, or rows `[R, H]` sorted by expert with a `slot_row`.
    pub y: &'a [f64],
    /// `[R]`: the row of a slot.
    pub slot_row: Option<&'a [u32]>,
    /// `[T, K]`, or absent for ones.
    pub weights: Option<&'a [f64]>,
    /// Factor on the sum over the slots.
    pub routed_scale: f64,
    /// The shared expert's part.
    pub shared: Option<Shared<'a>>,
    /// T.
    pub tokens: usize,
    /// H.
    pub hidden: usize,
    /// K.
    pub top_k: usize,
}

/// What [`combine_backward`] returns.
#[derive(Clone, Debug, PartialEq)]
pub struct CombineGradients {
    /// As `y` lies; 0 in rows that no slot has.
    pub y: Vec<f64>,
    /// `[T, K]`; 0 where a slot has no row.
    pub weights: Vec<f64>,
    /// Of the shared expert's result, `[T, H]`; empty without one.
    pub shared_y: Vec<f64>,
    /// Of the shared expert's factors or of their logits, as they were given, `[T]`; empty where there are none.
    pub shared_gate: Vec<f64>,
}

/// The gradients of [`combine`](fn@super::combine) without its next norm (whose gradient is
/// [`rms_norm_backward`](super::rms_norm_backward)'s and is part of `d_out`):
///
/// ```text
/// d_y[t,k]        = routed_scale * w[t,k] * d_out[t]
/// d_w[t,k]        = routed_scale * sum_h y[t,k,h] * d_out[t,h]
/// d_y_shared[t]   = shared_scale * s[t] * d_out[t]
/// d_s[t]          = shared_scale * sum_h y_shared[t,h] * d_out[t,h]      times s[t] * (1 - s[t]) for a logit
/// d_residual      = d_out                                                (not returned)
/// ```
///
/// ```
/// use fused_moe_core::reference::{CombineBackward, combine_backward};
/// let d = combine_backward(&CombineBackward {
///     d_out: &[2.0], y: &[1.0, 10.0], slot_row: Some(&[1, 0]), weights: Some(&[0.5, 3.0]), routed_scale: 1.0, shared: None,
///     tokens: 1, hidden: 1, top_k: 2 });
/// assert_eq!((d.y, d.weights), (vec![6.0, 1.0], vec![20.0, 2.0]));
/// ```
pub fn combine_backward(op: &CombineBackward<'_>) -> CombineGradients {
    let hidden = op.hidden;
    let mut d = CombineGradients {
        y: vec![0.0; op.tokens * op.top_k * hidden],
        weights: vec![0.0; op.tokens * op.top_k],
        shared_y: Vec::new(),
        shared_gate: Vec::new(),
    };
    for t in 0..op.tokens {
        let d_out = &op.d_out[t * hidden..(t + 1) * hidden];
        for slot in t * op.top_k..(t + 1) * op.top_k {
            let row = op.slot_row.map_or(slot as u32, |slot_row| slot_row[slot]);
            if row == NO_ROW {
                continue;
            }
            let weight = op.weights.map_or(1.0, |weights| weights[slot]);
            for (at, d_out) in (row as usize * hidden..).zip(d_out) {
                d.y[at] = op.routed_scale * weight * d_out;
                d.weights[slot] += op.routed_scale * op.y[at] * d_out;
            }
        }
        let Some(shared) = op.shared else { continue };
        let (factor, slope) = match shared.gate {
            SharedGate::None => (1.0, None),
            SharedGate::Factor(factors) => (factors[t], Some(1.0)),
            SharedGate::Logit(logits) => (sigmoid(logits[t]), Some(sigmoid(logits[t]) * sigmoid(-logits[t]))),
        };
        let mut sum = 0.0;
        for (at, d_out) in (t * hidden..).zip(d_out) {
            d.shared_y.push(shared.scale * factor * d_out);
            sum += shared.y[at] * d_out;
        }
        d.shared_gate.extend(slope.map(|slope| shared.scale * sum * slope));
    }
    d
}

/// Operands of [`weights_backward`].
#[derive(Clone, Copy, Debug)]
pub struct WeightsBackward<'a> {
    /// The activation's result, `[R, I]`, sorted by expert.
    pub a: &'a [f64],
    /// Its gradient `[R, I]` if each row's result had weight one: `d_a[r,i] = sum_h d_out[t,h] * down[e,h,i]`.
    pub d_a: &'a [f64],
    /// `[R]`: the row of a slot.
    pub slot_row: &'a [u32],
    /// The bias of down, which is part of a result too.
    pub bias: Option<DownBias<'a>>,
    /// Factor on the sum over the slots.
    pub routed_scale: f64,
    /// I.
    pub intermediate: usize,
}

/// The bias of down, for [`weights_backward`].
#[derive(Clone, Copy, Debug)]
pub struct DownBias<'a> {
    /// `[E, H]`.
    pub bias: &'a [f64],
    /// `[T, K]`: the expert of a slot; a slot with a row has one that exists.
    pub experts: &'a [u32],
    /// The gradient of the result, `[T, H]`.
    pub d_out: &'a [f64],
    /// K.
    pub top_k: usize,
    /// H.
    pub hidden: usize,
}

/// The gradient of the routing weights without the experts' results, `[T, K]`:
///
/// ```text
/// d_w[t,k] = routed_scale * (sum_i a[r,i] * d_a[r,i] + sum_h bias[e,h] * d_out[t,h]),   r = slot_row[t*K + k]
/// ```
///
/// which is what [`combine_backward`] makes of `y[r] = down[e] a[r] + bias[e]`. 0 where a slot has no row.
///
/// ```
/// use fused_moe_core::reference::{WeightsBackward, weights_backward};
/// let op = WeightsBackward { a: &[1.0, 2.0], d_a: &[3.0, 4.0], slot_row: &[0], bias: None, routed_scale: 2.0,
///                            intermediate: 2 };
/// assert_eq!(weights_backward(&op), [22.0]);
/// ```
pub fn weights_backward(op: &WeightsBackward<'_>) -> Vec<f64> {
    let mut d_weights = Vec::with_capacity(op.slot_row.len());
    for (slot, &row) in op.slot_row.iter().enumerate() {
        let mut sum = 0.0;
        if row != NO_ROW {
            for at in row as usize * op.intermediate..(row as usize + 1) * op.intermediate {
                sum += op.a[at] * op.d_a[at];
            }
            if let Some(DownBias { bias, experts, d_out, top_k, hidden }) = op.bias {
                let (expert, token) = (experts[slot] as usize, slot / top_k);
                for h in 0..hidden {
                    sum += bias[expert * hidden + h] * d_out[token * hidden + h];
                }
            }
        }
        d_weights.push(op.routed_scale * sum);
    }
    d_weights
}
