//! The reference held against itself: invariants, independent oracles, whole layers against the plain expert loop.

use fused_moe_core::config::*;
use fused_moe_core::reference::*;
use fused_moe_core::{NO_EXPERT, NO_ROW, Status};
use proptest::prelude::*;

/// Numbers in -1..1 that look random.
fn numbers(seed: u64, n: usize) -> Vec<f64> {
    let mut state = seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f64 / (1u64 << 30) as f64 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// The weights of a layer, owned.
struct Owned {
    router: Vec<f64>,
    router_norm: Vec<f64>,
    gate_up: Vec<f64>,
    gate_up_bias: Vec<f64>,
    down: Vec<f64>,
    down_bias: Vec<f64>,
    shared: [Vec<f64>; 3],
}

impl Owned {
    fn new(c: &LayerConfig, seed: u64) -> Self {
        let (n, s) = (c.gate_up_rows(), c.shared.map_or(0, |shared| shared.intermediate));
        Self {
            router: numbers(seed, c.experts * c.hidden),
            router_norm: numbers(seed + 1, c.hidden),
            gate_up: numbers(seed + 2, c.experts * n * c.hidden),
            gate_up_bias: numbers(seed + 3, c.experts * n),
            down: numbers(seed + 4, c.experts * c.hidden * c.intermediate),
            down_bias: numbers(seed + 5, c.experts * c.hidden),
            shared: [
                numbers(seed + 6, 2 * s * c.hidden),
                numbers(seed + 7, c.hidden * s),
                numbers(seed + 8, if s > 0 { c.hidden } else { 0 }),
            ],
        }
    }

    fn layer(&self) -> Layer<'_> {
        let [gate_up, down, gate] = &self.shared;
        Layer {
            router: &self.router,
            router_norm: Some(&self.router_norm),
            gate_up: &self.gate_up,
            gate_up_bias: Some(&self.gate_up_bias),
            down: &self.down,
            down_bias: Some(&self.down_bias),
            shared: Some(SharedExpert { gate_up, gate_up_bias: None, down, down_bias: None, gate: Some(gate) }),
            ..Layer::default()
        }
    }

    fn experts(&self, c: &LayerConfig) -> Vec<Expert<'_>> {
        let (i, n) = (c.intermediate, c.gate_up_rows());
        let mut experts = experts_of_stack(&self.gate_up, &self.down, c.activation, (c.hidden, i));
        for (e, expert) in experts.iter_mut().enumerate() {
            let bias = &self.gate_up_bias[e * n..(e + 1) * n];
            expert.gate_bias = c.activation.is_gated().then_some(&bias[..i]);
            expert.up_bias = Some(&bias[n - i..]);
            expert.down_bias = Some(&self.down_bias[e * c.hidden..(e + 1) * c.hidden]);
        }
        experts
    }
}

fn input(x: &[f64], tokens: usize) -> Input<'_> {
    Input { x, tokens, ..Input::default() }
}

fn normalized(experts: usize, top_k: usize) -> LayerConfig {
    let mut config = LayerConfig::new(5, 3, experts, top_k);
    config.routing.weights.normalize = Normalize::Sum { eps: 0.0 };
    config
}

fn looped(c: &LayerConfig, owned: &Owned, x: &[f64], ids: &[u32], weights: &[f64]) -> (Vec<f64>, Status) {
    let experts = owned.experts(c);
    expert_loop(&ExpertLoop {
        x,
        ids,
        weights,
        experts: &experts,
        activation: c.activation,
        weight_on: c.weight_on,
        tokens: ids.len() / c.top_k,
        hidden: c.hidden,
        intermediate: c.intermediate,
        top_k: c.top_k,
    })
}

#[test]
fn stages_and_expert_loop_agree_bit_for_bit() {
    let activations = [
        Activation::Gated(Function::Silu),
        Activation::Gated(Function::GeluErf),
        Activation::Plain(Function::ReluSquared),
        Activation::ClampedSwish { alpha: 1.702, limit: 0.5 },
    ];
    for (tokens, experts, top_k) in [(0, 4, 2), (1, 4, 2), (7, 12, 5), (13, 3, 3), (5, 1, 1), (2, 60, 1)] {
        for activation in activations {
            for weight_on in [WeightOn::Input, WeightOn::Output] {
                let config = LayerConfig { activation, weight_on, ..normalized(experts, top_k) };
                let owned = Owned::new(&config, 11);
                let x = numbers(99, tokens * config.hidden);
                let out = forward(&config, &owned.layer(), &input(&x, tokens));
                let (y, status) = looped(&config, &owned, &x, &out.routes.experts, &out.routes.weights);
                assert_eq!(out.y, y);
                assert!(status.is_ok() && out.status.is_ok());
                assert_eq!(out.statistics.total as usize, tokens * top_k);
            }
        }
    }
}

#[test]
fn the_three_entries_agree() {
    let config = normalized(8, 3);
    let owned = Owned::new(&config, 5);
    let x = numbers(6, 4 * config.hidden);
    let from_x = forward(&config, &owned.layer(), &input(&x, 4));
    let from_logits = forward_from_logits(&config, &owned.layer(), &input(&x, 4), &from_x.logits);
    assert_eq!(from_x, from_logits);
    let Routes { experts, weights, .. } = &from_x.routes;
    let from_routes = forward_from_routes(&config, &owned.layer(), &input(&x, 4), experts, weights);
    assert_eq!(from_x.y, from_routes.y);
    assert_eq!(from_x.permutation, from_routes.permutation);
    assert_eq!(from_x.statistics, from_routes.statistics);
    assert_eq!((&from_routes.routes.experts, &from_routes.routes.weights), (experts, weights));
    assert!(from_routes.logits.is_empty() && from_routes.routes.witness.is_empty());
}

#[test]
fn shared_expert_residual_scale_and_norm_are_added_to_the_routed_sum() {
    let shared = SharedConfig { intermediate: 2, activation: Activation::default(), gated: true, scale: 0.5 };
    let config = LayerConfig { routed_scale: 2.0, shared: Some(shared), ..normalized(4, 2) };
    let owned = Owned::new(&config, 21);
    let (x, residual) = (numbers(1, 3 * 5), numbers(2, 3 * 5));
    let norm = Norm { weight: None, eps: 1e-6 };
    let full = Input { residual: Some(&residual), norm: Some(norm), ..input(&x, 3) };
    let out = forward(&config, &owned.layer(), &full);
    let routed = looped(&config, &owned, &x, &out.routes.experts, &out.routes.weights).0;
    // a layer of one expert with weight one is a shared expert
    let alone = LayerConfig { intermediate: 2, ..LayerConfig::new(5, 2, 1, 1) };
    let weights = Layer { gate_up: &owned.shared[0], down: &owned.shared[1], ..Layer::default() };
    let dense = forward_from_routes(&alone, &weights, &input(&x, 3), &[0; 3], &[1.0; 3]).y;
    for t in 0..3 {
        let gate: f64 = (0..5).map(|h| x[t * 5 + h] * owned.shared[2][h]).sum();
        for h in t * 5..(t + 1) * 5 {
            let expected = residual[h] + 2.0 * routed[h] + 0.5 * dense[h] / (1.0 + (-gate).exp());
            assert!((out.y[h] - expected).abs() < 1e-14);
        }
    }
    assert_eq!(out.normed, Some(rms_norm(&out.y, None, 1e-6, 5)));

    let ungated = LayerConfig { shared: Some(SharedConfig { gated: false, ..shared }), ..config.clone() };
    let y = forward(&ungated, &owned.layer(), &full).y;
    assert!((y[0] - (residual[0] + 2.0 * routed[0] + 0.5 * dense[0])).abs() < 1e-14);
    let (gate_up_bias, down_bias) = (numbers(3, 4), numbers(4, 5));
    let (gate_up, down) = (&owned.shared[0], &owned.shared[1]);
    let biases = (Some(&gate_up_bias[..]), Some(&down_bias[..]));
    let biased = Layer { gate_up_bias: biases.0, down_bias: biases.1, ..weights };
    let dense = forward_from_routes(&alone, &biased, &input(&x, 3), &[0; 3], &[1.0; 3]).y;
    let expert = SharedExpert { gate_up, gate_up_bias: biases.0, down, down_bias: biases.1, gate: None };
    let y = forward(&ungated, &Layer { shared: Some(expert), ..owned.layer() }, &full).y;
    assert!((y[0] - (residual[0] + 2.0 * routed[0] + 0.5 * dense[0])).abs() < 1e-14);
    // weights of a shared expert that the configuration does not have are not read
    let without = LayerConfig { shared: None, ..config };
    let y = forward(&without, &owned.layer(), &full).y;
    assert!((y[0] - (residual[0] + 2.0 * routed[0])).abs() < 1e-14);
}

#[test]
fn the_gates_norm_feeds_the_experts_only_if_it_says_so() {
    let shared = SharedConfig { intermediate: 2, activation: Activation::default(), gated: true, scale: 1.0 };
    let mut config = LayerConfig { shared: Some(shared), ..normalized(6, 2) };
    let owned = Owned::new(&config, 31);
    let x = numbers(3, 4 * 5);
    let n = rms_norm(&x, Some(&owned.router_norm), f64::from(1e-5f32), 5);
    let plain_of_normed = forward(&config, &owned.layer(), &input(&n, 4));

    config.gate.norm = Some(GateNorm { eps: 1e-5, feeds_experts: true });
    let fed = forward(&config, &owned.layer(), &input(&x, 4));
    assert_eq!(fed.y, plain_of_normed.y);
    let from_logits = forward_from_logits(&config, &owned.layer(), &input(&x, 4), &fed.logits);
    assert_eq!(from_logits.y, fed.y);

    config.gate.norm = Some(GateNorm { eps: 1e-5, feeds_experts: false });
    let router_only = forward(&config, &owned.layer(), &input(&x, 4));
    assert_eq!(router_only.routes, fed.routes);
    config.gate.norm = None;
    let Routes { experts, weights, .. } = &fed.routes;
    assert_eq!(router_only.y, forward_from_routes(&config, &owned.layer(), &input(&x, 4), experts, weights).y);
}

#[test]
fn given_routes_with_bad_ids_contribute_nothing() {
    let config = normalized(4, 2);
    let owned = Owned::new(&config, 41);
    let x = numbers(4, 3 * 5);
    let (ids, weights) = ([1, 9, NO_EXPERT, NO_EXPERT, 3, 0], [0.5, f64::NAN, f64::NAN, 7.0, 1.0, 0.0]);
    let out = forward_from_routes(&config, &owned.layer(), &input(&x, 3), &ids, &weights);
    assert_eq!(out.status, Status::EXPERT_OUT_OF_RANGE);
    assert!(out.y.iter().all(|y| y.is_finite()));
    assert_eq!(out.y[5..10], [0.0; 5]);
    assert_eq!((out.y, out.status), looped(&config, &owned, &x, &ids, &weights));
    assert_eq!((out.statistics.total, out.statistics.dead), (3, 1));
}

#[test]
fn a_token_that_is_not_a_number_harms_no_other() {
    let config = normalized(6, 2);
    let owned = Owned::new(&config, 51);
    let x = numbers(5, 3 * 5);
    let clean = forward(&config, &owned.layer(), &input(&x, 3));
    for poison in [f64::NAN, f64::INFINITY] {
        let mut x = x.clone();
        x[7] = poison;
        let out = forward(&config, &owned.layer(), &input(&x, 3));
        assert_eq!(out.status, Status::NO_FINITE_SCORE);
        assert_eq!(out.routes.experts[2..4], [0, 1]);
        assert!(out.y[5..10].iter().all(|y| y.is_nan()));
        assert_eq!((&out.y[..5], &out.y[10..]), (&clean.y[..5], &clean.y[10..]));
    }
}

#[test]
fn all_tokens_on_one_expert() {
    let config = normalized(5, 1);
    let owned = Owned::new(&config, 61);
    let x = numbers(6, 8 * 5);
    let logits = [0.0, 0.0, 0.0, 9.0, 0.0].repeat(8);
    let out = forward_from_logits(&config, &owned.layer(), &input(&x, 8), &logits);
    assert_eq!(out.permutation.offsets, [0, 0, 0, 0, 8, 8]);
    assert_eq!((out.statistics.imbalance, out.statistics.dead), (5.0, 4));
    assert_eq!(out.y, looped(&config, &owned, &x, &[3; 8], &[1.0; 8]).0);
}

/// Chosen experts of one token by a full sort: kept groups first, larger keys first, lower experts first.
fn sorted_choice(keys: &[f64], groups: Option<Groups>, top_k: usize) -> Vec<u32> {
    let mut keyed: Vec<(bool, f64, u32)> = keys.iter().enumerate().map(|(e, &key)| (false, key, e as u32)).collect();
    if let Some(groups) = groups {
        let size = keys.len() / groups.count;
        let mut worth: Vec<(f64, usize)> = Vec::new();
        for (g, group) in keys.chunks(size).enumerate() {
            let mut group = group.to_vec();
            group.sort_by(|a, b| b.total_cmp(a));
            let two = groups.score == GroupScore::SumOfBestTwo && size > 1;
            worth.push((if two { group[0] + group[1] } else { group[0] }, g));
        }
        worth.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        for &(_, g) in &worth[groups.keep..] {
            for keyed in &mut keyed[g * size..(g + 1) * size] {
                match groups.masked {
                    Masked::Zero => keyed.1 = 0.0,
                    Masked::NegInfinity => keyed.0 = true,
                }
            }
        }
    }
    keyed.sort_by(|a, b| {
        let by_key = if a.0 && b.0 { std::cmp::Ordering::Equal } else { b.1.total_cmp(&a.1) };
        a.0.cmp(&b.0).then(by_key).then(a.2.cmp(&b.2))
    });
    keyed.iter().take(top_k).map(|keyed| keyed.2).collect()
}

/// Experts, K, and logits of a few tokens on a coarse grid, so that ties are common.
fn tokens() -> impl Strategy<Value = (usize, usize, Vec<f64>)> {
    (1usize..20).prop_flat_map(|experts| {
        let logits = proptest::collection::vec((-6i32..6).prop_map(|l| f64::from(l) / 2.0), experts * 5);
        (Just(experts), 1..=experts, logits)
    })
}

fn route_op(rule: RoutingRule, experts: usize, top_k: usize, tokens: usize) -> Route<'static> {
    Route { rule, correction_bias: None, expert_scale: None, table: None, tokens, experts, top_k }
}

proptest! {
    #[test]
    fn permutation_is_a_stable_bijection(
        ids in proptest::collection::vec(prop_oneof![8 => 0u32..9, 1 => Just(NO_EXPERT), 1 => 9u32..12], 0..200),
        first in 0usize..9, length in 0usize..9,
    ) {
        let local = first..(first + length).min(9);
        let p = permute(&Permute { ids: &ids, experts: 9, local: local.clone() });
        let kept = |slot: usize| local.contains(&(ids[slot] as usize));
        let total = (0..ids.len()).filter(|&slot| kept(slot)).count();
        prop_assert_eq!(p.offsets.len(), 10);
        prop_assert_eq!((p.offsets[0], p.offsets[9] as usize), (0, total));
        prop_assert!(p.offsets.is_sorted());
        prop_assert_eq!(p.status.is_ok(), ids.iter().all(|&id| id < 9 || id == NO_EXPERT));
        for slot in 0..ids.len() {
            prop_assert_eq!(p.slot_row[slot] != NO_ROW, kept(slot));
            if kept(slot) {
                prop_assert_eq!(p.row_slot[p.slot_row[slot] as usize] as usize, slot);
            }
        }
        prop_assert!(p.row_slot[total..].iter().all(|&slot| slot == NO_ROW));
        for (e, range) in p.offsets.windows(2).enumerate() {
            let slots = &p.row_slot[range[0] as usize..range[1] as usize];
            prop_assert!(slots.iter().all(|&slot| ids[slot as usize] as usize == e));
            prop_assert!(slots.windows(2).all(|pair| pair[0] < pair[1]));
        }
    }

    #[test]
    fn tiles_cover_every_row_once(counts in proptest::collection::vec(0u32..70, 0..12), tile_rows in 1u32..40) {
        let mut offsets = vec![0];
        for &count in &counts {
            offsets.push(offsets[offsets.len() - 1] + count);
        }
        let mut row = 0;
        let tiles = tile_schedule(&offsets, tile_rows);
        for tile in &tiles {
            prop_assert_eq!(tile.first_row, row);
            prop_assert!(1 <= tile.rows && tile.rows <= tile_rows);
            let e = tile.expert as usize;
            prop_assert!(offsets[e] <= row && row + tile.rows <= offsets[e + 1]);
            prop_assert!(tile.rows == tile_rows || row + tile.rows == offsets[e + 1]);
            row += tile.rows;
        }
        prop_assert_eq!(row, offsets[counts.len()]);
        prop_assert_eq!(tiles.len() as u32, counts.iter().map(|count| count.div_ceil(tile_rows)).sum::<u32>());
    }

    #[test]
    fn top_k_is_the_front_of_a_sort((experts, top_k, logits) in tokens()) {
        let weights = WeightRule { normalize: Normalize::Sum { eps: 0.0 }, scale: 2.5, ..WeightRule::default() };
        for score in [Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus] {
            let rule = RoutingRule { score, weights, ..RoutingRule::default() };
            let routes = route(&logits, &route_op(rule, experts, top_k, 5));
            for t in 0..5 {
                let keys = &logits[t * experts..(t + 1) * experts];
                let slots = t * top_k..(t + 1) * top_k;
                let all = sorted_choice(keys, None, experts);
                prop_assert_eq!(&routes.experts[slots.clone()], &all[..top_k]);
                prop_assert!((routes.weights[slots.clone()].iter().sum::<f64>() - 2.5).abs() < 1e-13);
                prop_assert!(routes.weights[slots].is_sorted_by(|a, b| a >= b));
                let witness = routes.witness[t];
                prop_assert_eq!(witness.last.expert, all[top_k - 1]);
                prop_assert_eq!(witness.next.expert, all.get(top_k).copied().unwrap_or(NO_EXPERT));
                prop_assert!(witness.last.key >= witness.next.key);
                // each token alone
                let alone = route(keys, &route_op(rule, experts, top_k, 1));
                prop_assert_eq!(&alone.experts, &routes.experts[t * top_k..(t + 1) * top_k]);
                prop_assert_eq!(&alone.weights, &routes.weights[t * top_k..(t + 1) * top_k]);
            }
        }
    }

    #[test]
    fn groups_limit_the_choice(
        (count, size, keep) in (1usize..6, 1usize..5).prop_flat_map(|(c, s)| (Just(c), Just(s), 1..=c)),
        logits in proptest::collection::vec((-6i32..6).prop_map(|l| f64::from(l) / 2.0), 20),
        best in any::<bool>(), zero in any::<bool>(), k in 0usize..100,
    ) {
        let experts = count * size;
        let top_k = 1 + k % experts;
        let score = if best { GroupScore::Best } else { GroupScore::SumOfBestTwo };
        let masked = if zero { Masked::Zero } else { Masked::NegInfinity };
        let groups = Some(Groups { count, keep, score, masked });
        let selection = Selection::TopK { by: SelectBy::Logit, bias: false, groups };
        let rule = RoutingRule { score: Score::Sigmoid, selection, ..RoutingRule::default() };
        let logits = &logits[..experts];
        let routes = route(logits, &route_op(rule, experts, top_k, 1));
        prop_assert_eq!(&routes.experts, &sorted_choice(logits, groups, top_k));
        if !zero && top_k <= keep * size {
            let mut used: Vec<usize> = routes.experts.iter().map(|&e| e as usize / size).collect();
            used.sort_unstable();
            used.dedup();
            prop_assert!(used.len() <= keep);
        }
    }

    #[test]
    fn routes_are_in_range_and_distinct_whatever_the_logits(
        logits in proptest::collection::vec(prop_oneof![
            4 => -5.0f64..5.0, 1 => Just(f64::NAN), 1 => Just(f64::INFINITY), 1 => Just(f64::NEG_INFINITY)
        ], 6),
        bias in proptest::collection::vec(prop_oneof![4 => -1.0f64..1.0, 1 => Just(f64::NAN)], 6),
        which in 0usize..4, top_k in 1usize..=6,
    ) {
        let groups = Some(Groups { count: 3, keep: 2, score: GroupScore::SumOfBestTwo, masked: Masked::NegInfinity });
        let selection = [
            Selection::default(),
            Selection::TopK { by: SelectBy::Score, bias: true, groups },
            Selection::TopK { by: SelectBy::Logit, bias: true, groups: None },
            Selection::SparseMixer { jitter: 0.1 },
        ][which];
        let top_k = if which == 3 { 2 } else { top_k };
        let op = Route { correction_bias: Some(&bias), ..route_op(RoutingRule { selection, ..Default::default() }, 6, top_k, 1) };
        let routes = route(&logits, &op);
        let mut ids = routes.experts.clone();
        ids.sort_unstable();
        ids.dedup();
        prop_assert_eq!(ids.len(), top_k);
        prop_assert!(ids.iter().all(|&id| id < 6));
        prop_assert_eq!(routes.status.is_ok(), logits.iter().any(|l| l.is_finite()));
        prop_assert_eq!(routes.status.is_ok(), routes.weights.iter().all(|w| w.is_finite()));
    }

    #[test]
    fn a_layer_treats_each_token_alone(seed in 0u64..1000, tokens in 1usize..6) {
        let config = normalized(7, 3);
        let owned = Owned::new(&config, seed);
        let x = numbers(seed + 100, tokens * 5);
        let together = forward(&config, &owned.layer(), &input(&x, tokens)).y;
        for t in 0..tokens {
            let alone = forward(&config, &owned.layer(), &input(&x[t * 5..(t + 1) * 5], 1)).y;
            prop_assert_eq!(&alone, &together[t * 5..(t + 1) * 5]);
        }
    }
}
