//! Through a dense matrix product.

/// Operands of [`linear_backward`].
#[derive(Clone, Copy, Debug)]
pub struct LinearBackward<'a> {
    /// `[rows, inputs]`.
    pub x: &'a [f64],
    /// `[outputs, inputs]`.
    pub weight: &'a [f64],
    /// The gradient of the result, `[rows, outputs]`.
    pub d_y: &'a [f64],
    /// How many rows.
    pub rows: usize,
    /// Width of a row of `x`.
    pub inputs: usize,
    /// Width of a row of the result.
    pub outputs: usize,
}

/// What [`linear_backward`] returns.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearGradients {
    /// `[rows, inputs]`.
    pub x: Vec<f64>,
    /// `[outputs, inputs]`.
    pub weight: Vec<f64>,
    /// `[outputs]`.
    pub bias: Vec<f64>,
}

/// The gradients of [`linear`](super::linear):
///
/// ```text
/// d_x[r,i]      = sum_o d_y[r,o] * weight[o,i]
/// d_weight[o,i] = sum_r d_y[r,o] * x[r,i]
/// d_bias[o]     = sum_r d_y[r,o]
/// ```
///
/// ```
/// use fused_moe_core::reference::{LinearBackward, linear_backward};
/// let op = LinearBackward { x: &[1.0, 2.0], weight: &[3.0, 4.0], d_y: &[10.0], rows: 1, inputs: 2, outputs: 1 };
/// let d = linear_backward(&op);
/// assert_eq!((d.x, d.weight, d.bias), (vec![30.0, 40.0], vec![10.0, 20.0], vec![10.0]));
/// ```
pub fn linear_backward(op: &LinearBackward<'_>) -> LinearGradients {
    let (inputs, outputs) = (op.inputs, op.outputs);
    let mut d = LinearGradients {
        x: vec![0.0; op.rows * inputs],
        weight: vec![0.0; outputs * inputs],
        bias: vec![0.0; outputs],
    };
    for r in 0..op.rows {
        for o in 0..outputs {
            let d_y = op.d_y[r * outputs + o];
            d.bias[o] += d_y;
            for i in 0..inputs {
                d.x[r * inputs + i] += d_y * op.weight[o * inputs + i];
                d.weight[o * inputs + i] += d_y * op.x[r * inputs + i];
            }
        }
    }
    d
}
