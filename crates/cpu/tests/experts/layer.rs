use crate::model::*;
use crate::support::*;
use fused_moe_core::config::*;
use fused_moe_core::operation::{Forward, NextNorm, Residual, RouterState, RoutesOut, Source};
use fused_moe_core::{
    Backend, DType, Error as Contract, Layer, NO_EXPERT, Numerics, Options, Routing, Status, View, reference,
};
use fused_moe_cpu::{Cpu, Error};

#[derive(Clone, Copy, PartialEq)]
enum From {
    Router,
    Logits,
    Routes,
}

/// A call with every part that it can have, against the reference.
fn check_model(model: &Model, tokens: usize, from: From, options: &Options) {
    let LayerConfig { hidden: h, experts: e, top_k: k, .. } = model.config;
    let (choices, width) = (model.config.choices(), model.config.router_mlp.map_or(0, |mlp| mlp.width));
    let mut random = Random(tokens as u64);
    let dtype = FLOATS[tokens % 3];
    let mut floats = |dtype, rows, cols| Buffer::floats(dtype, [rows, cols], 0, &random.units(rows * cols, 1.0));
    let (x, residual) = (floats(dtype, tokens, h), floats(dtype, tokens, h));
    let (logits, given_weights) = (floats(DType::F32, tokens, choices), floats(DType::F32, tokens, k));
    let previous = floats(DType::F32, tokens, width);
    let norm_weight = floats(DType::BF16, 1, h);
    let token_ids: Vec<u32> = (0..tokens).map(|_| random.below(10) as u32).collect();
    let given: Vec<u32> = (0..tokens * k)
        .map(|_| random.pick(&[0, (e - 1) as u32, (choices - 1) as u32, NO_EXPERT, choices as u32]))
        .collect();
    let (ids, given) = (Buffer::ids([tokens], 0, &token_ids), Buffer::ids([tokens, k], 0, &given));
    // The first tokens and the last are in a sequence without being said to be.
    let ends = [1, tokens as u32 / 3, tokens as u32 / 3, (tokens as u32).saturating_sub(2)].map(|end| end.max(1));
    let limited = model.config.capacity.is_some();
    let routed_by_layers = model.config.router_mlp.is_some() && from == From::Router;
    let local = options.local_experts.clone().unwrap_or(0..e);

    let numbers = model.numbers();
    let layer = numbers.layer();
    let (xs, residuals, norm_weights) = (x.values(), residual.values(), norm_weight.values());
    let previous_values = previous.values();
    let input = reference::Input {
        x: &xs,
        token_ids: Some(&token_ids),
        sequences: limited.then_some(&ends),
        router_state: routed_by_layers.then_some(&previous_values),
        residual: Some(&residuals),
        norm: Some(reference::Norm { weight: Some(&norm_weights), eps: 1e-3 }),
        tokens,
    };
    let routed = match from {
        From::Router => reference::forward(&model.config, &layer, &input),
        From::Logits => reference::forward_from_logits(&model.config, &layer, &input, &logits.values()),
        From::Routes => {
            let (ids, weights) = (given.numbers(), given_weights.values());
            reference::forward_from_routes(&model.config, &layer, &input, &ids, &weights)
        }
    };
    // Experts that are elsewhere contribute nothing here; those without weights are where the last one is.
    let is_here = |id: usize| local.contains(&id) || (local.end == e && (e..choices).contains(&id));
    let here: Vec<u32> =
        routed.routes.experts.iter().map(|&id| if is_here(id as usize) { id } else { NO_EXPERT }).collect();
    let expected = reference::forward_from_routes(&model.config, &layer, &input, &here, &routed.routes.weights);

    let run = |cpu: &Cpu, stream: &_| {
        let prepared = model.prepare(cpu, options);
        let mut workspace = prepared.workspace(tokens + 1).unwrap();
        let run = |in_place: bool, workspace: &mut _| {
            let mut y = if in_place { residual.clone() } else { Buffer::new(dtype, [tokens, h], 0) };
            let mut normed = Buffer::new(DType::F32, [tokens, h], 3);
            let (mut experts, mut weights) =
                (Buffer::new(DType::U32, [tokens, k], 2), Buffer::new(DType::F32, [tokens, k], 2));
            let mut counts = Buffer::new(DType::U32, [e], 1);
            let mut state = Buffer::new(DType::F32, [tokens, width], 1);
            let call = Forward {
                source: match from {
                    From::Router => Source::Router,
                    From::Logits => Source::Logits(logits.view()),
                    From::Routes => Source::Routes(Routing { experts: given.view(), weights: given_weights.view() }),
                },
                token_ids: (model.table.is_some() && from != From::Routes).then(|| ids.view()),
                sequences: limited.then(|| View::of(&ends, [ends.len()]).unwrap()),
                router_state: RouterState {
                    previous: routed_by_layers.then(|| previous.view()),
                    next: routed_by_layers.then(|| state.view_mut()),
                },
                residual: Some(if in_place { Residual::InPlace } else { Residual::Of(residual.view()) }),
                norm: Some(NextNorm { weight: Some(norm_weight.view()), eps: 1e-3, out: normed.view_mut() }),
                routes: Some(RoutesOut { experts: experts.view_mut(), weights: weights.view_mut() }),
                counts: Some(counts.view_mut()),
                ..Forward::new(x.view(), y.view_mut())
            };
            prepared.run(stream, call, workspace).unwrap();
            let products = Buffer::ids([1], 0, &[u32::from(cpu.isa().has_bf16_products())]);
            vec![y, normed, experts, weights, counts, state, products]
        };
        let outputs = run(false, &mut workspace);
        assert!(outputs == run(true, &mut workspace));
        outputs
    };
    check(run, |outputs, status| {
        assert_eq!(outputs[2].numbers(), routed.routes.experts);
        close(&outputs[3], &routed.routes.weights, |_| 2e-5);
        assert_eq!(outputs[4].numbers(), expected.permutation.counts()[..e]);
        if routed_by_layers {
            close(&outputs[5], routed.router_state.as_deref().unwrap_or(&[]), |_| 2e-5);
        }
        // Products of bf16 take what lies between gate_up and down, and a norm before them, rounded to it once more.
        let rounded = dtype == DType::BF16 && outputs[6].numbers() == [1];
        let rounding = |values: &[f64]| {
            let largest = values.iter().fold(0.0, |most: f64, value| most.max(value.abs()));
            if rounded { 4.0 * DType::BF16.epsilon() * largest } else { 0.0 }
        };
        let normed = expected.normed.as_deref().unwrap_or(&[]);
        close(&outputs[0], &expected.y, |_| 2e-4 + rounding(&expected.y));
        close(&outputs[1], normed, |_| 2e-3 + rounding(normed));
        let bad = from == From::Routes && given.numbers().contains(&(choices as u32));
        assert_eq!(status.contains(Status::EXPERT_OUT_OF_RANGE), bad);
    });
}

fn configs() -> Vec<LayerConfig> {
    let shared = |gated, activation| Some(SharedConfig { intermediate: 11, activation, gated, scale: 0.5 });
    let bias = Selection::TopK { by: SelectBy::Score, bias: true, groups: None };
    vec![
        LayerConfig::new(17, 13, 8, 2),
        LayerConfig {
            gate: GateConfig {
                norm: Some(GateNorm { eps: 1e-5, feeds_experts: true }),
                scale: 0.7,
                softcap: Some(3.0),
            },
            routing: RoutingRule { score: Score::Sigmoid, selection: bias, ..RoutingRule::default() },
            routed_scale: 1.5,
            shared: shared(true, Activation::default()),
            ..LayerConfig::new(32, 24, 12, 4)
        },
        LayerConfig {
            gate: GateConfig { norm: Some(GateNorm { eps: 1e-5, feeds_experts: false }), ..GateConfig::default() },
            activation: Activation::Plain(Function::GeluTanh),
            weight_on: WeightOn::Input,
            shared: shared(false, Activation::Plain(Function::Silu)),
            ..LayerConfig::new(19, 7, 5, 5)
        },
        LayerConfig {
            routing: RoutingRule {
                selection: Selection::Table,
                weights: WeightRule { expert_scale: Some(ExpertScale::AfterNormalize), ..WeightRule::default() },
                ..RoutingRule::default()
            },
            ..LayerConfig::new(16, 8, 6, 3)
        },
    ]
}

/// What few layers have.
fn rare_configs() -> Vec<LayerConfig> {
    let bias = Selection::TopK { by: SelectBy::Score, bias: true, groups: None };
    let groups = Groups { count: 3, keep: 2, score: GroupScore::Best, masked: Masked::NegInfinity };
    let grouped = Selection::TopK { by: SelectBy::Score, bias: false, groups: Some(groups) };
    let sigmoid = RoutingRule { score: Score::Sigmoid, selection: bias, ..RoutingRule::default() };
    let scaled = WeightRule { expert_scale: Some(ExpertScale::AfterNormalize), ..WeightRule::default() };
    let norm = |unit_offset| Some(RmsNorm { eps: 1e-5, unit_offset, scaled_first: false });
    let capacity = |limit, order, renormalize| Some(Capacity { limit, order, renormalize });
    let all = Norms {
        experts_in: norm(false),
        expert_out: norm(true),
        routed_out: norm(true),
        shared_in: norm(true),
        shared_out: norm(false),
        out: norm(false),
    };
    vec![
        LayerConfig {
            zero_experts: Some(ZeroExperts { count: 3, output: ZeroOutput::Copy }),
            routing: RoutingRule { weights: scaled, ..sigmoid },
            routed_scale: 2.0,
            ..LayerConfig::new(17, 13, 8, 4)
        },
        LayerConfig {
            zero_experts: Some(ZeroExperts { count: 2, output: ZeroOutput::Zero }),
            capacity: capacity(CapacityLimit::EvenShare { factor: 2 }, CapacityOrder::Score, Some(0.1)),
            gate: GateConfig { norm: Some(GateNorm { eps: 1e-5, feeds_experts: true }), ..GateConfig::default() },
            weight_on: WeightOn::Input,
            ..LayerConfig::new(32, 8, 7, 3)
        },
        LayerConfig {
            routing: RoutingRule { score: Score::Sigmoid, selection: grouped, always: 2, ..RoutingRule::default() },
            capacity: capacity(CapacityLimit::Fraction(0.3), CapacityOrder::Position, None),
            norms: Norms { expert_out: norm(true), ..Norms::default() },
            shared: Some(SharedConfig { intermediate: 5, activation: Activation::default(), gated: true, scale: 0.5 }),
            ..LayerConfig::new(19, 7, 8, 4)
        },
        LayerConfig {
            latent: Some(12),
            router_mlp: Some(RouterMlp { width: 9, eps: 1e-5, function: Function::GeluErf }),
            zero_experts: Some(ZeroExperts { count: 1, output: ZeroOutput::Copy }),
            capacity: capacity(CapacityLimit::Slots(3), CapacityOrder::Position, Some(0.0)),
            routing: sigmoid,
            norms: all,
            shared: Some(SharedConfig { intermediate: 11, activation: Activation::default(), gated: true, scale: 0.5 }),
            ..LayerConfig::new(31, 10, 6, 2)
        },
        LayerConfig {
            latent: Some(40),
            gate: GateConfig { norm: Some(GateNorm { eps: 1e-5, feeds_experts: false }), ..GateConfig::default() },
            activation: Activation::Plain(Function::Silu),
            shared: Some(SharedConfig {
                intermediate: 6,
                activation: Activation::Plain(Function::Silu),
                gated: false,
                scale: 1.0,
            }),
            ..LayerConfig::new(24, 9, 5, 2)
        },
        LayerConfig {
            router_mlp: Some(RouterMlp { width: 20, eps: 1e-6, function: Function::GeluTanh }),
            gate: GateConfig { norm: Some(GateNorm { eps: 1e-5, feeds_experts: false }), ..GateConfig::default() },
            norms: Norms { experts_in: norm(true), ..Norms::default() },
            ..LayerConfig::new(16, 8, 4, 2)
        },
    ]
}

#[test]
fn against_the_reference() {
    for (n, config) in configs().into_iter().chain(rare_configs()).enumerate() {
        let model = model(config, FLOATS[n % 3]);
        for tokens in [0, 1, 5, 33] {
            for from in [From::Router, From::Logits, From::Routes] {
                check_model(&model, tokens, from, &Options::default());
            }
        }
        let e = model.config.experts;
        let Norms { routed_out, out, .. } = model.config.norms;
        if routed_out.or(out).is_some() {
            continue;
        }
        for local in [0..0, 1..e - 1, e - 2..e] {
            check_model(&model, 7, From::Router, &Options { local_experts: Some(local), ..Options::default() });
        }
    }
}

#[test]
fn a_token_does_not_depend_on_its_batch() {
    // A capacity is what makes tokens depend on each other.
    let rare = rare_configs().remove(3);
    for config in [configs().remove(1), LayerConfig { capacity: None, ..rare }] {
        each_token_alone(&model(config, DType::BF16));
    }
}

fn each_token_alone(model: &Model) {
    let (tokens, h) = (37, model.config.hidden);
    let x = Buffer::floats(DType::BF16, [tokens, h], 0, &Random(1).units(tokens * h, 1.0));
    let cpu = Cpu::with_threads(2).unwrap();
    let stream = cpu.stream().unwrap();
    for numerics in [Numerics::Fast, Numerics::BatchInvariant] {
        let layer = model.prepare(&cpu, &Options { numerics, ..Options::default() });
        let mut workspace = layer.workspace(tokens).unwrap();
        let mut all = Buffer::new(DType::F32, [tokens, h], 0);
        layer.forward(&stream, x.view(), all.view_mut(), &mut workspace).unwrap();
        for t in 0..tokens {
            let mut y = Buffer::new(DType::F32, [1, h], 0);
            layer.forward(&stream, x.view().row_range(t, 1).unwrap(), y.view_mut(), &mut workspace).unwrap();
            assert_eq!(y.values(), all.values()[t * h..][..h]);
        }
    }
}

#[test]
fn two_threads_call_one_layer() {
    let model = model(configs().remove(0), DType::F16);
    let (tokens, h) = (21, model.config.hidden);
    let x = Buffer::floats(DType::F32, [tokens, h], 0, &Random(1).units(tokens * h, 1.0));
    let cpu = Cpu::with_threads(2).unwrap();
    let layer = model.prepare(&cpu, &Options::default());
    let call = || {
        let (stream, mut workspace) = (cpu.stream().unwrap(), layer.workspace(tokens).unwrap());
        let outputs = (0..20).map(|_| {
            let mut y = Buffer::new(DType::F32, [tokens, h], 0);
            layer.forward(&stream, x.view(), y.view_mut(), &mut workspace).unwrap();
            y.values()
        });
        outputs.collect::<Vec<_>>()
    };
    let (first, second) = std::thread::scope(|scope| {
        let other = scope.spawn(call);
        (call(), other.join().unwrap())
    });
    assert!(first.iter().chain(&second).all(|y| *y == first[0]));
}

#[test]
fn workspaces_and_their_limits() {
    let model = model(configs().remove(1), DType::F32);
    let cpu = Cpu::new().unwrap();
    let layer = model.prepare(&cpu, &Options::default());
    let weights = [&model.gate_up, &model.down].map(|b| 4 * b.values().len()).iter().sum::<usize>();
    // Matrix rows are padded to panels, which are half empty at worst where there are several.
    assert!(layer.weight_bytes() > weights && layer.weight_bytes() < 2 * weights);
    let (stream, h) = (cpu.stream().unwrap(), model.config.hidden);
    let bytes = layer.workspace_bytes(4).unwrap();
    assert!(layer.workspace_in(cpu.allocate(bytes).unwrap(), 4).is_ok());
    let error = layer.workspace_in(cpu.allocate(bytes - 1).unwrap(), 4).unwrap_err();
    assert!(matches!(error, Error::Contract(Contract::Workspace { tokens: 4, .. })), "{error}");
    let mut workspace = layer.workspace(4).unwrap();
    let (x, mut y) = (Buffer::floats(DType::F32, [9, h], 0, &vec![0.0; 9 * h]), Buffer::new(DType::F32, [9, h], 0));
    let error = layer.forward(&stream, x.view(), y.view_mut(), &mut workspace).unwrap_err();
    assert!(matches!(error, Error::Contract(Contract::Workspace { tokens: 9, .. })), "{error}");
    assert!(layer.workspace_bytes(usize::MAX / 2).is_err());
    let explained = layer.explain(100);
    for stage in ["gate: ", "route: ", "permute: ", "gate_up: ", "down: ", "shared down: ", "combine: "] {
        assert!(explained.contains(&format!("\n{stage}")), "{stage}: {explained}");
    }
    let rare = self::model(rare_configs().remove(3), DType::F32);
    let explained = rare.prepare(&cpu, &Options::default()).explain(100);
    for stage in ["overflow: ", "surroundings: "] {
        assert!(explained.contains(&format!("\n{stage}")), "{stage}: {explained}");
    }
}
