//! Through the RMSNorm.

/// Operands of [`rms_norm_backward`].
#[derive(Clone, Copy, Debug)]
pub struct NormBackward<'a> {
    /// `[T, H]`.
    pub x: &'a [f64],
    /// `[H]`, or absent for ones.
    pub weight: Option<&'a [f64]>,
    /// Added to the mean square.
    pub eps: f64,
    /// The gradient of the normalised rows, `[T, H]`.
    pub d_n: &'a [f64],
    /// H.
    pub hidden: usize,
}

/// What [`rms_norm_backward`] returns.
#[derive(Clone, Debug, PartialEq)]
pub struct NormGradients {
    /// `[T, H]`.
    pub x: Vec<f64>,
    /// `[H]`, whether there is a weight or ones in its place.
    pub weight: Vec<f64>,
}

/// The gradients of [`rms_norm`](super::rms_norm): with `f[t] = 1 / sqrt(mean_h(x[t,h]^2) + eps)`,
///
/// ```text
/// d_weight[h] = sum_t d_n[t,h] * x[t,h] * f[t]
/// d_x[t,h]    = f[t] * (d_n[t,h] * weight[h]  -  x[t,h] * f[t]^2 * mean_j(d_n[t,j] * weight[j] * x[t,j]))
/// ```
///
/// ```
/// use fused_moe_core::reference::{NormBackward, rms_norm_backward};
/// let norm = NormBackward { x: &[3.0, -3.0], weight: None, eps: 0.0, d_n: &[1.0, 0.0], hidden: 2 };
/// let d = rms_norm_backward(&norm);
/// assert_eq!((d.x, d.weight), (vec![1.0 / 6.0, 1.0 / 6.0], vec![1.0, 0.0]));
/// ```
pub fn rms_norm_backward(op: &NormBackward<'_>) -> NormGradients {
    let NormBackward { x, weight, eps, d_n, hidden } = *op;
    let mut gradients = NormGradients { x: Vec::with_capacity(x.len()), weight: vec![0.0; hidden] };
    for (row, d_n) in x.chunks_exact(hidden.max(1)).zip(d_n.chunks_exact(hidden.max(1))) {
        let of = |h: usize| weight.map_or(1.0, |weight| weight[h]);
        let (mut squares, mut along) = (0.0, 0.0);
        for h in 0..hidden {
            squares += row[h] * row[h];
            along += d_n[h] * of(h) * row[h];
        }
        let factor = 1.0 / (squares / hidden as f64 + eps).sqrt();
        for h in 0..hidden {
            gradients.weight[h] += d_n[h] * row[h] * factor;
            gradients.x.push(factor * (d_n[h] * of(h) - row[h] * factor * factor * along / hidden as f64));
        }
    }
    gradients
}
