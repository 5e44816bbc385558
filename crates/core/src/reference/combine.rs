//! From the experts' rows back to tokens.

use super::{norm::rms_norm, sigmoid};
use crate::NO_ROW;

/// Operands of [`combine`].
#[derive(Clone, Copy, Debug)]
pub struct Combine<'a> {
    /// The experts' results: slots `[T, K, H]`, or rows sorted by expert `[R, H]` with a `slot_row`.
    pub y: &'a [f64],
    /// `[R]`: the row of a slot. Absent where `y` is in slots.
    pub slot_row: Option<&'a [u32]>,
    /// `[T, K]`, or absent for ones (the weights were applied to the experts' input).
    pub weights: Option<&'a [f64]>,
    /// Slots whose part is the token itself.
    pub copies: Option<Copies<'a>>,
    /// Factor on the sum over the slots.
    pub routed_scale: f64,
    /// The shared expert's part.
    pub shared: Option<Shared<'a>>,
    /// `[T, H]`, added.
    pub residual: Option<&'a [f64]>,
    /// The norm that follows.
    pub norm: Option<Norm<'a>>,
    /// T.
    pub tokens: usize,
    /// H.
    pub hidden: usize,
    /// K.
    pub top_k: usize,
}

/// Slots of experts that return the token, part of [`Combine`].
#[derive(Clone, Copy, Debug)]
pub struct Copies<'a> {
    /// `[T, H]`.
    pub x: &'a [f64],
    /// `[T, K]`.
    pub ids: &'a [u32],
    /// The first of them.
    pub first: usize,
    /// One past the last.
    pub end: usize,
}

/// The shared expert's part of [`Combine`].
#[derive(Clone, Copy, Debug)]
pub struct Shared<'a> {
    /// Its result, `[T, H]`.
    pub y: &'a [f64],
    /// What multiplies a token's row.
    pub gate: SharedGate<'a>,
    /// What multiplies all.
    pub scale: f64,
}

/// What multiplies a token's row of the shared expert's result.
#[derive(Clone, Copy, Debug)]
pub enum SharedGate<'a> {
    /// One.
    None,
    /// `[T]`, the factors themselves.
    Factor(&'a [f64]),
    /// `[T]`, the factors are the sigmoids of these.
    Logit(&'a [f64]),
}

/// The RMSNorm after the layer.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// `[H]`, or absent for ones.
    pub weight: Option<&'a [f64]>,
    /// Added to the mean square.
    pub eps: f64,
}

/// What [`combine`] returns.
#[derive(Clone, Debug, PartialEq)]
pub struct Combined {
    /// `[T, H]`.
    pub out: Vec<f64>,
    /// `[T, H]`, if a norm was asked for.
    pub normed: Option<Vec<f64>>,
}

/// Weighted sum of each token's rows, and what is added to it:
///
/// ```text
/// routed[t]  = routed_scale * sum_k w[t,k] * y[t,k]                          k = 0, 1, .., K-1 in this order
/// out[t]     = residual[t] + (routed[t] + shared_scale * s[t] * y_shared[t])
/// normed[t]  = out[t] / sqrt(mean(out[t]^2) + eps) * norm_weight
/// ```
///
/// with `y[t,k] = y[slot_row[t*K + k]]` for sorted rows, and `s[t]` one, the factor, or the sigmoid of the logit. Absent
/// parts are left out.
///
/// Where the slot's id lies in `copies.first .. copies.end`, `y[t,k]` is `x[t]`, whatever its row. Another
/// slot whose `slot_row` is [`NO_ROW`] contributes nothing, whatever its weight. Every other slot is multiplied as
/// it is: weight 0 times a y that is not finite is NaN.
///
/// ```
/// use fused_moe_core::reference::{Combine, combine};
/// let op = Combine { y: &[1.0, 10.0], slot_row: Some(&[1, 0]), weights: Some(&[0.5, 2.0]), copies: None,
///                    routed_scale: 1.0, shared: None, residual: Some(&[100.0]), norm: None, tokens: 1, hidden: 1, top_k: 2 };
/// assert_eq!(combine(&op).out, [107.0]);
/// ```
pub fn combine(op: &Combine<'_>) -> Combined {
    let mut out = Vec::with_capacity(op.tokens * op.hidden);
    for t in 0..op.tokens {
        for h in 0..op.hidden {
            let mut sum = 0.0;
            for slot in t * op.top_k..(t + 1) * op.top_k {
                let row = op.slot_row.map_or(slot as u32, |slot_row| slot_row[slot]);
                let copied =
                    op.copies.filter(|copies| (copies.first..copies.end).contains(&(copies.ids[slot] as usize)));
                let part = match copied {
                    Some(copies) => copies.x[t * op.hidden + h],
                    None if row == NO_ROW => continue,
                    None => op.y[row as usize * op.hidden + h],
                };
                sum += op.weights.map_or(1.0, |weights| weights[slot]) * part;
            }
            let mut value = op.routed_scale * sum;
            if let Some(shared) = op.shared {
                value += shared.scale * shared.gate.factor(t) * shared.y[t * op.hidden + h];
            }
            if let Some(residual) = op.residual {
                value += residual[t * op.hidden + h];
            }
            out.push(value);
        }
    }
    let normed = op.norm.map(|norm| rms_norm(&out, norm.weight, norm.eps, op.hidden));
    Combined { out, normed }
}

impl SharedGate<'_> {
    fn factor(&self, t: usize) -> f64 {
        match self {
            Self::None => 1.0,
            Self::Factor(factors) => factors[t],
            Self::Logit(logits) => sigmoid(logits[t]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op() -> Combine<'static> {
        Combine {
            y: &[1.0, 2.0, 10.0, 20.0, 100.0, 200.0, 3.0, 4.0],
            slot_row: None,
            weights: Some(&[0.5, 0.25, 2.0, 1.0]),
            copies: None,
            routed_scale: 1.0,
            shared: None,
            residual: None,
            norm: None,
            tokens: 2,
            hidden: 2,
            top_k: 2,
        }
    }

    #[test]
    fn slots_and_sorted_rows() {
        assert_eq!(combine(&op()).out, [3.0, 6.0, 203.0, 404.0]);
        let y = [100.0, 200.0, 3.0, 4.0, 10.0, 20.0, 1.0, 2.0];
        assert_eq!(combine(&Combine { y: &y, slot_row: Some(&[3, 2, 0, 1]), ..op() }), combine(&op()));
        assert_eq!(combine(&Combine { weights: None, ..op() }).out, [11.0, 22.0, 103.0, 204.0]);
    }

    #[test]
    fn some_slots_are_the_token_itself() {
        // slots 1 and 3 are of experts 4 and 5; the first has no row, the second one that is not read
        let copies = Some(Copies { x: &[7.0, 8.0, 9.0, 11.0], ids: &[0, 4, 6, 5], first: 4, end: 6 });
        let rows = Combine { slot_row: Some(&[0, NO_ROW, 2, 3]), copies, routed_scale: 2.0, ..op() };
        assert_eq!(combine(&rows).out, [2.0 * (0.5 + 0.25 * 7.0), 2.0 * (1.0 + 0.25 * 8.0), 418.0, 822.0]);
    }

    #[test]
    fn a_slot_without_a_row_contributes_nothing_but_a_zero_weight_multiplies() {
        let weights = [f64::NAN, 1.0, 2.0, 1.0];
        let y = [10.0, 20.0, 3.0, 4.0];
        let absent = Combine { y: &y, slot_row: Some(&[NO_ROW, 0, NO_ROW, 1]), weights: Some(&weights), ..op() };
        assert_eq!(combine(&absent).out, [10.0, 20.0, 3.0, 4.0]);
        let none = combine(&Combine { y: &[], slot_row: Some(&[NO_ROW; 4]), ..op() });
        assert_eq!(none.out, [0.0; 4]);
        let infinite = Combine { y: &[f64::INFINITY, 1.0, 1.0, 1.0], weights: Some(&[0.0, 1.0]), tokens: 1, ..op() };
        let out = combine(&infinite).out;
        assert!(out[0].is_nan() && out[1] == 1.0);
    }

    #[test]
    fn all_parts() {
        let shared = Shared { y: &[1.0, 2.0, 3.0, 4.0], gate: SharedGate::None, scale: 0.5 };
        let base = Combine { routed_scale: 2.0, residual: Some(&[1000.0, 0.0, 0.0, 0.0]), ..op() };
        let with = |gate| combine(&Combine { shared: Some(Shared { gate, ..shared }), ..base }).out;
        assert_eq!(with(SharedGate::None), [1006.5, 13.0, 407.5, 810.0]);
        assert_eq!(with(SharedGate::Factor(&[2.0, 0.0])), [1007.0, 14.0, 406.0, 808.0]);
        assert_eq!(with(SharedGate::Logit(&[0.0, f64::INFINITY])), [1006.25, 12.5, 407.5, 810.0]);
    }

    #[test]
    fn the_norm_reads_the_finished_row() {
        let residual = [0.0, -2.0, 0.0, 0.0];
        let op =
            Combine { residual: Some(&residual), norm: Some(Norm { weight: Some(&[4.0, 1.0]), eps: 3.5 }), ..op() };
        let combined = combine(&op);
        assert_eq!(combined.out[..2], [3.0, 4.0]);
        assert_eq!(combined.normed.map(|normed| normed[..2].to_vec()), Some(vec![3.0, 1.0]));
        assert_eq!(combine(&Combine { norm: None, ..op }).normed, None);
        assert!(combine(&Combine { tokens: 0, ..op }).out.is_empty());
    }
}
