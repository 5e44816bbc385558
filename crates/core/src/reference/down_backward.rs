//! Through the second matrix of the experts.

/// Operands of [`down_backward`].
#[derive(Clone, Copy, Debug)]
pub struct DownBackward<'a> {
    /// The gradient of the experts' results, `[R, H]`, sorted by expert.
    pub d_y: &'a [f64],
    /// The activation's result, `[R, I]`, sorted by expert.
    pub a: &'a [f64],
    /// `[E + 1]`: the rows of expert e are `offsets[e]..offsets[e+1]`.
    pub offsets: &'a [u32],
    /// `[E, H, I]`.
    pub down: &'a [f64],
    /// R.
    pub rows: usize,
    /// H.
    pub hidden: usize,
    /// I.
    pub intermediate: usize,
}

/// What [`down_backward`] returns.
#[derive(Clone, Debug, PartialEq)]
pub struct DownGradients {
    /// `[R, I]`; rows past `offsets[E]` are 0.
    pub a: Vec<f64>,
    /// `[E, H, I]`; zeros for an expert without rows.
    pub down: Vec<f64>,
    /// `[E, H]`; zeros for an expert without rows.
    pub bias: Vec<f64>,
}

/// The gradients of [`down`](fn@super::down), for every row r of every expert e:
///
/// ```text
/// d_a[r,i]      = sum_h d_y[r,h] * down[e,h,i]
/// d_down[e,h,i] = sum_r d_y[r,h] * a[r,i]          r over the rows of e
/// d_bias[e,h]   = sum_r d_y[r,h]
/// ```
///
/// ```
/// use fused_moe_core::reference::{DownBackward, down_backward};
/// let d = down_backward(&DownBackward { d_y: &[10.0], a: &[1.0, 2.0], offsets: &[0, 1], down: &[3.0, 4.0], rows: 1,
///                                       hidden: 1, intermediate: 2 });
/// assert_eq!((d.a, d.down, d.bias), (vec![30.0, 40.0], vec![10.0, 20.0], vec![10.0]));
/// ```
pub fn down_backward(op: &DownBackward<'_>) -> DownGradients {
    let (hidden, intermediate) = (op.hidden, op.intermediate);
    let experts = op.offsets.len().saturating_sub(1);
    let mut d = DownGradients {
        a: vec![0.0; op.rows * intermediate],
        down: vec![0.0; experts * hidden * intermediate],
        bias: vec![0.0; experts * hidden],
    };
    for (expert, range) in op.offsets.windows(2).enumerate() {
        for row in range[0] as usize..range[1] as usize {
            for h in 0..hidden {
                let (d_y, matrix_row) = (op.d_y[row * hidden + h], expert * hidden + h);
                d.bias[matrix_row] += d_y;
                for i in 0..intermediate {
                    d.a[row * intermediate + i] += d_y * op.down[matrix_row * intermediate + i];
                    d.down[matrix_row * intermediate + i] += d_y * op.a[row * intermediate + i];
                }
            }
        }
    }
    d
}
