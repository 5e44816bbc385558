use crate::support::*;
use fused_moe_core::config::*;
use fused_moe_core::operation::{Choice, GatherWeights, Route, TokenTable, Witness};
use fused_moe_core::{Backend, DType, NO_EXPERT, reference};
use fused_moe_cpu::Cpu;
use proptest::prelude::*;

/// Keys that differ by no more than this share of them may come in either order where f32 rounds them: a score plus a
/// correction bias. Logits are compared as they are.
const NEAR: f64 = 2e-6;

struct Case {
    rule: RoutingRule,
    logits: Buffer,
    correction_bias: Option<Buffer>,
    expert_scale: Option<Buffer>,
    table: Option<(Buffer, Buffer)>,
    witness: bool,
    size: [usize; 3],
    gap: usize,
}

fn rule(random: &mut Random, experts: usize, k: usize) -> RoutingRule {
    let score = random.pick(&[Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus, Score::Logit]);
    let always = if random.below(4) == 0 { random.below(k) } else { 0 };
    let competing = experts - always;
    let divisors: Vec<usize> = (1..=competing).filter(|&n| competing.is_multiple_of(n)).collect();
    let count = random.pick(&divisors);
    let least = (k - always).div_ceil(competing / count);
    let groups = Groups {
        count,
        keep: least + random.below(count - least + 1),
        score: random.pick(&[GroupScore::SumOfBestTwo, GroupScore::Best]),
        masked: random.pick(&[Masked::NegInfinity, Masked::Zero]),
    };
    let top_k = Selection::TopK {
        by: random.pick(&[SelectBy::Score, SelectBy::Logit]),
        bias: random.flip(),
        groups: random.flip().then_some(groups),
    };
    let selection = match random.below(6) {
        0 => Selection::Table,
        1 if k == 2 => Selection::SparseMixer { jitter: random.pick(&[0.0, 0.01, 0.3]) },
        _ => top_k,
    };
    let normalize = random.pick(&[
        Normalize::None,
        Normalize::Sum { eps: 1e-20 },
        Normalize::SumAtLeast { min: 0.25 },
        Normalize::Lp { p: 2.0 },
        Normalize::Lp { p: 0.5 },
    ]);
    let expert_scale = random.pick(&[None, Some(ExpertScale::BeforeNormalize), Some(ExpertScale::AfterNormalize)]);
    let value = random.pick(&[WeightValue::Score, WeightValue::SoftmaxOfChosen]);
    let weights = WeightRule { value, expert_scale, normalize, scale: random.pick(&[1.0, 2.5]) };
    let top = matches!(selection, Selection::TopK { .. });
    RoutingRule { score, selection, weights, always: if top { always } else { 0 } }
}

fn case(random: &mut Random, size: [usize; 3]) -> Case {
    let [t, e, k] = size;
    let rule = rule(random, e, k);
    // Keys that f32 rounds to 0 or 1 would be ties between groups.
    let grouped = matches!(rule.selection, Selection::TopK { groups: Some(_), .. });
    let width = if grouped { 3.0 } else { random.pick(&[0.1, 3.0, 30.0]) };
    let mut logits = random.units(t * e, width);
    for i in 0..logits.len() {
        match random.below(40) {
            0..=3 => logits[i] = logits[i - i % e + random.below(e)],
            4 if t > 3 => logits[i] = random.pick(&[f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -0.0]),
            _ => {}
        }
    }
    if t > 3 {
        logits[e..2 * e].fill(f64::NAN);
    }
    let gap = random.pick(&[0, 3]);
    let floats = |random: &mut Random, rows, cols, values: &[f64]| {
        Buffer::floats(random.pick(&FLOATS), [rows, cols], gap, values)
    };
    let logits = floats(random, t, e, &logits);
    let vocabulary = 5;
    let table = (rule.selection == Selection::Table).then(|| {
        let ids: Vec<u32> = (0..t).map(|_| random.below(vocabulary + usize::from(t > 5)) as u32).collect();
        let bad = usize::from(t > 20);
        let entry = |r: &mut Random| if r.below(20) == 0 { NO_EXPERT } else { r.below(e + bad) as u32 };
        let experts: Vec<u32> = (0..vocabulary * k).map(|_| entry(random)).collect();
        (Buffer::ids([t], 0, &ids), Buffer::ids([vocabulary, k], gap, &experts))
    });
    let biased = matches!(rule.selection, Selection::TopK { bias: true, .. });
    let (units, competing) = (random.units(e, 1.0), e - rule.always);
    Case {
        rule,
        logits,
        correction_bias: biased.then(|| floats(random, 1, competing, &units)),
        expert_scale: rule.weights.expert_scale.map(|_| floats(random, 1, e, &units)),
        table,
        witness: matches!(rule.selection, Selection::TopK { .. }) && random.flip(),
        size,
        gap,
    }
}

impl Case {
    fn run(&self, cpu: &Cpu, stream: &fused_moe_cpu::CpuStream) -> Vec<Buffer> {
        let [t, _, k] = self.size;
        let mut experts = Buffer::new(DType::U32, [t, k], self.gap);
        let mut weights = Buffer::new(DType::F32, [t, k], self.gap);
        let (mut keys, mut ids) = (Buffer::new(DType::F32, [t, 2], 1), Buffer::new(DType::U32, [t, 2], 0));
        let choice = Choice {
            correction_bias: self.correction_bias.as_ref().map(|b| b.view()),
            expert_scale: self.expert_scale.as_ref().map(|b| b.view()),
            table: self
                .table
                .as_ref()
                .map(|(ids, experts)| TokenTable { token_ids: ids.view(), experts: experts.view() }),
            witness: self.witness.then(|| Witness { keys: keys.view_mut(), experts: ids.view_mut() }),
            ..Choice::new(self.rule, experts.view_mut(), weights.view_mut())
        };
        cpu.route(stream, Route { logits: self.logits.view(), choice }).unwrap();
        vec![experts, weights, keys, ids]
    }

    fn reference(&self, rule: RoutingRule, top_k: usize) -> reference::Routes {
        let values = |b: &Option<Buffer>| b.as_ref().map(|b| b.values());
        let (bias, scale) = (values(&self.correction_bias), values(&self.expert_scale));
        let table = self.table.as_ref().map(|(ids, experts)| (ids.numbers(), experts.numbers()));
        let op = reference::Route {
            rule,
            correction_bias: bias.as_deref(),
            expert_scale: scale.as_deref(),
            table: table.as_ref().map(|(token_ids, experts)| reference::Table { experts, token_ids }),
            tokens: self.size[0],
            experts: self.size[1],
            top_k,
        };
        reference::route(&self.logits.values(), &op)
    }

    /// Score plus bias of every expert, `[T, E]`.
    fn keys(&self) -> Vec<f64> {
        let [t, e, _] = self.size;
        let selection = Selection::TopK { by: SelectBy::Logit, bias: false, groups: None };
        let rule = RoutingRule { selection, weights: WeightRule::default(), always: 0, ..self.rule };
        let scores = self.reference(rule, e);
        let mut bias = self.correction_bias.as_ref().map_or(vec![], |b| b.values());
        bias.resize(e, 0.0);
        let mut keys = vec![0.0; t * e];
        for (i, (&expert, weight)) in scores.experts.iter().zip(scores.weights).enumerate() {
            keys[i / e * e + expert as usize] = weight + bias[expert as usize];
        }
        keys
    }

    fn check(&self) {
        let [t, e, k] = self.size;
        let expected = self.reference(self.rule, k);
        let rounded = match self.rule.selection {
            Selection::TopK { by: SelectBy::Score, bias: true, groups: None } => self.keys(),
            _ => vec![],
        };
        check(
            |cpu, stream| self.run(cpu, stream),
            |outputs, status| {
                assert_eq!(status, expected.status, "{:?}", self.rule);
                let (experts, weights) = (outputs[0].numbers(), outputs[1].values());
                for t in 0..t {
                    let slots = t * k..(t + 1) * k;
                    let mut same = true;
                    for slot in slots.clone() {
                        let (found, wanted) = (experts[slot], expected.experts[slot]);
                        let key = |expert: u32| rounded.get(t * e + expert as usize);
                        let near = |(a, b): (&f64, &f64)| (a - b).abs() <= NEAR * a.abs();
                        let fine = found == wanted || key(found).zip(key(wanted)).is_some_and(near);
                        assert!(fine, "token {t}: {found} is not {wanted}, {:?}", self.rule);
                        same &= found == wanted;
                    }
                    for slot in slots.filter(|_| same) {
                        let (found, wanted) = (weights[slot], expected.weights[slot]);
                        let equal = found == wanted || (found.is_nan() && wanted.is_nan());
                        let near = (found - wanted).abs() <= 1e-6 * wanted.abs() + 1e-37;
                        assert!(equal || near, "token {t}: weight {found} is not {wanted}, {:?}", self.rule);
                    }
                    if self.witness && same {
                        let (keys, ids) = (outputs[2].values(), outputs[3].numbers());
                        let witness = expected.witness[t];
                        for (i, wanted) in [witness.last, witness.next].into_iter().enumerate() {
                            let (found, id) = (keys[2 * t + i], ids[2 * t + i]);
                            let near = (found - wanted.key).abs() <= NEAR * wanted.key.abs().max(1.0);
                            assert!(found == wanted.key || near, "key {found} is not {}, {:?}", wanted.key, self.rule);
                            assert!(id == wanted.expert || !rounded.is_empty(), "{id} is not {}", wanted.expert);
                        }
                    }
                }
            },
        );
    }
}

#[test]
fn route_agrees_with_the_reference() {
    let mut random = Random(41);
    for e in [1, 2, 3, 8, 12, 24, 60, 128, 160, 256] {
        for _ in 0..40 {
            let t = random.pick(&[0, 1, 2, 5, 33]);
            let k = random.pick(&[1, 2, 8, e / 2, e]).clamp(1, e);
            case(&mut random, [t, e, k]).check();
        }
    }
    for (e, k) in [(512, 10), (512, 512), (513, 1), (4096, 8), (4096, 32), (4096, 100)] {
        for _ in 0..4 {
            case(&mut random, [2, e, k]).check();
        }
    }
    case(&mut random, [1, 4096, 4096]).check();
    case(&mut random, [200, 128, 8]).check();
}

#[test]
fn scores_smaller_than_f32_has_numbers_for_keep_their_ratio() {
    let cpu = Cpu::with_threads(1).unwrap();
    let stream = cpu.stream().unwrap();
    for score in [Score::Softmax, Score::Sigmoid] {
        let logits = Buffer::floats(DType::F32, [1, 3], 0, &[0.0, -120.0, -121.0]);
        let bias = Buffer::floats(DType::F32, [3], 0, &[0.0, 9.0, 8.0]);
        let (mut experts, mut weights) = (Buffer::new(DType::U32, [1, 2], 0), Buffer::new(DType::F32, [1, 2], 0));
        let selection = Selection::TopK { by: SelectBy::Score, bias: true, groups: None };
        let rule = WeightRule { normalize: Normalize::Sum { eps: 0.0 }, ..WeightRule::default() };
        let choice = Choice {
            correction_bias: Some(bias.view()),
            ..Choice::new(
                RoutingRule { score, selection, weights: rule, always: 0 },
                experts.view_mut(),
                weights.view_mut(),
            )
        };
        cpu.route(&stream, Route { logits: logits.view(), choice }).unwrap();
        assert_eq!(experts.numbers(), [1, 2]);
        let e = std::f64::consts::E;
        close(&weights, &[e / (1.0 + e), 1.0 / (1.0 + e)], |_| 1e-6);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn routes_are_distinct_experts_from_the_best_down(seed in any::<u64>(), e in 1usize..70, k in 1usize..70) {
        let mut random = Random(seed);
        let k = k.min(e);
        let logits: Vec<f64> = (0..6 * e).map(|_| (4.0 * random.unit()).round()).collect();
        let input = Buffer::floats(DType::F32, [6, e], 0, &logits);
        let cpu = Cpu::with_threads(1).unwrap();
        let (mut experts, mut weights) = (Buffer::new(DType::U32, [6, k], 0), Buffer::new(DType::F32, [6, k], 0));
        let choice = Choice::new(RoutingRule::default(), experts.view_mut(), weights.view_mut());
        cpu.route(&cpu.stream().unwrap(), Route { logits: input.view(), choice }).unwrap();
        for t in 0..6 {
            let mut order: Vec<usize> = (0..e).collect();
            order.sort_by(|&a, &b| logits[t * e + b].partial_cmp(&logits[t * e + a]).unwrap());
            let found = &experts.numbers()[t * k..][..k];
            prop_assert!(found.iter().zip(order).all(|(&found, wanted)| found as usize == wanted));
            let sum: f64 = weights.values()[t * k..][..k].iter().sum();
            prop_assert!(sum <= 1.0 + 1e-6 && (k < e || sum >= 1.0 - 1e-6));
        }
    }
}

#[test]
fn gather_weights_agrees_with_the_reference() {
    let mut random = Random(42);
    for [t, e, k] in [[0, 3, 2], [1, 1, 1], [5, 8, 8], [40, 60, 4], [300, 128, 8], [2, 4096, 5000]] {
        for gap in [0, 3] {
            let scores: Vec<f64> = (0..t * e).map(|_| random.unit().abs().max(0.3) - 0.3).collect();
            let scores = Buffer::floats(random.pick(&FLOATS), [t, e], gap, &scores);
            let bad = usize::from(t == 40);
            let id = |r: &mut Random| if r.below(15) == 0 { NO_EXPERT } else { r.below(e + bad) as u32 };
            let ids: Vec<u32> = (0..t * k).map(|_| id(&mut random)).collect();
            let input = Buffer::ids([t, k], gap, &ids);
            let scale = random.flip().then(|| Buffer::floats(DType::F16, [e], 0, &random.units(e, 1.0)));
            let scale_values = scale.as_ref().map(|b| b.values());
            let (expected, wanted) = reference::gather_weights(&reference::GatherWeights {
                scores: &scores.values(),
                ids: &ids,
                expert_scale: scale_values.as_deref(),
                tokens: t,
                experts: e,
                top_k: k,
            });
            let run = |cpu: &Cpu, stream: &_| {
                let mut weights = Buffer::new(DType::F32, [t, k], gap);
                let operands = GatherWeights {
                    scores: scores.view(),
                    experts: input.view(),
                    expert_scale: scale.as_ref().map(|b| b.view()),
                    weights: weights.view_mut(),
                };
                cpu.gather_weights(stream, operands).unwrap();
                vec![weights]
            };
            check(run, |outputs, status| {
                assert_eq!(status, wanted);
                close(&outputs[0], &expected, |i| 1e-6 * expected[i].abs());
            });
        }
    }
}
