//! RMSNorm, used before the router and after combine.

/// Root-mean-square norm of every row: `n[t,h] = x[t,h] / sqrt(mean_h(x[t,h]^2) + eps) * weight[h]`.
///
/// - `x`: `[T, H]`
/// - `weight`: `[H]`, or absent for ones
///
/// Returns `[T, H]`. A row of zeros with `eps = 0` gives NaN (`0 * inf`), and so does a row with an infinite element
/// where that element is (`inf * 0`), its finite elements becoming 0; a NaN makes its whole row NaN.
///
/// Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
///
/// ```
/// use fused_moe_core::reference::rms_norm;
/// assert_eq!(rms_norm(&[3.0, -3.0], Some(&[1.0, 2.0]), 0.0, 2), [1.0, -2.0]);
/// ```
pub fn rms_norm(x: &[f64], weight: Option<&[f64]>, eps: f64, hidden: usize) -> Vec<f64> {
    let mut normed = Vec::with_capacity(x.len());
    for row in x.chunks_exact(hidden.max(1)) {
        let mut squares = 0.0;
        for &value in row {
            squares += value * value;
        }
        let factor = 1.0 / (squares / hidden as f64 + eps).sqrt();
        for (h, &value) in row.iter().enumerate() {
            let weight = weight.map_or(1.0, |weight| weight[h]);
            normed.push(value * factor * weight);
        }
    }
    normed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_square_and_eps_by_hand() {
        // mean(3^2, 4^2) = 12.5, plus 3.5 is 16
        assert_eq!(rms_norm(&[3.0, 4.0], None, 3.5, 2), [0.75, 1.0]);
        assert_eq!(rms_norm(&[3.0, 4.0], Some(&[4.0, -1.0]), 3.5, 2), [3.0, -1.0]);
    }

    #[test]
    fn rows_do_not_mix() {
        let two = rms_norm(&[1.0, 1.0, f64::NAN, 1.0], None, 0.0, 2);
        assert_eq!(two[..2], [1.0, 1.0]);
        assert!(two[2].is_nan() && two[3].is_nan());
        assert!(rms_norm(&[], None, 0.0, 2).is_empty());
        assert!(rms_norm(&[0.0, 0.0], None, 0.0, 2).iter().all(|n| n.is_nan()));
    }
}
