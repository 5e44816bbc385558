//! How far a backend may be from the reference: the only place that says so.
//!
//! A result is a sum of `n` products formed in f32 and rounded once when it is stored. With `M`, the sum of the
//! products' magnitudes (the reference evaluated on absolute values), an element `v` may be off by
//!
//! ```text
//! 2 * u32 * (sqrt(n) + 4) * M  +  u_out * (|v| + the first term)  +  half the smallest number of the output's format
//! ```
//!
//! where `u` is the unit roundoff ([`DType::epsilon`]). The worst order of summation could lose `n * u32 * M`; errors of
//! random sign lose far less than `sqrt(n) * u32 * M`. A sum in f16 or bf16, or a product of operands rounded to ten bits
//! of mantissa, is far outside of it.
//!
//! Ids, rows, slots, offsets and counts are exact, but for near-ties: where two keys that were computed (not given) differ
//! by less than [`near_tie`], either order is right.

use fused_moe_core::DType;
use fused_moe_core::config::{Activation, Function};
use fused_moe_core::reference::activate;

/// What an f32 sum of `n` products may be off by, their magnitudes adding up to `magnitude`.
pub fn sum(n: usize, magnitude: f64) -> f64 {
    2.0 * DType::F32.epsilon() * ((n as f64).sqrt() + 4.0) * magnitude
}

/// A result off by `error`, stored in a format.
pub fn stored(dtype: DType, value: f64, error: f64) -> f64 {
    let half_of_smallest = match dtype {
        DType::F16 => 2f64.powi(-25),
        // numbers below 2^-126 may become zero
        _ => f64::from(f32::MIN_POSITIVE),
    };
    error + dtype.epsilon() * (value.abs() + error) * 1.001 + half_of_smallest
}

/// What `act(g, u)` may be off by when its operands are off by `dg` and `du`: how far it moves, and `16 u32` of the
/// magnitude of what it multiplies.
pub fn activated(activation: Activation, [g, u]: [f64; 2], [dg, du]: [f64; 2]) -> f64 {
    let value = activate(activation, g, u);
    let corners = [(-dg, -du), (-dg, du), (dg, -du), (dg, du)];
    let moved = corners.iter().map(|(dg, du)| (activate(activation, g + dg, u + du) - value).abs()).fold(0.0, f64::max);
    moved + 16.0 * DType::F32.epsilon() * activation_magnitude(activation, g, u)
}

/// An upper bound of `act(g, u)` and of the terms that cancel in it.
fn activation_magnitude(activation: Activation, g: f64, u: f64) -> f64 {
    let of = |function: Function, x: f64| match function {
        Function::ReluSquared => x * x,
        _ => x.abs(),
    };
    match activation {
        Activation::Gated(function) => of(function, g) * u.abs(),
        Activation::ClampedSwish { limit, .. } => g.abs() * (u.abs().min(f64::from(limit)) + 1.0),
        Activation::ClampedSilu { limit } | Activation::SiluThenClamp { limit } => {
            g.abs() * u.abs().min(f64::from(limit))
        }
        Activation::SoftcappedSilu { up_cap, .. } => g.abs() * u.abs().min(f64::from(up_cap)),
        Activation::Plain(function) => of(function, u),
    }
}

/// What the RMSNorm of a row may be off by, element by element, when the row is off by `errors`.
///
/// - `row`, `normed`, `errors`: `[H]`
pub fn normed(row: &[f64], normed: &[f64], errors: &[f64]) -> Vec<f64> {
    let squares = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>().sqrt();
    // the factor moves at most as far as the row does, seen from its length
    let length = squares(row).max(f64::MIN_POSITIVE);
    let factor = squares(errors) / length + DType::F32.epsilon() * ((row.len() as f64).sqrt() + 8.0);
    let each = row.iter().zip(normed).zip(errors);
    let largest = normed.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    each.map(|((x, n), e)| {
        let scale = if *x == 0.0 { largest / length } else { (n / x).abs() };
        scale * e + n.abs() * factor
    })
    .collect()
}

/// What the routing weights of a token may be off by, as a part of each: the scores of E logits that spread over `range`
/// and are each off by `logit_error`, then sums and quotients over the chosen.
pub fn weight(experts: usize, range: f64, logit_error: f64) -> f64 {
    2.0 * DType::F32.epsilon() * ((experts as f64).sqrt() + 16.0 + range) + 4.0 * logit_error
}

/// Keys closer than this may change places: computed from scores of relative error [`weight`] and magnitude `scale`.
pub fn near_tie(relative: f64, scale: f64) -> f64 {
    2.0 * relative * scale
}

/// What a whole layer may be off by, as a part of the magnitude of its result: every sum of the way in f32, every
/// intermediate stored once more in the format that x came in.
///
/// - `inner`: H + I + K + S + L, the lengths of the sums
pub fn layer(inner: usize, x: DType, weights: f64) -> f64 {
    sum(inner, 4.0) + 6.0 * x.epsilon() + weights
}

/// What is added to it for so many intermediates between x and the experts' matrices: each is stored once more in the
/// format of x, and goes through both gate and up.
pub fn stored_before(count: usize, x: DType) -> f64 {
    2.0 * count as f64 * x.epsilon()
}

/// What a layer may differ from golden data that were made in f64, as a part of the largest value: `8 u` of the format
/// that x and y were rounded to, and its sums in f32 or what f32 constants of the model's own code cost.
///
/// - `inner`: as for [`layer`]
pub fn golden(inner: usize, dtype: DType) -> f64 {
    8.0 * dtype.epsilon() + sum(inner, 4.0).max(1e-5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_narrow_sum_is_outside() {
        for n in [16, 256, 4096] {
            assert!(sum(n, 1.0) < 0.1 * DType::F16.epsilon());
        }
        assert!(sum(64, 1.0) < 0.02 * DType::F16.epsilon());
    }

    #[test]
    fn an_f32_sum_is_inside() {
        let mut worst = 0f64;
        for trial in 0..20 {
            let data = crate::data::Data::new("sum").of(&trial.to_string());
            let x = data.normal(DType::F32, [1000], 1.0);
            let single: f32 = x.as_floats().iter().fold(0.0, |sum, &x| sum + x as f32);
            let double: f64 = x.as_floats().iter().sum();
            let magnitude: f64 = x.as_floats().iter().map(|x| x.abs()).sum();
            worst = worst.max((f64::from(single) - double).abs() / sum(1000, magnitude));
        }
        assert!(worst < 0.25, "{worst}");
    }

    #[test]
    fn activation_moves_with_its_operands() {
        let silu = Activation::Gated(Function::Silu);
        assert!(activated(silu, [1.0, 1.0], [1e-3, 0.0]) > 5e-4);
        assert!(activated(silu, [1.0, 1.0], [0.0, 0.0]) < 2e-6);
    }

    #[test]
    fn norm_moves_with_its_row() {
        let allowed = normed(&[3.0, 4.0], &[0.6, 0.8], &[1e-3, 1e-3]);
        assert!(allowed[0] > 2e-4 && allowed[0] < 1e-3, "{allowed:?}");
    }
}
