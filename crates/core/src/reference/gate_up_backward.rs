//! Through the first matrix of the experts.

use super::Gather;

/// Operands of [`gate_up_backward`]; `x`, `gather`, `input_weights`, `offsets`, `gate_up` and the sizes as
/// [`gate_up`](fn@super::gate_up) had them.
#[derive(Clone, Copy, Debug)]
pub struct GateUpBackward<'a> {
    /// The gradient of the pre-activation, `[R, N]`, sorted by expert.
    pub d_z: &'a [f64],
    /// `[T, H]` with a gather, `[R, H]` sorted by expert without.
    pub x: &'a [f64],
    /// Which token a row reads.
    pub gather: Option<Gather<'a>>,
    /// `[T, K]` with a gather, `[R]` without; absent for ones.
    pub input_weights: Option<&'a [f64]>,
    /// `[E + 1]`: the rows of expert e are `offsets[e]..offsets[e+1]`.
    pub offsets: &'a [u32],
    /// `[E, N, H]`.
    pub gate_up: &'a [f64],
    /// R.
    pub rows: usize,
    /// H.
    pub hidden: usize,
    /// N, 2I or I.
    pub outputs: usize,
}

/// What [`gate_up_backward`] returns.
#[derive(Clone, Debug, PartialEq)]
pub struct GateUpGradients {
    /// `[R, H]`, of what went into the product: `w[r] * x[row(r)]`; rows past `offsets[E]` are 0.
    pub rows: Vec<f64>,
    /// Of x, as x lies: each token's rows times their weights, added in the order of the slots.
    pub x: Vec<f64>,
    /// `[R]`, in the order of `input_weights`; 0 where a slot has no row.
    pub input_weights: Vec<f64>,
    /// `[E, N, H]`; zeros for an expert without rows.
    pub gate_up: Vec<f64>,
    /// `[E, N]`; zeros for an expert without rows.
    pub bias: Vec<f64>,
}

/// The gradients of [`gate_up`](fn@super::gate_up), for every row r of every expert e:
///
/// ```text
/// d_rows[r,h]       = sum_n d_z[r,n] * gate_up[e,n,h]
/// d_x[t,h]          = sum_r w[r] * d_rows[r,h]              r over the rows that read t, in the order of their slots
/// d_w[r]            = sum_h x[row(r),h] * d_rows[r,h]
/// d_gate_up[e,n,h]  = sum_r d_z[r,n] * w[r] * x[row(r),h]   r over the rows of e
/// d_bias[e,n]       = sum_r d_z[r,n]
/// ```
///
/// ```
/// use fused_moe_core::reference::{GateUpBackward, Gather, gate_up_backward};
/// let d = gate_up_backward(&GateUpBackward {
///     d_z: &[1.0, 2.0], x: &[3.0], gather: Some(Gather { row_slot: &[1, 0], top_k: 2 }), input_weights: None,
///     offsets: &[0, 1, 2], gate_up: &[10.0, 100.0], rows: 2, hidden: 1, outputs: 1 });
/// assert_eq!((d.rows, d.x), (vec![10.0, 200.0], vec![210.0]));
/// assert_eq!((d.gate_up, d.bias), (vec![3.0, 6.0], vec![1.0, 2.0]));
/// ```
pub fn gate_up_backward(op: &GateUpBackward<'_>) -> GateUpGradients {
    let (hidden, outputs) = (op.hidden, op.outputs);
    let experts = op.offsets.len().saturating_sub(1);
    let mut d = GateUpGradients {
        rows: vec![0.0; op.rows * hidden],
        x: vec![0.0; op.x.len()],
        input_weights: vec![0.0; op.rows],
        gate_up: vec![0.0; experts * outputs * hidden],
        bias: vec![0.0; experts * outputs],
    };
    let mut row_of_slot = vec![None; op.rows];
    for (expert, range) in op.offsets.windows(2).enumerate() {
        for row in range[0] as usize..range[1] as usize {
            let (source, slot) = match op.gather {
                Some(gather) => (gather.row_slot[row] as usize / gather.top_k, gather.row_slot[row] as usize),
                None => (row, row),
            };
            row_of_slot[slot] = Some((row, source));
            let input_weight = op.input_weights.map_or(1.0, |weights| weights[slot]);
            for n in 0..outputs {
                let (d_z, matrix_row) = (op.d_z[row * outputs + n], expert * outputs + n);
                d.bias[matrix_row] += d_z;
                for h in 0..hidden {
                    d.rows[row * hidden + h] += d_z * op.gate_up[matrix_row * hidden + h];
                    d.gate_up[matrix_row * hidden + h] += d_z * (input_weight * op.x[source * hidden + h]);
                }
            }
        }
    }
    for (slot, found) in row_of_slot.into_iter().enumerate() {
        let Some((row, source)) = found else { continue };
        let input_weight = op.input_weights.map_or(1.0, |weights| weights[slot]);
        for h in 0..hidden {
            let d_row = d.rows[row * hidden + h];
            d.x[source * hidden + h] += input_weight * d_row;
            d.input_weights[slot] += op.x[source * hidden + h] * d_row;
        }
    }
    d
}
