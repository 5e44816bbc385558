//! A dense matrix product: the shared expert's two matrices, and its gate.

/// Operands of [`linear`].
#[derive(Clone, Copy, Debug)]
pub struct Linear<'a> {
    /// `[rows, inputs]`.
    pub x: &'a [f64],
    /// `[outputs, inputs]`.
    pub weight: &'a [f64],
    /// `[outputs]`, or absent for zeros.
    pub bias: Option<&'a [f64]>,
    /// How many rows.
    pub rows: usize,
    /// Width of a row of `x`.
    pub inputs: usize,
    /// Width of a row of the result.
    pub outputs: usize,
}

/// `y[r,o] = sum_i x[r,i] * weight[o,i] + bias[o]`. Returns `[rows, outputs]`.
///
/// ```
/// use fused_moe_core::reference::{Linear, linear};
/// let y = linear(&Linear { x: &[1.0, 2.0], weight: &[3.0, 4.0], bias: Some(&[0.5]), rows: 1, inputs: 2, outputs: 1 });
/// assert_eq!(y, [11.5]);
/// ```
pub fn linear(op: &Linear<'_>) -> Vec<f64> {
    let mut y = Vec::with_capacity(op.rows * op.outputs);
    for r in 0..op.rows {
        for o in 0..op.outputs {
            let mut sum = 0.0;
            for i in 0..op.inputs {
                sum += op.x[r * op.inputs + i] * op.weight[o * op.inputs + i];
            }
            y.push(sum + op.bias.map_or(0.0, |bias| bias[o]));
        }
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let weight = [1.0, 0.0, 2.0, 0.0, 1.0, -1.0];
        let op =
            Linear { x: &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], weight: &weight, bias: None, rows: 2, inputs: 3, outputs: 2 };
        assert_eq!(linear(&op), [7.0, -1.0, 16.0, -1.0]);
        assert_eq!(linear(&Linear { bias: Some(&[10.0, 20.0]), ..op }), [17.0, 19.0, 26.0, 19.0]);
        assert!(linear(&Linear { x: &[], rows: 0, ..op }).is_empty());
    }
}
