//! The weights of the chosen experts.

use crate::NO_EXPERT;
use crate::config::{ExpertScale, Normalize, WeightRule};

/// The weights of one token, `[K]`, from what its chosen experts' weights start as.
pub(super) fn weigh(values: &[f64], ids: &[u32], rule: &WeightRule, expert_scale: Option<&[f64]>) -> Vec<f64> {
    let scale_of = |id: u32, when: ExpertScale| match expert_scale {
        Some(scale) if rule.expert_scale == Some(when) && id != NO_EXPERT => scale[id as usize],
        _ => 1.0,
    };
    let mut weights = Vec::with_capacity(values.len());
    for k in 0..values.len() {
        weights.push(values[k] * scale_of(ids[k], ExpertScale::BeforeNormalize));
    }
    let divisor = divisor(&weights, rule.normalize);
    for k in 0..weights.len() {
        let normalized = if divisor == 0.0 { 0.0 } else { weights[k] / divisor };
        let weight = normalized * scale_of(ids[k], ExpertScale::AfterNormalize) * f64::from(rule.scale);
        weights[k] = if ids[k] == NO_EXPERT { 0.0 } else { weight };
    }
    weights
}

fn divisor(values: &[f64], normalize: Normalize) -> f64 {
    let mut sum = 0.0;
    for &value in values {
        sum += match normalize {
            Normalize::Lp { p } => value.abs().powf(f64::from(p)),
            _ => value,
        };
    }
    match normalize {
        Normalize::None => 1.0,
        Normalize::Sum { eps } => sum + f64::from(eps),
        Normalize::SumAtLeast { min } => {
            if sum < f64::from(min) {
                f64::from(min)
            } else {
                sum
            }
        }
        Normalize::Lp { p } => sum.powf(1.0 / f64::from(p)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(normalize: Normalize) -> WeightRule {
        WeightRule { normalize, ..WeightRule::default() }
    }

    #[test]
    fn normalizers_by_hand() {
        let weights = |normalize| weigh(&[1.0, 3.0], &[0, 1], &rule(normalize), None);
        assert_eq!(weights(Normalize::None), [1.0, 3.0]);
        assert_eq!(weights(Normalize::Sum { eps: 0.0 }), [0.25, 0.75]);
        assert_eq!(weights(Normalize::Sum { eps: 4.0 }), [0.125, 0.375]);
        assert_eq!(weights(Normalize::SumAtLeast { min: 8.0 }), [0.125, 0.375]);
        assert_eq!(weights(Normalize::SumAtLeast { min: 1.0 }), [0.25, 0.75]);
        assert_eq!(weights(Normalize::Lp { p: 1.0 }), [0.25, 0.75]);
        assert_eq!(weigh(&[3.0, -4.0], &[0, 1], &rule(Normalize::Lp { p: 2.0 }), None), [0.6, -0.8]);
    }

    #[test]
    fn scale_is_last() {
        let rule = WeightRule { scale: 2.5, ..rule(Normalize::Sum { eps: 0.0 }) };
        assert_eq!(weigh(&[1.0, 3.0], &[0, 1], &rule, None), [0.625, 1.875]);
    }

    #[test]
    fn expert_scale_before_and_after() {
        let scale = [9.0, 3.0, 1.0];
        let with = |expert_scale| WeightRule { expert_scale, ..rule(Normalize::Sum { eps: 0.0 }) };
        let weights = |when| weigh(&[1.0, 3.0], &[1, 2], &with(when), Some(&scale));
        assert_eq!(weights(Some(ExpertScale::BeforeNormalize)), [0.5, 0.5]);
        assert_eq!(weights(Some(ExpertScale::AfterNormalize)), [0.75, 0.75]);
        assert_eq!(weights(None), [0.25, 0.75]);
    }

    #[test]
    fn zero_divisor_and_no_expert() {
        assert_eq!(weigh(&[0.0, 0.0], &[0, 1], &rule(Normalize::Sum { eps: 0.0 }), None), [0.0, 0.0]);
        assert_eq!(weigh(&[1.0, -1.0], &[0, 1], &rule(Normalize::Sum { eps: 0.0 }), None), [0.0, 0.0]);
        assert_eq!(weigh(&[0.0, 2.0], &[NO_EXPERT, 1], &rule(Normalize::Sum { eps: 0.0 }), None), [0.0, 1.0]);
        let nan = weigh(&[0.0, f64::NAN], &[NO_EXPERT, 1], &rule(Normalize::Sum { eps: 0.0 }), None);
        assert!(nan[0] == 0.0 && nan[1].is_nan());
    }
}
