//! What no stage of a layer sees: parts that do not fit together.

use super::*;
use fused_moe_core::config::{GateConfig, GateNorm, LayerConfig, Selection, SharedConfig};
use fused_moe_core::training::TrainingLayer;
use fused_moe_core::{NO_EXPERT, Routing};

fn ids_out<'a>(shape: impl Into<Shape>) -> HostViewMut<'a> {
    View::new(bytemuck::cast_slice_mut(vec![NO_EXPERT; 512].leak()), DType::U32, 0, shape).unwrap()
}

fn gated(gated: bool) -> SharedConfig {
    SharedConfig { intermediate: I, activation: Activation::default(), gated, scale: 1.0 }
}

/// A router and experts, nothing else.
fn plain() -> LayerConfig {
    LayerConfig::new(H, I, E, K)
}

/// With every part that has a gradient.
fn whole() -> LayerConfig {
    let weights = WeightRule { expert_scale: Some(ExpertScale::AfterNormalize), ..WeightRule::default() };
    LayerConfig {
        routing: RoutingRule { weights, ..RoutingRule::default() },
        gate: GateConfig { norm: Some(GateNorm { eps: 1e-6, feeds_experts: false }), ..GateConfig::default() },
        shared: Some(gated(true)),
        ..plain()
    }
}

/// The parameters that a layer must have.
fn parameters(config: &LayerConfig) -> LayerParameters<'static, Cpu> {
    let shared = config.shared.map(|shared| SharedParameters {
        gate_up: floats([N, H]),
        gate_up_bias: None,
        down: floats([H, I]),
        down_bias: None,
        gate: shared.gated.then(|| floats([H])),
    });
    let expert_scale = config.routing.weights.expert_scale.map(|_| floats([E]));
    let table = (config.routing.selection == Selection::Table).then(|| ids([7, K]));
    let matrices = LayerParameters::new(floats([E, H]), floats([E, N, H]), floats([E, H, I]));
    LayerParameters { shared, expert_scale, table, ..matrices }
}

fn given(shapes: [[usize; 2]; 2]) -> Routing<'static, Cpu> {
    Routing { experts: ids(shapes[0]), weights: floats(shapes[1]) }
}

type ForwardCall = ForwardSaving<'static, 'static, Cpu>;
type BackwardCall = LayerBackward<'static, 'static, Cpu>;
type ForwardChange = fn(&mut ForwardCall);
type BackwardChange = fn(&mut BackwardCall);
type Parameters = &'static LayerParameters<'static, Cpu>;

/// Left behind.
fn keep(parameters: LayerParameters<'static, Cpu>) -> Parameters {
    Box::leak(Box::new(parameters))
}

fn forward(config: &LayerConfig, parameters: Parameters, change: impl FnOnce(&mut ForwardCall)) -> Result<(), String> {
    let cpu = Cpu::with_threads(1).unwrap();
    let layer = TrainingLayer::new(config).unwrap();
    let by_id = config.routing.selection == Selection::Table;
    let mut call = ForwardSaving {
        x: floats([T, H]),
        parameters,
        source: Source::Router,
        token_ids: by_id.then(|| ids([T])),
        residual: None,
        norm: None,
        pre_activation: out([R, N]),
        shared_pre_activation: config.shared.map(|_| out([T, N])),
        routes: Some(RoutesOut { experts: ids_out([T, K]), weights: out([T, K]) }),
        y: out([T, H]),
    };
    change(&mut call);
    let mut workspace = layer.workspace(&cpu, T).unwrap();
    layer.forward(&cpu, &cpu.stream().unwrap(), call, &mut workspace).map_err(|error| error.to_string())
}

fn backward(
    config: &LayerConfig,
    parameters: Parameters,
    change: impl FnOnce(&mut BackwardCall),
) -> Result<(), String> {
    let cpu = Cpu::with_threads(1).unwrap();
    let layer = TrainingLayer::new(config).unwrap();
    let mut call = LayerBackward {
        d_y: floats([T, H]),
        d_logits: None,
        x: floats([T, H]),
        parameters,
        source: RoutesFrom::Router,
        routing: given([[T, K]; 2]),
        pre_activation: floats([R, N]),
        shared_pre_activation: config.shared.map(|_| floats([T, N])),
        gradients: LayerGradients { x: gradient([T, H]), ..LayerGradients::default() },
    };
    change(&mut call);
    let mut workspace = layer.workspace(&cpu, T).unwrap();
    layer.backward(&cpu, &cpu.stream().unwrap(), call, &mut workspace).map_err(|error| error.to_string())
}

#[track_caller]
fn says(found: Result<(), String>, beginning: &str) {
    let message = found.expect_err(beginning);
    let rest = message.strip_prefix(beginning);
    assert!(rest.is_some_and(|rest| rest.starts_with([' ', ',', ':'])), "{beginning}: {message}");
}

#[test]
fn what_fits_is_taken() {
    for config in [plain(), whole(), LayerConfig { shared: Some(gated(false)), ..plain() }] {
        let parameters = keep(parameters(&config));
        assert_eq!(forward(&config, parameters, |_| {}), Ok(()));
        assert_eq!(backward(&config, parameters, |_| {}), Ok(()));
        let routes: ForwardChange = |call| (call.source, call.routes) = (Source::Routes(given([[T, K]; 2])), None);
        assert_eq!(forward(&config, parameters, routes), Ok(()));
        assert_eq!(backward(&config, parameters, |call| call.source = RoutesFrom::Routes), Ok(()));
    }
}

#[test]
fn shapes() {
    let (config, right) = (plain(), keep(parameters(&plain())));
    // more tokens than the workspace has room for
    let many: BackwardChange = |call| (call.x, call.routing) = (floats([T + 1, H]), given([[T + 1, K]; 2]));
    says(backward(&config, right, many), "backward: x");
    says(backward(&config, right, |call| call.x = floats([T, I])), "backward: x");
    let wrong = keep(LayerParameters { gate_up: floats([E, N, H - 1]), ..parameters(&config) });
    says(backward(&config, wrong, |_| {}), "backward: parameters.gate_up");
    says(forward(&config, wrong, |_| {}), "forward: parameters.gate_up");
    let wrong = keep(LayerParameters { down: floats([E, I, H]), ..parameters(&config) });
    says(backward(&config, wrong, |_| {}), "backward: parameters.down");
    // logits of more experts than there are
    says(forward(&config, right, |call| call.source = Source::Logits(floats([T, E + 1]))), "forward: source.logits");
    let wrong: BackwardChange = |call| call.source = RoutesFrom::Logits(floats([T, E + 1]));
    says(backward(&config, right, wrong), "backward: source.logits");
    // what the stages say of what they are handed
    says(backward(&config, right, |call| call.d_y = floats([T, H + 1])), "down_backward: d_out");
    says(backward(&config, right, |call| call.pre_activation = floats([R, I])), "activation_backward: gate_up");
    let by_id = RoutingRule { selection: Selection::Table, ..RoutingRule::default() };
    let config = LayerConfig { routing: by_id, ..plain() };
    let wrong = keep(LayerParameters { table: Some(ids([7, K + 1])), ..parameters(&config) });
    says(forward(&config, wrong, |_| {}), "route: table.experts");
}

#[test]
fn routes_have_a_slot_for_each_choice() {
    let (config, right) = (plain(), keep(parameters(&plain())));
    for (operand, change) in [
        (
            "source.experts",
            (|call| (call.source, call.routes) = (Source::Routes(given([[T, 1], [T, K]])), None)) as ForwardChange,
        ),
        ("source.weights", |call| (call.source, call.routes) = (Source::Routes(given([[T, K], [T, 1]])), None)),
        ("source.experts", |call| {
            let routing = Routing { experts: floats([T, K]), weights: floats([T, K]) };
            (call.source, call.routes) = (Source::Routes(routing), None);
        }),
        ("routes.experts", |call| {
            call.routes = Some(RoutesOut { experts: ids_out([T, 1]), weights: out([T, 1]) });
        }),
    ] {
        says(forward(&config, right, change), &format!("forward: {operand}"));
    }
    for (operand, change) in [
        ("routing.experts", (|call| call.routing.experts = ids([T, 1])) as BackwardChange),
        ("routing.experts", |call| call.routing.experts = floats([T, K])),
        ("routing.weights", |call| call.routing.weights = floats([T, 1])),
        ("routing.weights", |call| (call.source, call.routing.weights) = (RoutesFrom::Routes, floats([T, 1]))),
        ("routing.weights", |call| call.routing.weights = of(DType::F16, [T, K])),
    ] {
        says(backward(&config, right, change), &format!("backward: {operand}"));
    }
}

#[test]
fn parameters_follow_the_description() {
    let plain = plain();
    let (right, some) = (|| parameters(&plain), || Some(floats([E])));
    for (operand, wrong) in [
        ("parameters.router is missing", LayerParameters { router: None, ..right() }),
        ("parameters.router_norm is given", LayerParameters { router_norm: Some(floats([H])), ..right() }),
        ("parameters.correction_bias is given", LayerParameters { correction_bias: some(), ..right() }),
        ("parameters.expert_scale is given", LayerParameters { expert_scale: some(), ..right() }),
        ("parameters.table is given", LayerParameters { table: Some(ids([7, K])), ..right() }),
        ("parameters.shared is given", LayerParameters { shared: parameters(&whole()).shared, ..right() }),
    ] {
        let wrong = keep(wrong);
        says(forward(&plain, wrong, |_| {}), &format!("forward: {operand}"));
        says(backward(&plain, wrong, |_| {}), &format!("backward: {operand}"));
    }
    let wrong = keep(LayerParameters { router: None, router_bias: some(), ..right() });
    let logits: ForwardChange = |call| call.source = Source::Logits(floats([T, E]));
    says(forward(&plain, wrong, logits), "forward: parameters.router_bias is given");
    says(backward(&plain, wrong, |call| call.source = RoutesFrom::Routes), "backward: parameters.router_bias is given");
}

#[test]
fn a_shared_expert_is_there_or_not() {
    let (without, with) = (plain(), LayerConfig { shared: Some(gated(false)), ..plain() });
    let right = keep(parameters(&with));
    let none = keep(LayerParameters { shared: None, ..parameters(&with) });
    says(forward(&with, none, |_| {}), "forward: parameters.shared is missing");
    says(backward(&with, none, |_| {}), "backward: parameters.shared is missing");
    says(forward(&with, right, |call| call.shared_pre_activation = None), "forward: shared_pre_activation is missing");
    says(
        backward(&with, right, |call| call.shared_pre_activation = None),
        "backward: shared_pre_activation is missing",
    );
    let right = keep(parameters(&without));
    let more: BackwardChange = |call| call.shared_pre_activation = Some(floats([T, N]));
    says(backward(&without, right, more), "backward: shared_pre_activation is given");
    let more: ForwardChange = |call| call.shared_pre_activation = Some(out([T, N]));
    says(forward(&without, right, more), "forward: shared_pre_activation is given");
    // its gate
    for (has, should, what) in [(false, true, "is missing"), (true, false, "is given")] {
        let [has, should] = [has, should].map(|gate| LayerConfig { shared: Some(gated(gate)), ..plain() });
        let wrong = keep(parameters(&has));
        says(forward(&should, wrong, |_| {}), &format!("forward: parameters.shared.gate {what}"));
        says(backward(&should, wrong, |_| {}), &format!("backward: parameters.shared.gate {what}"));
    }
}

#[test]
fn token_ids_and_routes_follow_the_source() {
    let by_id = RoutingRule { selection: Selection::Table, ..RoutingRule::default() };
    let config = LayerConfig { routing: by_id, ..plain() };
    let right = keep(parameters(&config));
    assert_eq!(forward(&config, right, |_| {}), Ok(()));
    says(forward(&config, right, |call| call.token_ids = None), "forward: token_ids is missing");
    let none = keep(LayerParameters { table: None, ..parameters(&config) });
    says(forward(&config, none, |_| {}), "forward: parameters.table is missing");
    says(forward(&config, right, |call| call.token_ids = Some(floats([T]))), "forward: token_ids expected");
    says(forward(&config, right, |call| call.token_ids = Some(ids([T + 1]))), "forward: token_ids expected");
    let more: ForwardChange = |call| (call.source, call.routes) = (Source::Routes(given([[T, K]; 2])), None);
    says(forward(&config, right, more), "forward: token_ids is given");
    // routes of the caller's need no table
    assert_eq!(backward(&config, none, |call| call.source = RoutesFrom::Routes), Ok(()));
    let (config, right) = (plain(), keep(parameters(&plain())));
    says(forward(&config, right, |call| call.token_ids = Some(ids([T]))), "forward: token_ids is given");
    says(forward(&config, right, |call| call.routes = None), "forward: routes is missing");
    let more: ForwardChange = |call| call.source = Source::Routes(given([[T, K]; 2]));
    says(forward(&config, right, more), "forward: routes is given");
}

#[test]
fn a_gradient_without_its_operand_is_refused() {
    let changes: [(&str, BackwardChange); 8] = [
        ("router_bias", |call| call.gradients.router_bias = gradient([E])),
        ("gate_up_bias", |call| call.gradients.gate_up_bias = gradient([E, N])),
        ("down_bias", |call| call.gradients.down_bias = gradient([E, H])),
        ("shared.gate_up_bias", |call| call.gradients.shared.gate_up_bias = gradient([N])),
        ("shared.down_bias", |call| call.gradients.shared.down_bias = gradient([H])),
        // the layer has these where it has a part for them
        ("router_norm", |call| call.gradients.router_norm = gradient([H])),
        ("expert_scale", |call| call.gradients.expert_scale = gradient([E])),
        ("shared.gate", |call| call.gradients.shared.gate = gradient([H])),
    ];
    let ungated = LayerConfig { shared: Some(gated(false)), ..plain() };
    for (name, change) in changes {
        says(backward(&ungated, keep(parameters(&ungated)), change), &format!("backward: gradients.{name} is given"));
    }
    let (config, without) = (whole(), keep(parameters(&whole())));
    for (name, change) in &changes[..6] {
        says(backward(&config, without, *change), &format!("backward: gradients.{name} is given"));
    }
    let (gate_up_bias, down_bias) = (Some(floats([N])), Some(floats([H])));
    let shared = parameters(&config).shared.map(|shared| SharedParameters { gate_up_bias, down_bias, ..shared });
    let all = keep(LayerParameters {
        router_bias: Some(floats([E])),
        router_norm: Some(floats([H])),
        gate_up_bias: Some(floats([E, N])),
        down_bias: Some(floats([E, H])),
        shared,
        ..parameters(&config)
    });
    for (name, change) in changes {
        assert_eq!(backward(&config, all, change), Ok(()), "{name}");
    }
    let shared: [(&str, BackwardChange); 2] = [
        ("shared.gate_up", |call| call.gradients.shared.gate_up = gradient([N, H])),
        ("shared.down", |call| call.gradients.shared.down = gradient([H, I])),
    ];
    for (name, change) in shared {
        assert_eq!(backward(&config, all, change), Ok(()), "{name}");
        says(backward(&plain(), keep(parameters(&plain())), change), &format!("backward: gradients.{name} is given"));
    }
}

#[test]
fn gradients_end_where_the_routes_came_from() {
    let config = whole();
    let all =
        keep(LayerParameters { router_bias: Some(floats([E])), router_norm: Some(floats([H])), ..parameters(&config) });
    let routes: [(&str, BackwardChange); 6] = [
        ("gradients.router", |call| call.gradients.router = gradient([E, H])),
        ("gradients.router_bias", |call| call.gradients.router_bias = gradient([E])),
        ("gradients.router_norm", |call| call.gradients.router_norm = gradient([H])),
        ("gradients.logits", |call| call.gradients.logits = gradient([T, E])),
        ("gradients.expert_scale", |call| call.gradients.expert_scale = gradient([E])),
        ("d_logits", |call| call.d_logits = Some(floats([T, E]))),
    ];
    let run = |source: RoutesFrom<'static, Cpu>, change: BackwardChange| {
        backward(&config, all, |call| {
            call.source = source;
            change(call);
        })
    };
    for (n, (name, change)) in routes.into_iter().enumerate() {
        assert_eq!(run(RoutesFrom::Router, change), Ok(()), "{name}");
        says(run(RoutesFrom::Routes, change), &format!("backward: {name} is given"));
        let logits = run(RoutesFrom::Logits(floats([T, E])), change);
        if n < 3 {
            says(logits, &format!("backward: {name} is given"));
        } else {
            assert_eq!(logits, Ok(()), "{name}");
        }
    }
}

#[test]
fn sizes_that_no_memory_holds_are_an_error() {
    let cpu = Cpu::with_threads(1).unwrap();
    let stream = cpu.stream().unwrap();
    let config = LayerConfig::new(H, usize::MAX, 2, 1);
    let layer = TrainingLayer::new(&config).unwrap();
    let mut workspace = layer.workspace(&cpu, 0).unwrap();
    let right = keep(LayerParameters { gate_up: floats([2, N, H]), down: floats([2, H, I]), ..parameters(&plain()) });
    let call = LayerBackward {
        d_y: floats([0, H]),
        d_logits: None,
        x: floats([0, H]),
        parameters: right,
        source: RoutesFrom::Router,
        routing: given([[0, 1]; 2]),
        pre_activation: floats([0, N]),
        shared_pre_activation: None,
        gradients: LayerGradients::default(),
    };
    let found = layer.backward(&cpu, &stream, call, &mut workspace).map_err(|error| error.to_string());
    says(found, "backward: parameters.gate_up");
}
