use super::*;
use crate::config::*;

const NAN: f64 = f64::NAN;
const INF: f64 = f64::INFINITY;

fn op(rule: RoutingRule, experts: usize, top_k: usize) -> Route<'static> {
    Route { rule, correction_bias: None, expert_scale: None, table: None, tokens: 1, experts, top_k }
}

fn weights(value: WeightValue, normalize: Normalize) -> WeightRule {
    WeightRule { value, normalize, ..WeightRule::default() }
}

fn top_k(by: SelectBy, bias: bool) -> Selection {
    Selection::TopK { by, bias, groups: None }
}

fn close(found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() < 1e-14, "{found} is not {expected}");
    }
}

#[test]
fn softmax_then_top_k() {
    let logits = [1f64.ln(), 4f64.ln(), 2f64.ln(), 3f64.ln()];
    let plain = route(&logits, &op(RoutingRule::default(), 4, 2));
    assert_eq!(plain.experts, [1, 3]);
    close(&plain.weights, &[0.4, 0.3]);
    assert_eq!(plain.witness[0].last, Candidate { expert: 3, key: 3f64.ln() });
    assert_eq!(plain.witness[0].next, Candidate { expert: 2, key: 2f64.ln() });

    let weights = weights(WeightValue::Score, Normalize::Sum { eps: 0.0 });
    let normalized = route(&logits, &op(RoutingRule { weights, ..RoutingRule::default() }, 4, 2));
    close(&normalized.weights, &[4.0 / 7.0, 3.0 / 7.0]);
}

#[test]
fn softmax_of_the_chosen_is_the_normalised_softmax() {
    let weights = weights(WeightValue::SoftmaxOfChosen, Normalize::None);
    let rule = RoutingRule { score: Score::Logit, selection: top_k(SelectBy::Logit, false), weights, always: 0 };
    let routes = route(&[1f64.ln(), 4f64.ln(), 2f64.ln(), 3f64.ln()], &op(rule, 4, 2));
    assert_eq!(routes.experts, [1, 3]);
    close(&routes.weights, &[4.0 / 7.0, 3.0 / 7.0]);
}

#[test]
fn correction_bias_moves_the_choice_but_not_the_weight() {
    let rule = RoutingRule { score: Score::Sigmoid, selection: top_k(SelectBy::Score, true), ..Default::default() };
    let bias = [0.0, 0.9, 0.0];
    let routes = route(&[0.0, -INF, 2.0], &Route { correction_bias: Some(&bias), ..op(rule, 3, 2) });
    assert_eq!(routes.experts, [1, 2]);
    close(&routes.weights, &[0.0, 1.0 / (1.0 + f64::exp(-2.0))]);
    // a selection without bias does not read it
    let unbiased = RoutingRule { selection: top_k(SelectBy::Score, false), ..rule };
    assert_eq!(route(&[0.0, -INF, 2.0], &Route { correction_bias: Some(&bias), ..op(unbiased, 3, 2) }).experts, [2, 0]);
    // added to the logit: 0, 1 - 3, 2 + ...
    let on_logits = RoutingRule { selection: top_k(SelectBy::Logit, true), ..rule };
    let routes = route(&[0.0, 1.0, 2.0], &Route { correction_bias: Some(&[1.5, 0.0, -2.0]), ..op(on_logits, 3, 2) });
    assert_eq!(routes.experts, [0, 1]);
    assert_eq!(routes.witness[0].last, Candidate { expert: 1, key: 1.0 });
    close(&routes.weights, &[0.5, 1.0 / (1.0 + f64::exp(-1.0))]);
}

#[test]
fn scores_that_underflow_or_saturate_make_no_ties() {
    let softmax = route(&[-1000.0, -900.0, 0.0, -800.0], &op(RoutingRule::default(), 4, 3));
    assert_eq!(softmax.experts, [2, 3, 1]);
    let rule = RoutingRule { score: Score::Sigmoid, ..Default::default() };
    assert_eq!(route(&[50.0, 60.0, 70.0], &op(rule, 3, 2)).experts, [2, 1]);
}

#[test]
fn groups_read_scores() {
    let groups = Groups { count: 2, keep: 1, score: GroupScore::SumOfBestTwo, masked: Masked::NegInfinity };
    let selection = Selection::TopK { by: SelectBy::Score, bias: true, groups: Some(groups) };
    let weights = WeightRule { normalize: Normalize::Sum { eps: 1e-20 }, scale: 2.5, ..Default::default() };
    let rule = RoutingRule { score: Score::Sigmoid, selection, weights, always: 0 };
    // best two of the groups: 0.5 + 0.5 and 1 + 0
    let logits = [0.0, 0.0, INF, -INF];
    let biased = route(&logits, &Route { correction_bias: Some(&[0.1, 0.0, 0.0, 0.0]), ..op(rule, 4, 2) });
    assert_eq!(biased.experts, [0, 1]);
    close(&biased.weights, &[1.25, 1.25]);
    let tied = route(&logits, &op(rule, 4, 2));
    assert_eq!(tied.experts, [0, 1]);
    let other = route(&logits, &Route { correction_bias: Some(&[0.0, 0.0, 0.0, 0.1]), ..op(rule, 4, 2) });
    assert_eq!(other.experts, [2, 3]);
    close(&other.weights, &[2.5, 0.0]);
}

#[test]
fn nan_and_infinite_logits() {
    let routes = route(&[NAN, 0.0, 0.0, -INF], &op(RoutingRule::default(), 4, 3));
    assert_eq!(routes.experts, [1, 2, 0]);
    close(&routes.weights, &[0.5, 0.5, 0.0]);
    assert!(routes.status.is_ok());
    let routes = route(&[INF, 0.0, INF, NAN], &op(RoutingRule::default(), 4, 3));
    assert_eq!(routes.experts, [0, 2, 1]);
    close(&routes.weights, &[0.5, 0.5, 0.0]);
    let chosen = RoutingRule { weights: weights(WeightValue::SoftmaxOfChosen, Normalize::None), ..Default::default() };
    close(&route(&[INF, 0.0, INF, NAN], &op(chosen, 4, 3)).weights, &[0.5, 0.5, 0.0]);
}

#[test]
fn no_finite_logit() {
    for logits in [[NAN; 3], [-INF; 3], [INF; 3], [INF, NAN, -INF]] {
        for selection in [Selection::default(), Selection::SparseMixer { jitter: 0.1 }, Selection::Table] {
            let routes = route(&logits, &op(RoutingRule { selection, ..Default::default() }, 3, 2));
            assert_eq!(routes.experts, [0, 1]);
            assert!(routes.weights.iter().all(|w| w.is_nan()));
            assert_eq!(routes.status, Status::NO_FINITE_SCORE);
            assert_eq!(routes.witness, [NO_WITNESS]);
        }
    }
}

#[test]
fn sparse_mixer_uses_its_own_values_and_the_rest_of_the_rule() {
    let selection = Selection::SparseMixer { jitter: 0.25 };
    let rule =
        RoutingRule { selection, weights: WeightRule { scale: 2.0, ..Default::default() }, ..Default::default() };
    let routes = route(&[1.0, 4.0, 3.0, 1.5], &op(rule, 4, 2));
    assert_eq!(routes.experts, [1, 2]);
    close(&routes.weights, &[2.0 / (1.0 + f64::exp(-1.0)), 2.0 / (1.0 + f64::exp(-1.5))]);
}

#[test]
fn some_are_always_chosen_and_normalised_with_the_others() {
    let rule = RoutingRule {
        score: Score::Sigmoid,
        selection: top_k(SelectBy::Score, true),
        weights: weights(WeightValue::Score, Normalize::Sum { eps: 0.0 }),
        always: 2,
    };
    let logits = [0.0, INF, 0.0, 0.0, INF];
    let routes = route(&logits, &Route { correction_bias: Some(&[5.0, 0.0, 1.0]), ..op(rule, 5, 3) });
    assert_eq!(routes.experts, [0, 3, 4]);
    close(&routes.weights, &[0.25, 0.25, 0.5]);
    assert_eq!(routes.witness[0].last, Candidate { expert: 0, key: 5.5 });
    assert_eq!(routes.witness[0].next.expert, 2);
    // groups are of those that compete
    let groups = Groups { count: 3, keep: 1, score: GroupScore::Best, masked: Masked::NegInfinity };
    let selection = Selection::TopK { by: SelectBy::Score, bias: false, groups: Some(groups) };
    assert_eq!(route(&logits, &op(RoutingRule { selection, ..rule }, 5, 3)).experts, [1, 3, 4]);
}

#[test]
fn table() {
    let experts = [2, 0, 1, 1, 7, 2];
    let rule = RoutingRule {
        score: Score::Sigmoid,
        selection: Selection::Table,
        weights: weights(WeightValue::Score, Normalize::Sum { eps: 0.0 }),
        always: 0,
    };
    let logits = [0.0, INF, 0.0].repeat(4);
    let table = Some(Table { experts: &experts, token_ids: &[0, 1, 2, 3] });
    let routes = route(&logits, &Route { table, tokens: 4, ..op(rule, 3, 2) });
    assert_eq!(routes.experts, [2, 0, 1, 1, NO_EXPERT, 2, NO_EXPERT, NO_EXPERT]);
    close(&routes.weights, &[0.5, 0.5, 0.5, 0.5, 0.0, 1.0, 0.0, 0.0]);
    assert_eq!(routes.status, Status::TOKEN_OUT_OF_RANGE | Status::EXPERT_OUT_OF_RANGE);
    let chosen = weights(WeightValue::SoftmaxOfChosen, Normalize::None);
    let routes = route(&logits, &Route { table, tokens: 4, ..op(RoutingRule { weights: chosen, ..rule }, 3, 2) });
    close(&routes.weights, &[0.5, 0.5, 0.5, 0.5, 0.0, 1.0, 0.0, 0.0]);
}

#[test]
fn a_token_id_near_the_end_of_the_range() {
    let rule = RoutingRule { selection: Selection::Table, ..Default::default() };
    let table = Some(Table { experts: &[0, 1], token_ids: &[u32::MAX] });
    assert_eq!(route(&[0.0, 0.0], &Route { table, ..op(rule, 2, 2) }).status, Status::TOKEN_OUT_OF_RANGE);
}

#[test]
fn every_expert_and_one_expert_and_no_token() {
    let all = route(&[0.0, 0.0, 0.0], &op(RoutingRule::default(), 3, 3));
    assert_eq!(all.experts, [0, 1, 2]);
    close(&all.weights, &[1.0 / 3.0; 3]);
    assert_eq!(all.witness[0].next, Candidate::NONE);
    assert_eq!(route(&[-7.0], &op(RoutingRule::default(), 1, 1)).weights, [1.0]);
    assert!(route(&[], &Route { tokens: 0, ..op(RoutingRule::default(), 3, 2) }).experts.is_empty());
}

#[test]
fn gate_route_is_the_two_in_order() {
    let gate_op = Gate {
        x: &[1.0, 2.0],
        router: &[1.0, 0.0, 0.0, 1.0],
        bias: None,
        norm_weight: None,
        config: GateConfig::default(),
        tokens: 1,
        hidden: 2,
        experts: 2,
    };
    let (gated, routes) = gate_route(&gate_op, &op(RoutingRule::default(), 2, 1));
    assert_eq!(gated.logits, [1.0, 2.0]);
    assert_eq!(routes, route(&gated.logits, &op(RoutingRule::default(), 2, 1)));
}

#[test]
fn gathered_weights() {
    let op = GatherWeights {
        scores: &[1.0, 3.0, 0.0, 0.0, 5.0, 0.0],
        ids: &[0, 1, 0, 2],
        expert_scale: None,
        tokens: 2,
        experts: 3,
        top_k: 2,
    };
    assert_eq!(gather_weights(&op), (vec![0.25, 0.75, 0.0, 0.0], Status::OK));
    let scaled = gather_weights(&GatherWeights { expert_scale: Some(&[2.0, 4.0, 1.0]), ..op });
    assert_eq!(scaled.0, [0.5, 3.0, 0.0, 0.0]);
    let bad = gather_weights(&GatherWeights { ids: &[3, 1, NO_EXPERT, 1], ..op });
    assert_eq!(bad, (vec![0.0, 1.0, 0.0, 1.0], Status::EXPERT_OUT_OF_RANGE));
    assert!(gather_weights(&GatherWeights { ids: &[NO_EXPERT; 4], ..op }).1.is_ok());
}
