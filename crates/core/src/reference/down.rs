//! The second matrix of the experts.

/// Operands of [`down`].
#[derive(Clone, Copy, Debug)]
pub struct Down<'a> {
    /// The activation's result, `[R, I]`, sorted by expert.
    pub a: &'a [f64],
    /// `[E + 1]`: the rows of expert e are `offsets[e]..offsets[e+1]`.
    pub offsets: &'a [u32],
    /// `[E, H, I]`.
    pub down: &'a [f64],
    /// `[E, H]`, or absent for zeros.
    pub bias: Option<&'a [f64]>,
    /// R.
    pub rows: usize,
    /// H.
    pub hidden: usize,
    /// I.
    pub intermediate: usize,
}

/// `y[r,h] = sum_i a[r,i] * down[e,h,i] + bias[e,h]` for every row r of every expert e. Returns `[R, H]`, sorted by expert.
///
/// Rows past `offsets[E]` are 0.
///
/// ```
/// use fused_moe_core::reference::{Down, down};
/// let y = down(&Down { a: &[1.0, 2.0], offsets: &[0, 1], down: &[3.0, 4.0], bias: None, rows: 1, hidden: 1,
///                      intermediate: 2 });
/// assert_eq!(y, [11.0]);
/// ```
pub fn down(op: &Down<'_>) -> Vec<f64> {
    let mut y = vec![0.0; op.rows * op.hidden];
    for (expert, range) in op.offsets.windows(2).enumerate() {
        for row in range[0] as usize..range[1] as usize {
            for h in 0..op.hidden {
                let matrix_row = expert * op.hidden + h;
                let mut sum = 0.0;
                for i in 0..op.intermediate {
                    sum += op.a[row * op.intermediate + i] * op.down[matrix_row * op.intermediate + i];
                }
                y[row * op.hidden + h] = sum + op.bias.map_or(0.0, |bias| bias[matrix_row]);
            }
        }
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_meets_its_expert() {
        let op = Down {
            a: &[1.0, 2.0, 3.0, f64::NAN],
            offsets: &[0, 1, 1, 3],
            down: &[1.0, 2.0, 9.0, 9.0, 10.0, 20.0],
            bias: None,
            rows: 4,
            hidden: 2,
            intermediate: 1,
        };
        assert_eq!(down(&op), [1.0, 2.0, 20.0, 40.0, 30.0, 60.0, 0.0, 0.0]);
        let bias = [0.5, 0.5, 9.0, 9.0, 1.0, 2.0];
        assert_eq!(down(&Down { bias: Some(&bias), ..op }), [1.5, 2.5, 21.0, 42.0, 31.0, 62.0, 0.0, 0.0]);
        assert!(down(&Down { a: &[], offsets: &[0; 4], rows: 0, ..op }).is_empty());
    }
}
