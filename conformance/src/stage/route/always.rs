//! Experts that every token goes to besides those that it chooses.

use super::{Logits, Route, case};
use crate::cases::{Case, FLOATS, Scale};
use crate::stage::choice::Choice;
use fused_moe_core::DType;
use fused_moe_core::config::*;

/// Rules, and how many experts they choose always: every score, key and weight; with correction bias, groups, scale.
pub(crate) fn rules() -> Vec<(&'static str, RoutingRule, usize)> {
    let sum = WeightRule { normalize: Normalize::Sum { eps: 1e-20 }, ..WeightRule::default() };
    let chosen = WeightRule { value: WeightValue::SoftmaxOfChosen, ..WeightRule::default() };
    let scaled = |when| WeightRule { expert_scale: Some(when), scale: 1.5, ..sum };
    let top = |by, bias, groups| Selection::TopK { by, bias, groups };
    let (score, logit) = (SelectBy::Score, SelectBy::Logit);
    let groups = |keep, score, masked| Some(Groups { count: 4, keep, score, masked });
    let best_two = groups(2, GroupScore::SumOfBestTwo, Masked::NegInfinity);
    let best = groups(3, GroupScore::Best, Masked::Zero);
    let plain = top(score, false, None);
    let lp = WeightRule { normalize: Normalize::Lp { p: 2.0 }, ..WeightRule::default() };
    let rule = |score, selection, weights, always| RoutingRule { score, selection, weights, always };
    let softmax = |selection, weights, always| rule(Score::Softmax, selection, weights, always);
    let sigmoid = |selection, weights, always| rule(Score::Sigmoid, selection, weights, always);
    let all = vec![
        ("softmax", softmax(plain, WeightRule::default(), 1)),
        ("softmax bias", softmax(top(score, true, None), scaled(ExpertScale::BeforeNormalize), 2)),
        ("softmax of chosen", softmax(top(logit, true, None), chosen, 1)),
        ("sigmoid bias", sigmoid(top(score, true, None), sum, 2)),
        ("softplus bias", rule(Score::SqrtSoftplus, top(score, true, None), scaled(ExpertScale::AfterNormalize), 1)),
        ("logit score", rule(Score::Logit, plain, lp, 1)),
        ("sigmoid groups", sigmoid(top(score, true, best_two), sum, 2)),
        ("softmax groups best", softmax(top(score, false, best), WeightRule::default(), 2)),
    ];
    all.into_iter().map(|(name, rule)| (name, rule, rule.always)).collect()
}

/// Their cases.
pub(super) fn cases(scale: Scale) -> Vec<Case> {
    let route = |sizes, dtype, logits, rule| Route {
        sizes,
        dtype,
        logits,
        choice: Choice { witness: true, ..Choice::new(rule) },
    };
    let normal = Logits::Normal(1.5);
    let mut cases = Vec::new();
    for (name, rule, always) in rules() {
        let grouped = super::grouped(&rule);
        let kinds = [
            ("near-ties", Logits::NearTies),
            ("ties", Logits::Ties),
            ("flat", Logits::Flat),
            ("extreme", Logits::Extreme),
            ("not finite", Logits::NotFinite),
        ];
        for (kind, logits) in kinds {
            // the worth of a group is a sum, and no witness tells which ones are nearly tied
            if !(grouped && matches!(logits, Logits::NearTies | Logits::Extreme)) {
                let mut odd = route([13, 32 + always, 4 + always], DType::F32, logits, rule);
                odd.choice.flat_bias = true;
                cases.push(case(&format!("{name} always {always} {kind}"), odd));
            }
        }
        for dtype in FLOATS {
            let mut odd = route([11, 20 + always, 3 + always], dtype, normal, rule);
            odd.choice.dtype = dtype;
            cases.push(case(&format!("{name} always {always}"), odd.clone()).strided());
            cases.push(case(&format!("{name} always {always}"), odd));
        }
        let mut sizes = vec![[0, 10, 3], [1, 3, 2], [5, 10, 3], [4, 12, 5], [9, 60, 8], [3, 130, 6]];
        sizes.extend([[2, 513, 10], [3, 3, 3], [2, 60, 34], [1, 4096, 9]]);
        if scale == Scale::Full {
            sizes.extend([[300, 130, 10], [257, 514, 22]]);
        }
        for [t, e, k] in sizes {
            for always in [1, 2, k - 1] {
                let rule = RoutingRule { always, ..rule };
                let known = cases.iter().any(|case| case.name == format!("{name} always {always} T={t} E={e} K={k}"));
                let few = e > 12 && always == 2 && !grouped;
                let room = !grouped || ((e - always) % 4 == 0 && k - always <= (e - always) / 2);
                if always > 0 && always < k && room && !few && !known {
                    cases.push(case(&format!("{name} always {always}"), route([t, e, k], DType::F32, normal, rule)));
                }
            }
        }
    }
    cases
}
