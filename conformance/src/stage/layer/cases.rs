use super::{LayerCase, Origin};
use crate::cases::{Case, FLOATS, Operation, Scale, Stage, dtype_name};
use crate::data::Spread;
use crate::stage::combine::ResidualPart;
use crate::stage::experts::Weights;
use crate::stage::gate_up::ACTIVATIONS;
use crate::stage::route::rules;
use fused_moe_core::config::*;
use fused_moe_core::{DType, Numerics};

pub(super) fn case(name: &str, layer: LayerCase) -> Case {
    let LayerConfig { hidden, intermediate, experts, top_k, .. } = layer.config;
    let sizes = format!("T={} H={hidden} I={intermediate} E={experts} K={top_k}", layer.tokens);
    let name = format!("{name} {sizes}").trim_start().to_string();
    let (dtype, placement) = (dtype_name(layer.dtypes), Default::default());
    Case { stage: Stage::Layer, name, dtype, placement, operation: Operation::Layer(Box::new(layer)) }
}

/// The cases of whole layers.
pub(crate) fn cases(scale: Scale) -> Vec<Case> {
    let mut cases = Vec::new();
    let (f32, f16, bf16) = (DType::F32, DType::F16, DType::BF16);
    let mut sizes = vec![
        [0, 16, 8, 4, 2],
        [1, 1, 1, 1, 1],
        [1, 64, 32, 8, 2],
        [1, 48, 24, 8, 8],
        [2, 32, 16, 8, 2],
        [5, 17, 13, 12, 3],
        [33, 31, 37, 24, 2],
        [6, 33, 19, 60, 4],
        [9, 29, 11, 128, 8],
        [3, 21, 9, 160, 6],
        [4, 16, 7, 256, 8],
        [2, 9, 5, 512, 10],
        [1, 5, 3, 4096, 3],
        [70, 64, 48, 4, 1],
    ];
    if scale == Scale::Full {
        sizes.extend([[200, 256, 192, 16, 4], [3, 1024, 256, 24, 8], [1, 1024, 384, 8, 2], [513, 131, 97, 3, 1]]);
    }
    for dtypes in FLOATS.map(|dtype| [dtype; 3]).into_iter().chain([[bf16, bf16, f32], [f32, bf16, f32]]) {
        for &[t, h, i, e, k] in &sizes {
            let plain = LayerCase::new(t, LayerConfig::new(h, i, e, k), dtypes);
            cases.push(case("", plain.clone()));
            if t == 5 || t == 1 {
                let numerics = Numerics::BatchInvariant;
                cases.push(case("batch-invariant", LayerCase { numerics, ..plain.clone() }));
            }
            if t == 70 {
                cases.push(case("local", LayerCase { local: Some(1..3), ..plain.clone() }));
            }
            if t == 5 {
                cases.push(case("", plain.clone()).strided());
                cases.push(case("nothing besides", LayerCase { routes: false, ..plain }));
            }
        }
    }
    // so many rows of an expert that tiles may share weights and be dealt out as they are done; in the last, many tiles each
    let mut many = vec![[1700, 72, 152, 2, 1]];
    if scale == Scale::Full {
        many.extend([[3300, 136, 264, 4, 1], [1700, 64, 21760, 2, 1]]);
    }
    for dtypes in [f16, bf16].map(|dtype| [dtype; 3]) {
        for &[t, h, i, e, k] in &many {
            let layer = LayerCase::new(t, LayerConfig::new(h, i, e, k), dtypes);
            cases.push(case("many rows", layer.clone()));
            cases.push(case("many rows local", LayerCase { local: Some(0..e - 1), ..layer }));
        }
    }
    for dtypes in FLOATS.map(|dtype| [dtype; 3]) {
        for (tokens, batches) in [(9, 2), (24, 7), (33, 32), (70, 70), (140, 129)] {
            let shared = SharedConfig { intermediate: 20, activation: Activation::default(), gated: true, scale: 1.0 };
            let config = LayerConfig { shared: Some(shared), ..LayerConfig::new(72, 40, 6, 2) };
            let layer = LayerCase::new(tokens, config, dtypes);
            let numerics = Numerics::BatchInvariant;
            let layer = LayerCase { numerics, batches: Some(batches), routes: false, ..layer };
            cases.push(case(&format!("alone and in batches of {batches}"), layer));
        }
        // routers of many experts
        for config in [LayerConfig::new(136, 24, 128, 8), LayerConfig::new(72, 24, 160, 6)] {
            for tokens in [1, 9, 32] {
                let numerics = Numerics::BatchInvariant;
                let layer = LayerCase { numerics, ..LayerCase::new(tokens, config.clone(), dtypes) };
                cases.push(case("batch-invariant", layer.clone()));
                if tokens > 1 {
                    let layer = LayerCase { batches: Some(tokens), routes: false, ..layer };
                    cases.push(case(&format!("alone and in batches of {tokens}"), layer));
                }
            }
        }
    }
    for dtypes in FLOATS.map(|dtype| [dtype; 3]).into_iter().chain([[f32, f16, f32]]) {
        cases.extend(sources(dtypes));
        cases.extend(parts(dtypes));
        cases.extend(one_token(dtypes));
        cases.extend(few_tokens(dtypes));
    }
    for (name, rule) in rules() {
        let config = LayerConfig { routing: rule, ..LayerConfig::new(24, 20, 16, 3) };
        cases.push(case(name, LayerCase::new(7, config.clone(), [f32; 3])));
        cases.push(case(name, LayerCase::new(7, config, [bf16; 3])));
    }
    cases.extend(super::parts::cases());
    cases
}

/// From x, logits, routes; with experts that are elsewhere.
fn sources(dtypes: [DType; 3]) -> Vec<Case> {
    let mut cases = Vec::new();
    let sources = [
        ("router", Origin::Router),
        ("logits", Origin::Logits),
        ("bad logits", Origin::BadLogits),
        ("routes", Origin::Routes(Spread::Even)),
        ("skewed routes", Origin::Routes(Spread::Skewed)),
        ("routes to the same", Origin::Routes(Spread::Same(5))),
        ("routes to one", Origin::Routes(Spread::One(1))),
        ("routes with holes", Origin::Routes(Spread::Holes)),
        ("bad routes", Origin::Routes(Spread::Bad)),
        ("routes nowhere", Origin::Routes(Spread::Nowhere)),
    ];
    for (name, source) in sources {
        for tokens in [1, 12] {
            for (kind, local) in [("", None), (" local", Some(2..7)), (" nothing local", Some(3..3))] {
                let shared =
                    SharedConfig { intermediate: 10, activation: Activation::default(), gated: true, scale: 1.0 };
                let config = LayerConfig { shared: Some(shared), ..LayerConfig::new(40, 22, 9, 3) };
                let layer = LayerCase { source, local: local.clone(), ..LayerCase::new(tokens, config, dtypes) };
                cases.push(case(&format!("{name}{kind}"), layer.clone()));
                if tokens == 12 && local.is_none() {
                    cases.push(case(name, layer).strided());
                }
            }
        }
    }
    cases
}

/// One token with nothing asked for but its output: what a backend may do in fewer launches.
fn one_token(dtypes: [DType; 3]) -> Vec<Case> {
    let with = |config| LayerCase { routes: false, source: Origin::Logits, ..LayerCase::new(1, config, dtypes) };
    let sizes = [
        [1, 1, 1, 1],
        [64, 48, 8, 2],
        [63, 47, 9, 9],
        [37, 23, 10, 3],
        [136, 264, 6, 4],
        [264, 520, 9, 7],
        [40, 2056, 3, 2],
        [40, 264, 130, 8],
        [24, 8, 600, 33],
    ];
    let mut cases: Vec<_> =
        sizes.iter().map(|&[h, i, e, k]| case("alone", with(LayerConfig::new(h, i, e, k)))).collect();
    let shared = |gated| SharedConfig { intermediate: 40, activation: Activation::default(), gated, scale: 0.5 };
    let config = LayerConfig { routed_scale: 1.75, ..LayerConfig::new(72, 264, 12, 5) };
    for (name, residual) in
        [("", ResidualPart::None), (" residual", ResidualPart::Of), (" in place", ResidualPart::InPlace)]
    {
        for (kind, shared) in [("", None), (" shared", Some(shared(false))), (" shared gated", Some(shared(true)))] {
            for weight_on in [WeightOn::Output, WeightOn::Input] {
                let name = format!("alone{name}{kind} {weight_on:?}");
                let config = LayerConfig { shared, weight_on, ..config.clone() };
                let layer = LayerCase { residual, bias: true, ..with(config) };
                cases.push(case(&name, layer.clone()));
                cases.push(case(&name, layer).strided());
            }
        }
    }
    cases.push(case("alone norm", LayerCase { norm: Some(true), ..with(config.clone()) }));
    cases.push(case("alone bad logits", LayerCase { source: Origin::BadLogits, ..with(config.clone()) }));
    cases.push(case("alone router", LayerCase { source: Origin::Router, ..with(config) }));
    cases
}

/// Some tokens, up to and beyond what a word of bits holds, whose slots crowd together or hardly meet.
fn few_tokens(dtypes: [DType; 3]) -> Vec<Case> {
    let mut cases = Vec::new();
    for tokens in [2, 31, 32, 33] {
        for [experts, top_k] in [[3, 3], [130, 9], [513, 2], [40, 33]] {
            for source in [Origin::Router, Origin::Logits, Origin::BadLogits] {
                let config = LayerConfig::new(40, 24, experts, top_k);
                let layer = LayerCase { source, routes: tokens != 31, ..LayerCase::new(tokens, config, dtypes) };
                cases.push(case(&format!("few {source:?}"), layer));
            }
        }
    }
    // nothing asked for but their output, which a backend may make in fewer launches
    let with =
        |tokens, config| LayerCase { routes: false, source: Origin::Logits, ..LayerCase::new(tokens, config, dtypes) };
    let sizes = [
        [2, 8, 32, 1, 1],
        [8, 64, 64, 8, 2],
        [7, 63, 47, 9, 4],
        [8, 136, 288, 6, 1],
        [5, 264, 544, 9, 9],
        [8, 2712, 32, 5, 3],
        [8, 4104, 32, 3, 2],
        [8, 4072, 32, 3, 2],
        [3, 8, 1568, 4, 2],
        [4, 40, 256, 130, 32],
        [8, 24, 32, 512, 16],
        [8, 24, 32, 600, 5],
        [9, 40, 32, 9, 3],
        [6, 40, 24, 9, 3],
    ];
    for [tokens, h, i, e, k] in sizes {
        cases.push(case("few alone", with(tokens, LayerConfig::new(h, i, e, k))));
    }
    let shared = SharedConfig { intermediate: 40, activation: Activation::default(), gated: true, scale: 0.5 };
    let config = LayerConfig { routed_scale: 1.75, ..LayerConfig::new(72, 288, 12, 5) };
    for residual in [ResidualPart::None, ResidualPart::Of, ResidualPart::InPlace] {
        for (kind, shared) in [("", None), (" shared", Some(shared))] {
            for weight_on in [WeightOn::Output, WeightOn::Input] {
                let config = LayerConfig { shared, weight_on, ..config.clone() };
                let layer = LayerCase { residual, bias: true, ..with(6, config) };
                let name = format!("few alone {residual:?}{kind} {weight_on:?}");
                cases.push(case(&name, layer.clone()));
                cases.push(case(&name, layer).strided());
            }
        }
    }
    let plain = LayerConfig { activation: Activation::Plain(Function::Relu), ..config.clone() };
    cases.push(case("few alone plain", LayerCase { bias: true, ..with(6, plain) }));
    for (name, rule) in rules() {
        let config = LayerConfig { routing: rule, ..LayerConfig::new(24, 32, 16, 3) };
        cases.push(case(&format!("few alone {name}"), with(5, config)));
    }
    for source in [Origin::Router, Origin::BadLogits] {
        cases.push(case(&format!("few alone {source:?}"), LayerCase { source, ..with(8, config.clone()) }));
    }
    let two = LayerConfig { top_k: 2, ..config };
    cases.push(case("few alone Router K=2", LayerCase { source: Origin::Router, ..with(7, two) }));
    // more than a block's
    for (tokens, [experts, top_k]) in [(300, [130, 9]), (512, [3, 3]), (513, [40, 2])] {
        let config = LayerConfig::new(40, 24, experts, top_k);
        let layer = LayerCase { source: Origin::Logits, routes: true, ..LayerCase::new(tokens, config, dtypes) };
        cases.push(case("some Logits", layer));
    }
    cases
}

/// What there is besides router and experts.
fn parts(dtypes: [DType; 3]) -> Vec<Case> {
    let mut cases = Vec::new();
    let config = LayerConfig::new(37, 23, 10, 3);
    let shared = |gated, scale, activation| SharedConfig { intermediate: 14, activation, gated, scale };
    let norm =
        |feeds_experts| GateConfig { norm: Some(GateNorm { eps: 0.02, feeds_experts }), ..GateConfig::default() };
    let sum = WeightRule { normalize: Normalize::Sum { eps: 0.0 }, ..WeightRule::default() };
    let with = |config: LayerConfig| LayerCase::new(8, config, dtypes);
    let silu = Activation::default();
    let plain = with(config.clone());
    for (name, residual) in [("residual", ResidualPart::Of), ("in place", ResidualPart::InPlace)] {
        for (kind, norm) in [("", None), (" norm", Some(true)), (" norm without weight", Some(false))] {
            cases.push(case(&format!("{name}{kind}"), LayerCase { residual, norm, ..plain.clone() }));
        }
    }
    cases.push(case("norm", LayerCase { norm: Some(true), ..plain.clone() }));
    cases.push(case("biases", LayerCase { bias: true, router_bias: true, ..plain.clone() }));
    for (name, shared) in [
        ("shared", shared(false, 1.0, silu)),
        ("shared gated", shared(true, 1.0, silu)),
        ("shared scaled", shared(true, 0.5, Activation::Gated(Function::GeluTanh))),
        ("shared without gate", shared(false, 2.0, Activation::Plain(Function::ReluSquared))),
    ] {
        let config = LayerConfig { shared: Some(shared), ..config.clone() };
        cases.push(case(name, with(config.clone())));
        cases.push(case(name, LayerCase { tokens: 1, ..with(config) }));
    }
    for (name, feeds) in [("gate norm", false), ("gate norm feeds experts", true)] {
        for norm_weight in [false, true] {
            let shared = Some(shared(true, 1.0, silu));
            let config = LayerConfig { gate: norm(feeds), shared, ..config.clone() };
            let name = format!("{name}{}", if norm_weight { " weight" } else { "" });
            cases.push(case(&name, LayerCase { norm_weight, ..with(config.clone()) }));
            let routes = Origin::Routes(Spread::Even);
            cases.push(case(&format!("{name} routes"), LayerCase { norm_weight, source: routes, ..with(config) }));
        }
    }
    for (kind, activation) in ACTIVATIONS {
        let routing = RoutingRule { weights: sum, ..RoutingRule::default() };
        let config = LayerConfig { activation, routing, ..config.clone() };
        cases.push(case(kind, LayerCase { bias: true, ..with(config.clone()) }));
        cases.push(case(kind, LayerCase { tokens: 1, bias: true, ..with(config.clone()) }));
        let config = LayerConfig { weight_on: WeightOn::Input, routed_scale: 1.75, ..config };
        cases.push(case(&format!("{kind} weight on input"), LayerCase { bias: true, ..with(config) }));
    }
    for activation in [silu, Activation::Plain(Function::Relu)] {
        for weights in Weights::all(activation) {
            for bias in [false, true] {
                let gated = if activation.is_gated() { "gated" } else { "plain" };
                let name = format!("{gated} {:?}{}", weights, if bias { " bias" } else { "" });
                let config = LayerConfig { activation, ..config.clone() };
                cases.push(case(&name, LayerCase { weights, bias, ..with(config) }));
            }
        }
    }
    let everything = LayerCase {
        bias: true,
        router_bias: true,
        norm_weight: true,
        residual: ResidualPart::Of,
        norm: Some(true),
        ..with(LayerConfig {
            gate: GateConfig { scale: 0.8, softcap: Some(4.0), ..norm(true) },
            routing: rules()[7].1,
            shared: Some(shared(true, 0.5, silu)),
            routed_scale: 1.5,
            ..LayerConfig::new(37, 23, 12, 3)
        })
    };
    cases.push(case("everything", LayerCase { tokens: 0, ..everything.clone() }));
    cases.push(case("everything", LayerCase { tokens: 1, ..everything.clone() }));
    cases.push(case("everything local", LayerCase { local: Some(1..8), ..everything.clone() }));
    cases.push(case("everything", everything.clone()));
    cases.push(case("everything", everything).strided());
    cases
}
