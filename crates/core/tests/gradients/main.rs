//! The reference's gradients against central differences of its own forward functions.

mod layer;
mod stages;

/// Numbers in -1..1 that look random.
fn numbers(seed: u64, n: usize) -> Vec<f64> {
    let mut state = seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f64 / (1u64 << 30) as f64 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// `sum_i a[i] * b[i]`: a loss whose gradient is one of the two.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Compares a gradient with the central differences of `loss` around `at`, element by element.
fn central(name: &str, found: &[f64], at: &[f64], loss: impl Fn(&[f64]) -> f64) {
    const STEP: f64 = 1e-5;
    assert_eq!(found.len(), at.len(), "{name}");
    let scale = found.iter().fold(1.0f64, |scale, d| scale.max(d.abs()));
    for i in 0..at.len() {
        let moved = |by: f64| {
            let mut moved = at.to_vec();
            moved[i] += by;
            loss(&moved)
        };
        let expected = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
        assert!((found[i] - expected).abs() < 2e-7 * scale, "{name}[{i}]: {} is not {expected}", found[i]);
    }
}
