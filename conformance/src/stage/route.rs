//! Logits to routes.

use super::Check;
use super::choice::Choice;
use crate::cases::{Case, FLOATS, Operation, Scale, Stage};
use crate::data::{Data, Tensor, Values};
use crate::operands::{Operands, Prepared};
use fused_moe_core::config::*;
use fused_moe_core::{Backend, DType, operation};

mod always;

pub(super) use always::rules as always_rules;

/// A case of route.
#[derive(Clone, Debug)]
pub struct Route {
    /// T, E, K.
    pub sizes: [usize; 3],
    /// Format of the logits.
    pub dtype: DType,
    /// What the logits look like.
    pub logits: Logits,
    /// How experts are chosen.
    pub choice: Choice,
}

/// What logits look like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Logits {
    /// Normal, of this standard deviation.
    Normal(f64),
    /// Above zero.
    Positive,
    /// Neighbours in the number format, in disorder.
    NearTies,
    /// Few different values, many times each.
    Ties,
    /// All the same.
    Flat,
    /// Some so far apart that scores underflow and saturate.
    Extreme,
    /// NaN and infinities among numbers; whole tokens of them.
    NotFinite,
}

impl Route {
    fn values(&self) -> Tensor {
        let [tokens, experts, _] = self.sizes;
        let data = Data::new("route").of(&format!("{:?}", self.sizes));
        let normal = |deviation| data.of("logits").normal(self.dtype, [tokens, experts], deviation);
        let map = |f: &dyn Fn(usize, f64) -> f64| {
            let values: Vec<f64> = normal(1.0).as_floats().iter().enumerate().map(|(i, &x)| f(i, x)).collect();
            Tensor::floats(self.dtype, [tokens, experts], values)
        };
        let pick = |i: usize, n: usize| data.of("pick").below(i as u64, n);
        match self.logits {
            Logits::Normal(deviation) => normal(deviation),
            Logits::Positive => map(&|_, x| x.abs() + 0.125),
            Logits::NearTies => map(&|i, _| 1.0 + 2.0 * self.dtype.epsilon() * pick(i, 5) as f64),
            Logits::Ties => map(&|i, _| pick(i, 3) as f64 - 1.0),
            Logits::Flat => map(&|_, _| 0.5),
            Logits::Extreme => map(&|i, x| if pick(i, 3) == 0 { 60.0 * x } else { x }),
            Logits::NotFinite => map(&|i, x| {
                let odd = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, x];
                match i / experts % 6 {
                    0 => f64::NAN,
                    1 => f64::NEG_INFINITY,
                    2 => odd[pick(i, 3)],
                    3 => odd[pick(i, 4)],
                    4 if i % experts == experts / 2 => x,
                    4 => odd[2 * pick(i, 2)],
                    _ => x,
                }
            }),
        }
    }
}

impl Check for Route {
    fn prepare(&self) -> Prepared {
        let mut prepared = Prepared::default();
        let values = self.values();
        let logits = values.as_floats().to_vec();
        prepared.input("logits", values);
        self.choice.operands(Data::new("route").of(&format!("{:?}", self.sizes)), self.sizes, &mut prepared);
        self.choice.outputs(self.sizes, [&logits, &vec![0.0; logits.len()]], &mut prepared);
        prepared
    }

    fn call<B: Backend>(&self, backend: &B, stream: &B::Stream, mut operands: Operands<'_, B>) -> Result<(), B::Error> {
        let logits = operands.input("logits")?;
        let choice = self.choice.call_with(&mut operands)?;
        backend.route(stream, operation::Route { logits, choice })
    }

    fn resolve(&self, prepared: &mut Prepared, found: &[(&'static str, Values)]) {
        let logits = prepared.floats("logits").to_vec();
        self.choice.resolve(self.sizes, [&logits, &vec![0.0; logits.len()]], prepared, found);
    }
}

/// The routing rules in use, and what tells them from each other.
pub(super) fn rules() -> Vec<(&'static str, RoutingRule)> {
    let sum = |eps| WeightRule { normalize: Normalize::Sum { eps }, ..WeightRule::default() };
    let top = |by, bias, groups| Selection::TopK { by, bias, groups };
    let groups = |count, keep, score, masked| Some(Groups { count, keep, score, masked });
    let (by_score, by_logit) = (SelectBy::Score, SelectBy::Logit);
    let rule = |score, selection, weights| RoutingRule { score, selection, weights, always: 0 };
    let plain = top(by_score, false, None);
    let chosen = WeightRule { value: WeightValue::SoftmaxOfChosen, ..WeightRule::default() };
    let scaled = |when, weights: WeightRule| WeightRule { expert_scale: Some(when), ..weights };
    let two_best = groups(4, 2, GroupScore::SumOfBestTwo, Masked::NegInfinity);
    vec![
        ("softmax", RoutingRule::default()),
        ("softmax renormalised", rule(Score::Softmax, plain, sum(0.0))),
        ("softmax of chosen", rule(Score::Softmax, top(by_logit, false, None), chosen)),
        ("sigmoid bias", rule(Score::Sigmoid, top(by_score, true, None), WeightRule { scale: 2.5, ..sum(1e-20) })),
        ("sigmoid plain", rule(Score::Sigmoid, plain, WeightRule::default())),
        ("softplus bias", rule(Score::SqrtSoftplus, top(by_score, true, None), WeightRule { scale: 1.5, ..sum(1e-6) })),
        ("logit bias", rule(Score::Softmax, top(by_logit, true, None), sum(0.0))),
        ("sigmoid groups", rule(Score::Sigmoid, top(by_score, true, two_best), sum(1e-20))),
        (
            "softmax groups best",
            rule(
                Score::Softmax,
                top(by_score, false, groups(2, 1, GroupScore::Best, Masked::Zero)),
                WeightRule { scale: 16.0, ..WeightRule::default() },
            ),
        ),
        (
            "logit groups zero",
            rule(Score::Sigmoid, top(by_logit, true, groups(4, 3, GroupScore::SumOfBestTwo, Masked::Zero)), sum(0.0)),
        ),
        ("scale before", rule(Score::Softmax, plain, scaled(ExpertScale::BeforeNormalize, sum(0.0)))),
        ("scale after", rule(Score::Softmax, plain, scaled(ExpertScale::AfterNormalize, sum(0.0)))),
        ("scale of chosen", rule(Score::Softmax, plain, scaled(ExpertScale::AfterNormalize, chosen))),
        (
            "at least",
            rule(Score::Sigmoid, plain, WeightRule { normalize: Normalize::SumAtLeast { min: 2.0 }, ..chosen }),
        ),
        (
            "lp",
            rule(Score::Sigmoid, plain, WeightRule { normalize: Normalize::Lp { p: 2.0 }, ..WeightRule::default() }),
        ),
        ("logit score", rule(Score::Logit, plain, WeightRule { scale: 0.5, ..WeightRule::default() })),
        ("table", rule(Score::SqrtSoftplus, Selection::Table, WeightRule { scale: 1.5, ..sum(1e-20) })),
        ("table of chosen", rule(Score::Softmax, Selection::Table, chosen)),
    ]
}

fn case(name: &str, route: Route) -> Case {
    let [t, e, k] = route.sizes;
    let name = format!("{name} T={t} E={e} K={k}");
    let dtype = match route.choice.dtype {
        DType::F32 => route.dtype.to_string(),
        other => format!("{},{other}", route.dtype),
    };
    let operation = Operation::Route(route);
    Case { stage: Stage::Route, name, dtype, placement: Default::default(), operation }
}

/// The cases of route.
pub(crate) fn cases(scale: Scale) -> Vec<Case> {
    let mut cases = always::cases(scale);
    let mut push = |name: &str, route: Route, strided: bool| {
        let case = case(name, route);
        cases.push(if strided { case.strided() } else { case });
    };
    let route = |sizes, dtype, logits, rule| Route { sizes, dtype, logits, choice: Choice::new(rule) };
    let normal = Logits::Normal(1.5);
    let top = |rule: &RoutingRule| matches!(rule.selection, Selection::TopK { .. });
    for (name, rule) in rules() {
        let mut sizes = vec![[0, 8, 2], [1, 8, 2], [5, 12, 3], [3, 24, 4], [9, 60, 4], [7, 128, 8], [33, 64, 6]];
        sizes.extend([[4, 160, 6], [3, 256, 8], [2, 512, 10], [2, 8, 4]]);
        if scale == Scale::Full {
            sizes.extend([[300, 128, 8], [257, 512, 22], [1000, 16, 1]]);
        }
        for sizes in sizes {
            push(name, route(sizes, DType::F32, normal, rule), false);
        }
        for dtype in FLOATS {
            let mut odd = route([11, 20, 3], dtype, normal, rule);
            odd.choice = Choice { dtype, witness: top(&rule), ..odd.choice };
            push(&format!("{name} witness"), odd.clone(), false);
            push(&format!("{name} witness"), odd, true);
        }
        let choice = |c: Choice| Choice { flat_bias: true, witness: top(&rule), ..c };
        let kinds = [
            ("near-ties", Logits::NearTies),
            ("ties", Logits::Ties),
            ("flat", Logits::Flat),
            ("extreme", Logits::Extreme),
            ("not finite", Logits::NotFinite),
        ];
        for (kind, logits) in kinds {
            // the worth of a group is a sum, and no witness tells which ones are nearly tied
            if grouped(&rule) && matches!(logits, Logits::NearTies | Logits::Extreme) {
                continue;
            }
            let case = route([13, 32, 4], DType::F32, logits, rule);
            push(&format!("{name} {kind}"), Route { choice: choice(case.choice.clone()), ..case }, false);
        }
        if rule.selection == Selection::Table {
            let case = route([13, 32, 4], DType::F32, normal, rule);
            let choice = Choice { bad_table: true, ..case.choice.clone() };
            push(&format!("{name} bad ids"), Route { choice, ..case }, false);
        }
    }
    for dtype in FLOATS {
        for (name, rule) in rules().into_iter().filter(|(_, rule)| !grouped(rule)).take(4) {
            for sizes in [[3, 1, 1], [3, 8, 8], [2, 61, 61], [1, 4096, 16], [2, 4096, 1]] {
                push(name, route(sizes, dtype, normal, rule), false);
            }
            push(&format!("{name} ties"), route([9, 512, 32], dtype, Logits::Ties, rule), false);
        }
        for jitter in [0.01f32, 0.1] {
            let rule = RoutingRule { selection: Selection::SparseMixer { jitter }, ..RoutingRule::default() };
            let name = format!("sparse mixer {jitter}");
            for sizes in [[0, 16, 2], [1, 16, 2], [40, 16, 2], [3, 2, 2], [5, 131, 2]] {
                push(&name, route(sizes, dtype, normal, rule), false);
            }
            for (kind, logits) in [("ties", Logits::Ties), ("flat", Logits::Flat), ("not finite", Logits::NotFinite)] {
                push(&format!("{name} {kind}"), route([13, 16, 2], dtype, logits, rule), false);
            }
        }
    }
    let normalizers = [
        Normalize::None,
        Normalize::Sum { eps: 0.5 },
        Normalize::SumAtLeast { min: 0.25 },
        Normalize::SumAtLeast { min: 8.0 },
        Normalize::Lp { p: 2.0 },
    ];
    for (normalize, when) in
        normalizers.into_iter().flat_map(|n| [(n, ExpertScale::BeforeNormalize), (n, ExpertScale::AfterNormalize)])
    {
        let weights = WeightRule { normalize, expert_scale: Some(when), ..WeightRule::default() };
        let rule = RoutingRule { score: Score::Sigmoid, weights, ..RoutingRule::default() };
        for dtype in FLOATS {
            // tokens with such an expert among theirs and tokens without
            let case = route([24, 9, 2], DType::F32, normal, rule);
            let choice = Choice { dtype, nan_scale: true, ..case.choice.clone() };
            push(&format!("nan scale {normalize:?} {when:?}"), Route { choice, ..case }, false);
        }
    }
    let lp = WeightRule { normalize: Normalize::Sum { eps: 0.0 }, ..WeightRule::default() };
    let positive = RoutingRule { score: Score::Logit, weights: lp, ..RoutingRule::default() };
    push("logit score renormalised", route([5, 24, 4], DType::F32, Logits::Positive, positive), false);
    cases
}

fn grouped(rule: &RoutingRule) -> bool {
    matches!(rule.selection, Selection::TopK { groups: Some(_), .. })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operands::Expected;

    fn sigmoid_bias(flat_bias: bool) -> Route {
        let rule = rules()[3].1;
        let choice = Choice { flat_bias, ..Choice::new(rule) };
        Route { sizes: [1, 4, 2], dtype: DType::F32, logits: Logits::Normal(1.0), choice }
    }

    fn accepted(logits: &[f64], ids: [u32; 2]) -> bool {
        let route = sigmoid_bias(true);
        let mut prepared = Prepared::default();
        prepared.input("logits", Tensor::floats(DType::F32, [1, 4], logits.to_vec()));
        route.choice.operands(Data::new("test"), route.sizes, &mut prepared);
        route.choice.outputs(route.sizes, [logits, &[0.0; 4]], &mut prepared);
        route.resolve(&mut prepared, &[("experts", Values::Ids(ids.to_vec()))]);
        prepared.expected("experts") == Some(&mut Expected::Ids(ids.to_vec()))
    }

    #[test]
    fn near_ties_may_change_places() {
        let near = [20.0, 21.0, 22.0, -1.0];
        assert!(accepted(&near, [2, 1]) && accepted(&near, [0, 1]) && accepted(&near, [1, 2]));
        assert!(!accepted(&near, [2, 3]) && !accepted(&near, [2, 2]) && !accepted(&near, [9, 2]));
    }

    #[test]
    fn clear_choices_may_not() {
        let clear = [0.0, 1.0, 2.0, -1.0];
        assert!(accepted(&clear, [2, 1]));
        assert!(!accepted(&clear, [1, 2]) && !accepted(&clear, [2, 0]));
    }

    #[test]
    fn given_keys_have_no_near_ties() {
        let route = Route {
            sizes: [13, 32, 4],
            dtype: DType::F32,
            logits: Logits::NearTies,
            choice: Choice::new(RoutingRule::default()),
        };
        let prepared = route.prepare();
        let logits = prepared.floats("logits");
        assert_eq!(route.choice.key_error(&logits[..32], &[0.0; 32], &prepared), 0.0);
    }
}
