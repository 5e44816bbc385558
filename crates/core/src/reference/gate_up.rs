//! The first matrix of the experts: grouped by expert, one row a slot.

/// Operands of [`gate_up`].
#[derive(Clone, Copy, Debug)]
pub struct GateUp<'a> {
    /// `[T, H]` with a gather, `[R, H]` sorted by expert without.
    pub x: &'a [f64],
    /// Which token a row reads.
    pub gather: Option<Gather<'a>>,
    /// Multiplies the input row: the weight of the row's slot with a gather (`[T, K]`), of the row itself without
    /// (`[R]`). Absent for ones.
    pub input_weights: Option<&'a [f64]>,
    /// `[E + 1]`: the rows of expert e are `offsets[e]..offsets[e+1]`.
    pub offsets: &'a [u32],
    /// `[E, N, H]`: for a gated activation N = 2I, the I rows of the gate first, then the I rows of up; else N = I.
    pub gate_up: &'a [f64],
    /// `[E, N]`, or absent for zeros. Not multiplied by an input weight.
    pub bias: Option<&'a [f64]>,
    /// R.
    pub rows: usize,
    /// H.
    pub hidden: usize,
    /// N, 2I or I.
    pub outputs: usize,
}

/// How a row finds its token.
#[derive(Clone, Copy, Debug)]
pub struct Gather<'a> {
    /// `[R]`: the slot of a row.
    pub row_slot: &'a [u32],
    /// K: slot r belongs to token `r / K`.
    pub top_k: usize,
}

/// The pre-activation: `z[r,n] = sum_h (w[r] * x[row(r),h]) * gate_up[e,n,h] + bias[e,n]` for every row r of every
/// expert e, with `row(r) = row_slot[r] / K` or r, and `w[r]` the input weight or 1. Returns `[R, N]`.
///
/// Rows past `offsets[E]` are 0, and their `row_slot` is not read.
///
/// ```
/// use fused_moe_core::reference::{GateUp, Gather, gate_up};
/// let z = gate_up(&GateUp { x: &[1.0, 2.0], gather: Some(Gather { row_slot: &[1, 0], top_k: 1 }), input_weights: None,
///                           offsets: &[0, 1, 2], gate_up: &[10.0, 100.0], bias: None, rows: 2, hidden: 1, outputs: 1 });
/// assert_eq!(z, [20.0, 100.0]);
/// ```
pub fn gate_up(op: &GateUp<'_>) -> Vec<f64> {
    let mut z = vec![0.0; op.rows * op.outputs];
    for (expert, range) in op.offsets.windows(2).enumerate() {
        for row in range[0] as usize..range[1] as usize {
            let (source, slot) = match op.gather {
                Some(gather) => (gather.row_slot[row] as usize / gather.top_k, gather.row_slot[row] as usize),
                None => (row, row),
            };
            let input_weight = op.input_weights.map_or(1.0, |weights| weights[slot]);
            for n in 0..op.outputs {
                let matrix_row = expert * op.outputs + n;
                let mut sum = 0.0;
                for h in 0..op.hidden {
                    sum += (input_weight * op.x[source * op.hidden + h]) * op.gate_up[matrix_row * op.hidden + h];
                }
                z[row * op.outputs + n] = sum + op.bias.map_or(0.0, |bias| bias[matrix_row]);
            }
        }
    }
    z
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NO_ROW;

    fn op() -> GateUp<'static> {
        GateUp {
            x: &[1.0, 2.0, 3.0, 4.0],
            gather: Some(Gather { row_slot: &[2, 1, 3, NO_ROW], top_k: 2 }),
            input_weights: None,
            offsets: &[0, 1, 1, 3],
            gate_up: &[1.0, 0.0, 0.0, 1.0, 9.0, 9.0, 9.0, 9.0, 1.0, 1.0, 1.0, -1.0],
            bias: None,
            rows: 4,
            hidden: 2,
            outputs: 2,
        }
    }

    #[test]
    fn gathers_tokens_and_leaves_the_rest_zero() {
        assert_eq!(gate_up(&op()), [3.0, 4.0, 3.0, -1.0, 7.0, -1.0, 0.0, 0.0]);
    }

    #[test]
    fn rows_as_they_are() {
        let x = [3.0, 4.0, 1.0, 2.0, 3.0, 4.0, f64::NAN, f64::NAN];
        assert_eq!(gate_up(&GateUp { x: &x, gather: None, ..op() }), gate_up(&op()));
    }

    #[test]
    fn bias_per_expert_and_input_weight_per_slot() {
        let bias = [0.5, 0.25, 9.0, 9.0, 100.0, 200.0];
        let biased = gate_up(&GateUp { bias: Some(&bias), ..op() });
        assert_eq!(biased, [3.5, 4.25, 103.0, 199.0, 107.0, 199.0, 0.0, 0.0]);
        let weights = [7.0, 2.0, 10.0, 3.0];
        let weighted = gate_up(&GateUp { bias: Some(&bias), input_weights: Some(&weights), ..op() });
        assert_eq!(weighted, [30.5, 40.25, 106.0, 198.0, 121.0, 197.0, 0.0, 0.0]);
        let x = [3.0, 4.0, 1.0, 2.0, 3.0, 4.0, 0.0, 0.0];
        let by_row =
            GateUp { x: &x, gather: None, bias: Some(&bias), input_weights: Some(&[10.0, 2.0, 3.0, 0.0]), ..op() };
        assert_eq!(gate_up(&by_row), weighted);
    }

    #[test]
    fn no_rows() {
        let gather = Some(Gather { row_slot: &[], top_k: 2 });
        assert!(gate_up(&GateUp { x: &[], gather, offsets: &[0; 4], rows: 0, ..op() }).is_empty());
    }
}
