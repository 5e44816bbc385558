//! Cases of what few layers have: experts without weights, capacity, projections and norms around the experts, a router
//! of several layers, experts that are always chosen.

use super::cases::case;
use super::{Around, LayerCase, Origin, StateScale};
use crate::cases::{Case, FLOATS};
use crate::data::Spread;
use crate::stage::combine::ResidualPart;
use crate::stage::drop_overflow::Sequences;
use crate::stage::experts::Weights;
use fused_moe_core::config::*;
use fused_moe_core::{DType, Numerics};

const F32: [DType; 3] = [DType::F32; 3];
const BF16: [DType; 3] = [DType::BF16; 3];
const MIXED: [DType; 3] = [DType::F32, DType::F16, DType::F32];
/// The formats of the cases of which there are few.
const ALL: [[DType; 3]; 4] = [F32, [DType::F16; 3], BF16, MIXED];

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    let mut cases = zero_experts();
    cases.extend(always());
    cases.extend(capacity());
    cases.extend(latent());
    cases.extend(norms());
    cases.extend(router_mlp());
    cases.extend(blocks());
    cases
}

/// H, I, E, K.
fn plain() -> LayerConfig {
    LayerConfig::new(37, 23, 10, 3)
}

fn sum() -> RoutingRule {
    let weights = WeightRule { normalize: Normalize::Sum { eps: 1e-20 }, ..WeightRule::default() };
    RoutingRule { score: Score::Sigmoid, weights, ..RoutingRule::default() }
}

/// A rule that reads a correction bias and an expert scale.
fn biased() -> RoutingRule {
    let weights = WeightRule { expert_scale: Some(ExpertScale::AfterNormalize), ..sum().weights };
    let selection = Selection::TopK { by: SelectBy::Score, bias: true, groups: None };
    RoutingRule { selection, weights, ..sum() }
}

fn shared(gated: bool) -> Option<SharedConfig> {
    Some(SharedConfig { intermediate: 14, activation: Activation::default(), gated, scale: 0.75 })
}

fn norm(eps: f32, unit_offset: bool) -> Option<RmsNorm> {
    Some(RmsNorm { eps, unit_offset, scaled_first: false })
}

fn scaled_first(norm: RmsNorm) -> RmsNorm {
    RmsNorm { scaled_first: true, ..norm }
}

/// Each of them with an eps of its own.
fn all_norms(unit_offset: bool) -> Norms {
    Norms {
        experts_in: norm(0.02, unit_offset),
        expert_out: norm(0.05, unit_offset),
        routed_out: norm(0.1, unit_offset),
        shared_in: norm(0.03, unit_offset),
        shared_out: norm(0.2, unit_offset),
        out: norm(0.3, unit_offset),
    }
}

fn zero_experts() -> Vec<Case> {
    let mut cases = Vec::new();
    for output in [ZeroOutput::Copy, ZeroOutput::Zero] {
        let name = |what: &str| format!("zero experts {output:?} {what}").trim_end().to_string();
        let zero_experts = Some(ZeroExperts { count: 5, output });
        let config = LayerConfig { zero_experts, routing: sum(), routed_scale: 1.5, ..plain() };
        for dtypes in ALL {
            for tokens in [0, 1, 2, 37] {
                cases.push(case(&name(""), LayerCase::new(tokens, config.clone(), dtypes)));
            }
            let batches = LayerCase {
                numerics: Numerics::BatchInvariant,
                batches: Some(7),
                routes: false,
                ..LayerCase::new(24, LayerConfig { shared: shared(true), ..config.clone() }, dtypes)
            };
            cases.push(case(&name("alone and in batches of 7"), batches));
        }
        for dtypes in [F32, BF16] {
            let config = LayerConfig { routing: biased(), shared: shared(true), ..config.clone() };
            let everything = LayerCase {
                bias: true,
                router_bias: true,
                residual: ResidualPart::InPlace,
                norm: Some(true),
                ..LayerCase::new(8, config.clone(), dtypes)
            };
            cases.push(case(&name("everything"), everything.clone()));
            cases.push(case(&name("everything"), everything.clone()).strided());
            let numerics = Numerics::BatchInvariant;
            cases.push(case(&name("everything batch-invariant"), LayerCase { tokens: 1, numerics, ..everything }));
            let sources = [
                ("router", Origin::Router),
                ("logits", Origin::Logits),
                ("bad logits", Origin::BadLogits),
                ("routes", Origin::Routes(Spread::Even)),
                ("routes with holes", Origin::Routes(Spread::Holes)),
                ("bad routes", Origin::Routes(Spread::Bad)),
                ("routes to one without weights", Origin::Routes(Spread::One(12))),
            ];
            for (source_name, source) in sources {
                for (tokens, local) in
                    [(12, None), (12, Some(2..7)), (12, Some(6..10)), (1, None), (1, Some(10..10)), (1, Some(3..10))]
                {
                    let here = local.as_ref().map_or(String::new(), |local| format!(" local {local:?}"));
                    let layer = LayerCase { source, local, ..LayerCase::new(tokens, config.clone(), dtypes) };
                    cases.push(case(&name(&format!("{source_name}{here}")), layer));
                }
            }
        }
    }
    let config = LayerConfig {
        zero_experts: Some(ZeroExperts { count: 4, output: ZeroOutput::Zero }),
        weight_on: WeightOn::Input,
        ..plain()
    };
    cases.push(case("zero experts Zero weight on input", LayerCase::new(8, config, F32)));
    cases
}

fn always() -> Vec<Case> {
    let mut cases = Vec::new();
    for always in [1, 2] {
        let config = LayerConfig { routing: RoutingRule { always, ..biased() }, ..plain() };
        let name = |what: &str| format!("always {always} {what}").trim_end().to_string();
        for dtypes in ALL {
            for tokens in [0, 1, 37] {
                cases.push(case(&name(""), LayerCase::new(tokens, config.clone(), dtypes)));
            }
            let beside = LayerConfig { shared: shared(true), ..config.clone() };
            cases.push(case(&name("shared"), LayerCase::new(8, beside, dtypes)));
        }
        for weights in Weights::all(Activation::default()) {
            let layer = LayerCase { weights, bias: true, ..LayerCase::new(8, config.clone(), F32) };
            cases.push(case(&name(&format!("{weights:?}")), layer));
        }
        for (kind, source) in [("logits", Origin::Logits), ("bad logits", Origin::BadLogits)] {
            let layer = LayerCase { source, ..LayerCase::new(12, config.clone(), F32) };
            cases.push(case(&name(kind), layer.clone()));
            cases.push(case(&name(&format!("{kind} local")), LayerCase { local: Some(3..9), ..layer }));
        }
        let numerics = Numerics::BatchInvariant;
        let layer = LayerCase { numerics, ..LayerCase::new(12, config, F32) };
        cases.push(case(&name("alone and in batches of 5"), LayerCase { batches: Some(5), routes: false, ..layer }));
    }
    cases
}

fn capacity() -> Vec<Case> {
    let mut cases = Vec::new();
    let (position, score) = (CapacityOrder::Position, CapacityOrder::Score);
    let rules = [
        (CapacityLimit::Slots(2), position, None),
        (CapacityLimit::Slots(2), score, Some(0.0)),
        (CapacityLimit::Fraction(0.125), score, None),
        (CapacityLimit::Fraction(0.2), position, Some(0.5)),
        (CapacityLimit::EvenShare { factor: 1 }, score, Some(1e-9)),
        (CapacityLimit::EvenShare { factor: 2 }, position, None),
    ];
    for (limit, order, renormalize) in rules {
        let capacity = Some(Capacity { limit, order, renormalize });
        let kind = renormalize.map_or(String::new(), |min| format!(" renormalised {min}"));
        let name = |what: &str| format!("capacity {limit:?} {order:?}{kind} {what}").trim_end().to_string();
        let config = LayerConfig { capacity, routing: sum(), ..plain() };
        for dtypes in [F32, BF16] {
            for (tokens, sequences) in [
                (0, Sequences::Three),
                (1, Sequences::Absent),
                (12, Sequences::Empty),
                (37, Sequences::Absent),
                (37, Sequences::Three),
            ] {
                let around = Around { sequences, ..Around::default() };
                let layer = LayerCase { around, ..LayerCase::new(tokens, config.clone(), dtypes) };
                cases.push(case(&name(&format!("{sequences:?}")), layer));
            }
        }
        let around = Around { sequences: Sequences::Short, ..Around::default() };
        let with = |config: LayerConfig| LayerCase { around, ..LayerCase::new(12, config, MIXED) };
        for (kind, source) in [
            ("logits", Origin::Logits),
            ("bad logits", Origin::BadLogits),
            ("routes are left", Origin::Routes(Spread::Skewed)),
        ] {
            // where NaN weights are divided by their sum, the reference does not say what an overflowing one becomes
            if !(source == Origin::BadLogits && renormalize.is_some()) {
                cases.push(case(&name(kind), LayerCase { source, ..with(config.clone()) }));
            }
        }
        cases.push(case(&name("local"), LayerCase { local: Some(2..7), ..with(config.clone()) }));
        let always = RoutingRule { always: 1, ..biased() };
        cases.push(case(&name("always"), with(LayerConfig { routing: always, ..config.clone() })));
        for output in [ZeroOutput::Copy, ZeroOutput::Zero] {
            let config = LayerConfig {
                zero_experts: Some(ZeroExperts { count: 3, output }),
                shared: shared(true),
                ..config.clone()
            };
            cases.push(case(&name(&format!("zero experts {output:?}")), with(config)));
        }
        cases.push(case(&name("table"), with(LayerConfig { routing: table(), ..config })));
    }
    cases
}

fn table() -> RoutingRule {
    RoutingRule { selection: Selection::Table, ..sum() }
}

fn latent() -> Vec<Case> {
    let mut cases = Vec::new();
    for width in [1, 13, 20, 45] {
        let config = LayerConfig { latent: Some(width), routed_scale: 1.25, ..plain() };
        let name = |what: &str| format!("latent {width} {what}").trim_end().to_string();
        for dtypes in ALL {
            for tokens in [1, 9] {
                cases.push(case(&name(""), LayerCase::new(tokens, config.clone(), dtypes)));
            }
        }
        let config = LayerConfig { shared: shared(true), routing: biased(), ..config };
        let layer = LayerCase { bias: true, residual: ResidualPart::Of, ..LayerCase::new(9, config.clone(), BF16) };
        cases.push(case(&name("shared residual"), layer.clone()));
        cases.push(case(&name("shared residual"), LayerCase { tokens: 0, ..layer.clone() }));
        cases.push(case(&name("shared residual"), layer.clone()).strided());
        let in_place = LayerCase { residual: ResidualPart::InPlace, norm: Some(true), dtypes: MIXED, ..layer };
        cases.push(case(&name("in place norm"), in_place.clone()));
        cases.push(case(&name("nothing besides"), LayerCase { routes: false, tokens: 37, ..in_place }));
        let layer = LayerCase::new(12, config.clone(), F32);
        for (kind, source, local) in [
            ("local", Origin::Router, Some(2..7)),
            ("nothing local", Origin::Router, Some(3..3)),
            ("bad routes", Origin::Routes(Spread::Bad), None),
            ("routes nowhere", Origin::Routes(Spread::Nowhere), None),
        ] {
            cases.push(case(&name(kind), LayerCase { source, local, ..layer.clone() }));
        }
        let on_input = LayerConfig { weight_on: WeightOn::Input, ..config.clone() };
        cases.push(case(&name("weight on input"), LayerCase { config: on_input, ..layer.clone() }));
        let zero_experts = Some(ZeroExperts { count: 4, output: ZeroOutput::Copy });
        cases
            .push(case(&name("copies"), LayerCase { config: LayerConfig { zero_experts, ..config }, ..layer.clone() }));
        let numerics = Numerics::BatchInvariant;
        let batches = LayerCase { numerics, batches: Some(5), routes: false, ..layer };
        cases.push(case(&name("alone and in batches of 5"), batches));
    }
    cases
}

fn norms() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut push = |name: &str, norms: Norms, tokens: usize, dtypes: [DType; 3], norm_weights: bool| {
        let config = LayerConfig { norms, shared: shared(true), routing: sum(), routed_scale: 1.5, ..plain() };
        let around = Around { norm_weights, ..Around::default() };
        let weights = if norm_weights { " weights" } else { "" };
        cases.push(case(&format!("{name}{weights}"), LayerCase { around, ..LayerCase::new(tokens, config, dtypes) }));
    };
    for unit_offset in [false, true] {
        let all = all_norms(unit_offset);
        let none = Norms::default();
        let offset = if unit_offset { " unit offset" } else { "" };
        for (name, norms) in [
            ("norm experts_in", Norms { experts_in: all.experts_in, ..none }),
            ("norm expert_out", Norms { expert_out: all.expert_out, ..none }),
            ("norm expert_out scaled first", Norms { expert_out: all.expert_out.map(scaled_first), ..none }),
            ("norm routed_out", Norms { routed_out: all.routed_out, ..none }),
            ("norm shared_in", Norms { shared_in: all.shared_in, ..none }),
            ("norm shared_out", Norms { shared_out: all.shared_out, ..none }),
            ("norm out", Norms { out: all.out, ..none }),
        ] {
            for weights in [false, true] {
                push(&format!("{name}{offset}"), norms, 8, F32, weights);
            }
            push(&format!("{name}{offset}"), norms, 1, BF16, true);
            push(&format!("{name}{offset}"), norms, 8, MIXED, true);
        }
        for dtypes in ALL {
            for (tokens, weights) in [(0, true), (1, true), (2, false), (37, true)] {
                push(&format!("all norms{offset}"), all, tokens, dtypes, weights);
            }
        }
    }
    let norms = Norms { experts_in: norm(0.02, false), expert_out: norm(0.05, false), ..Norms::default() };
    let around = Around { norm_weights: true, ..Around::default() };
    let config = LayerConfig { norms, ..plain() };
    for (kind, source, local) in [
        ("local", Origin::Router, Some(2..7)),
        ("bad routes", Origin::Routes(Spread::Bad), None),
        ("routes nowhere", Origin::Routes(Spread::Nowhere), None),
    ] {
        let layer = LayerCase { around, source, local, ..LayerCase::new(12, config.clone(), F32) };
        cases.push(case(&format!("norms in and out {kind}"), layer));
    }
    let on_input = LayerConfig { weight_on: WeightOn::Input, ..config.clone() };
    let layer = LayerCase { around, ..LayerCase::new(12, on_input, F32) };
    cases.push(case("norms in and out weight on input", layer));
    let zero_experts = Some(ZeroExperts { count: 4, output: ZeroOutput::Copy });
    let copies = LayerConfig { zero_experts, ..config };
    cases.push(case("norms in and out copies", LayerCase { around, ..LayerCase::new(12, copies, F32) }));
    let config = LayerConfig { norms: all_norms(true), shared: shared(true), ..plain() };
    for dtypes in [F32, BF16] {
        let layer =
            LayerCase { around, numerics: Numerics::BatchInvariant, ..LayerCase::new(24, config.clone(), dtypes) };
        let batches = LayerCase { batches: Some(7), routes: false, ..layer };
        cases.push(case("all norms alone and in batches of 7", batches));
    }
    let nowhere = LayerCase { source: Origin::Routes(Spread::Nowhere), around, ..LayerCase::new(5, config, F32) };
    cases.push(case("all norms routes nowhere", nowhere));
    cases
}

fn router_mlp() -> Vec<Case> {
    let mut cases = Vec::new();
    let mlp = |width, function| Some(RouterMlp { width, eps: 0.25, function });
    let gelu = Function::GeluErf;
    let config = LayerConfig { router_mlp: mlp(19, gelu), routing: sum(), ..plain() };
    let states = [
        ("", false, false, StateScale::None),
        ("next", false, true, StateScale::None),
        ("scale without state", false, true, StateScale::Each),
        ("previous", true, true, StateScale::None),
        ("previous scaled", true, true, StateScale::Each),
        ("previous scaled by one", true, true, StateScale::One),
    ];
    for (kind, previous, next, state_scale) in states {
        for router_vectors in [false, true] {
            let around = Around { router_vectors, state_scale, previous, next, ..Around::default() };
            let vectors = if router_vectors { " vectors" } else { "" };
            let name = format!("router mlp {kind}{vectors}");
            for (tokens, dtypes) in [(1, BF16), (9, F32), (12, [DType::F16; 3]), (9, MIXED)] {
                let layer = LayerCase { around, ..LayerCase::new(tokens, config.clone(), dtypes) };
                cases.push(case(&name, layer));
            }
        }
    }
    let (previous, next, state_scale) = (true, true, StateScale::Each);
    let around = Around { router_vectors: true, previous, next, state_scale, ..Around::default() };
    let with = |config: LayerConfig| LayerCase { around, ..LayerCase::new(9, config, F32) };
    for dtypes in ALL {
        for tokens in [0, 37] {
            let layer = LayerCase { tokens, dtypes, router_bias: true, ..with(config.clone()) };
            cases.push(case("router mlp bias", layer));
        }
        cases.push(case("router mlp", LayerCase { dtypes, ..with(config.clone()) }).strided());
    }
    for (name, function, width) in
        [("silu", Function::Silu, 37), ("gelu tanh", Function::GeluTanh, 64), ("identity", Function::Identity, 1)]
    {
        let config = LayerConfig { router_mlp: mlp(width, function), routing: biased(), ..plain() };
        cases.push(case(&format!("router mlp {name} {width}"), with(config)));
    }
    let gate = GateConfig { norm: Some(GateNorm { eps: 0.02, feeds_experts: false }), scale: 0.8, softcap: Some(4.0) };
    let layer = LayerCase { norm_weight: true, ..with(LayerConfig { gate, ..config.clone() }) };
    cases.push(case("router mlp gate norm", layer));
    let idle = Around { router_vectors: true, ..Around::default() };
    for (kind, source) in [("logits", Origin::Logits), ("routes", Origin::Routes(Spread::Even))] {
        let layer = LayerCase { source, around: idle, ..with(config.clone()) };
        cases.push(case(&format!("router mlp idle {kind}"), layer));
    }
    cases.push(case("router mlp local", LayerCase { local: Some(2..7), ..with(config.clone()) }));
    let batches = LayerCase {
        numerics: Numerics::BatchInvariant,
        batches: Some(7),
        routes: false,
        around: idle,
        tokens: 24,
        ..with(config)
    };
    cases.push(case("router mlp alone and in batches of 7", batches));
    cases
}

/// Several of them together, as blocks of models have them.
fn blocks() -> Vec<Case> {
    let mut cases = Vec::new();
    let gelu = Activation::Gated(Function::GeluTanh);
    let beside = SharedConfig { intermediate: 29, activation: gelu, gated: false, scale: 1.0 };
    let parallel = LayerConfig {
        gate: GateConfig { norm: Some(GateNorm { eps: 1e-6, feeds_experts: false }), scale: 0.7, softcap: None },
        routing: RoutingRule {
            weights: WeightRule { expert_scale: Some(ExpertScale::AfterNormalize), ..sum().weights },
            ..RoutingRule::default()
        },
        activation: gelu,
        shared: Some(beside),
        norms: all_norms(false),
        ..LayerConfig::new(40, 24, 12, 4)
    };
    let capped = Activation::SoftcappedSilu { gate_cap: 1.5, up_cap: 0.75 };
    let between = LayerConfig {
        activation: capped,
        shared: Some(SharedConfig { activation: capped, ..beside }),
        latent: Some(17),
        norms: Norms {
            experts_in: norm(0.02, true),
            expert_out: norm(0.05, true).map(scaled_first),
            ..Norms::default()
        },
        routing: biased(),
        ..LayerConfig::new(41, 20, 12, 3)
    };
    let everything = LayerConfig {
        zero_experts: Some(ZeroExperts { count: 4, output: ZeroOutput::Copy }),
        capacity: Some(Capacity {
            limit: CapacityLimit::EvenShare { factor: 1 },
            order: CapacityOrder::Position,
            renormalize: Some(0.0),
        }),
        norms: all_norms(true),
        router_mlp: Some(RouterMlp { width: 11, eps: 0.02, function: Function::GeluErf }),
        routed_scale: -1.5,
        ..between.clone()
    };
    let around = Around { norm_weights: true, ..Around::default() };
    let state = Around {
        router_vectors: true,
        state_scale: StateScale::Each,
        previous: true,
        next: true,
        sequences: Sequences::Three,
        ..around
    };
    let blocks = [
        ("block of norms", parallel, ResidualPart::Of, around),
        ("block between projections", between, ResidualPart::InPlace, around),
        ("block of everything", everything, ResidualPart::Of, state),
    ];
    for (name, config, residual, around) in blocks {
        for dtypes in FLOATS.map(|dtype| [dtype; 3]).into_iter().chain([MIXED, [DType::BF16, DType::BF16, DType::F32]])
        {
            for tokens in [0, 1, 2, 13] {
                let (norm_weight, bias) = (config.gate.norm.is_some(), true);
                let case_of = LayerCase::new(tokens, config.clone(), dtypes);
                let layer = LayerCase { norm: Some(true), residual, norm_weight, bias, around, ..case_of };
                if tokens == 13 {
                    cases.push(case(name, layer.clone()).strided());
                }
                cases.push(case(name, layer));
            }
        }
    }
    cases
}

#[cfg(test)]
mod tests;
