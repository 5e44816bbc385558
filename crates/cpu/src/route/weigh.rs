//! The weights of the chosen experts.

use crate::rows::Floats;
use fused_moe_core::NO_EXPERT;
use fused_moe_core::config::{ExpertScale, Normalize, WeightRule};

/// Values of one token's chosen experts to weights, in place.
pub(super) fn weigh(values: &mut [f64], experts: &[u32], rule: &WeightRule, scale: Option<&Floats<'_>>) {
    let scale_of = |expert: u32, when: ExpertScale| match scale {
        Some(scale) if rule.expert_scale == Some(when) && expert != NO_EXPERT => {
            f64::from(scale.at(0, expert as usize))
        }
        _ => 1.0,
    };
    for (value, &expert) in values.iter_mut().zip(experts) {
        *value *= scale_of(expert, ExpertScale::BeforeNormalize);
    }
    let divisor = divisor(values, rule.normalize);
    for (value, &expert) in values.iter_mut().zip(experts) {
        let normalized = if divisor == 0.0 { 0.0 } else { *value / divisor };
        let weight = normalized * scale_of(expert, ExpertScale::AfterNormalize) * f64::from(rule.scale);
        *value = if expert == NO_EXPERT { 0.0 } else { weight };
    }
}

fn divisor(values: &[f64], normalize: Normalize) -> f64 {
    let sum = || values.iter().sum::<f64>();
    match normalize {
        Normalize::None => 1.0,
        Normalize::Sum { eps } => sum() + f64::from(eps),
        Normalize::SumAtLeast { min } => {
            let (sum, min) = (sum(), f64::from(min));
            if sum < min { min } else { sum }
        }
        Normalize::Lp { p } => {
            let p = f64::from(p);
            values.iter().map(|value| value.abs().powf(p)).sum::<f64>().powf(1.0 / p)
        }
    }
}
