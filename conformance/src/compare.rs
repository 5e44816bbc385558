//! What a backend gave against what the reference expects.

use fused_moe_core::Shape;

/// The outcome of comparing one output.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Comparison {
    /// The error where it is worst against what is allowed there, as a part of the largest expected value.
    pub error: f64,
    /// What is allowed there, likewise.
    pub tolerance: f64,
    /// The error as a part of what is allowed: above 1 is a failure, infinity a wrong id or a misplaced NaN.
    pub ratio: f64,
    /// Where and what, if anything is wrong.
    pub failure: Option<String>,
}

impl Comparison {
    /// Something that is wrong beyond numbers.
    pub fn wrong(message: String) -> Self {
        Self { error: f64::INFINITY, tolerance: 0.0, ratio: f64::INFINITY, failure: Some(message) }
    }

    /// The worse of two.
    pub fn worse(self, other: Self) -> Self {
        let failed = |c: &Self| c.failure.is_some();
        if (failed(&other), other.ratio) > (failed(&self), self.ratio) { other } else { self }
    }
}

/// Floats: each within its own allowance; NaN where NaN is expected, infinities exactly.
///
/// - `expected`, `allowed`, `found`: as many as `shape` says
pub fn floats(name: &str, shape: Shape, [expected, allowed, found]: [&[f64]; 3]) -> Comparison {
    if found.len() != expected.len() || allowed.len() != expected.len() {
        return Comparison::wrong(format!("{name}: {} elements, expected {}", found.len(), expected.len()));
    }
    let largest = expected.iter().filter(|x| x.is_finite()).fold(0.0f64, |largest, x| largest.max(x.abs()));
    let unit = if largest > 0.0 { largest } else { 1.0 };
    let (mut worst, mut place, mut wrong) = (-1.0, 0, 0usize);
    for i in 0..expected.len() {
        let ratio = ratio(expected[i], allowed[i], found[i]);
        wrong += usize::from(ratio > 1.0);
        if ratio > worst {
            (worst, place) = (ratio, i);
        }
    }
    if expected.is_empty() {
        return Comparison::default();
    }
    let (want, got, limit) = (expected[place], found[place], allowed[place]);
    let failure = (wrong > 0).then(|| {
        let (place, total) = (index(shape, place), expected.len());
        let off = (got - want).abs();
        format!("{name}{place}: expected {want:e}, got {got:e}, off by {off:.2e}, allowed {limit:.2e}; {wrong} of {total} wrong")
    });
    let error = if want.is_finite() && got.is_finite() { (got - want).abs() / unit } else { 0.0 };
    let error = if worst.is_infinite() { f64::INFINITY } else { error };
    Comparison { error, tolerance: limit / unit, ratio: worst, failure }
}

fn ratio(expected: f64, allowed: f64, found: f64) -> f64 {
    if expected.is_nan() || found.is_nan() {
        return if expected.is_nan() && found.is_nan() { 0.0 } else { f64::INFINITY };
    }
    let error = (found - expected).abs();
    if found == expected {
        0.0
    } else if error.is_finite() && allowed > 0.0 {
        error / allowed
    } else {
        f64::INFINITY
    }
}

/// Whole numbers: equal.
pub fn ids(name: &str, shape: Shape, [expected, found]: [&[u32]; 2]) -> Comparison {
    if found.len() != expected.len() {
        return Comparison::wrong(format!("{name}: {} elements, expected {}", found.len(), expected.len()));
    }
    let wrong = expected.iter().zip(found).filter(|(e, f)| e != f).count();
    match expected.iter().zip(found).position(|(e, f)| e != f) {
        None => Comparison::default(),
        Some(i) => Comparison::wrong(format!(
            "{name}{}: expected {}, got {}; {wrong} of {} wrong",
            index(shape, i),
            number(expected[i]),
            number(found[i]),
            expected.len()
        )),
    }
}

fn number(id: u32) -> String {
    if id == u32::MAX { "none".into() } else { id.to_string() }
}

/// Position `i` in row-major order, as `[t, k]`.
fn index(shape: Shape, i: usize) -> String {
    let mut rest = i;
    let mut place = Vec::new();
    for &n in shape.dims().iter().rev() {
        place.push(rest % n.max(1));
        rest /= n.max(1);
    }
    place.reverse();
    format!("{place:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compare(expected: &[f64], found: &[f64]) -> Comparison {
        floats("y", [2, 2].into(), [expected, &[0.1; 4], found])
    }

    #[test]
    fn right_is_right() {
        let ok = compare(&[1.0, -2.0, f64::NAN, f64::INFINITY], &[1.05, -2.0, f64::NAN, f64::INFINITY]);
        assert!(ok.failure.is_none() && (ok.ratio - 0.5).abs() < 1e-9 && (ok.error - 0.025).abs() < 1e-9, "{ok:?}");
        assert!(floats("y", [0, 7].into(), [&[], &[], &[]]).failure.is_none());
    }

    #[test]
    fn one_wrong_element() {
        let wrong = compare(&[1.0, -2.0, 3.0, 4.0], &[1.0, -2.0, 3.5, 4.0]);
        let message = wrong.failure.unwrap_or_default();
        assert!(
            message.starts_with("y[1, 0]: expected 3e0, got 3.5e0") && message.ends_with("1 of 4 wrong"),
            "{message}"
        );
        assert!((wrong.ratio - 5.0).abs() < 1e-9 && (wrong.error - 0.125).abs() < 1e-9);
    }

    #[test]
    fn not_a_number_where_none_belongs() {
        assert!(compare(&[1.0; 4], &[1.0, f64::NAN, 1.0, 1.0]).failure.is_some());
        assert!(compare(&[f64::NAN, 1.0, 1.0, 1.0], &[0.0, 1.0, 1.0, 1.0]).failure.is_some());
        assert!(compare(&[f64::INFINITY, 1.0, 1.0, 1.0], &[f64::NEG_INFINITY, 1.0, 1.0, 1.0]).failure.is_some());
        assert!(compare(&[1.0; 4], &[1.0, f64::INFINITY, 1.0, 1.0]).failure.is_some());
        assert!(floats("y", [1].into(), [&[1.0], &[f64::NAN], &[1.5]]).failure.is_some());
        assert!(floats("y", [1].into(), [&[1.0], &[f64::INFINITY], &[f64::NAN]]).failure.is_some());
    }

    #[test]
    fn swapped_ids() {
        let shape = Shape::from([2, 2]);
        assert!(ids("experts", shape, [&[0, 1, 2, 3], &[0, 1, 2, 3]]).failure.is_none());
        let wrong = ids("experts", shape, [&[0, 1, 2, u32::MAX], &[0, 1, u32::MAX, 2]]);
        assert_eq!(wrong.failure.unwrap_or_default(), "experts[1, 0]: expected 2, got none; 2 of 4 wrong");
        assert!(ids("experts", shape, [&[0], &[0, 1]]).failure.is_some());
    }

    #[test]
    fn failures_are_worse_than_errors() {
        let near = Comparison { ratio: 0.9, ..Comparison::default() };
        let far = Comparison::wrong("x".into());
        assert_eq!(near.clone().worse(far.clone()), far);
        assert_eq!(far.clone().worse(near), far);
    }
}
