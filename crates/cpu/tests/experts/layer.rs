use crate::support::*;
use fused_moe_core::config::*;
use fused_moe_core::operation::{Forward, NextNorm, Residual, RoutesOut, Source};
use fused_moe_core::weights::{
    ExpertMatrices, ExpertWeights, GateUpOrder, LayerWeights, Matrix, Orientation, SharedWeights, StackLayout, Table,
};
use fused_moe_core::{
    Backend, DType, Error as Contract, Layer, NO_EXPERT, Numerics, Options, Routing, Status, reference,
};
use fused_moe_cpu::{Cpu, CpuLayer, Error};
use std::borrow::Cow;

/// A layer's description and weights.
struct Model {
    config: LayerConfig,
    router: Buffer,
    router_bias: Option<Buffer>,
    router_norm: Option<Buffer>,
    correction_bias: Option<Buffer>,
    expert_scale: Option<Buffer>,
    table: Option<Vec<u32>>,
    gate_up: Buffer,
    down: Buffer,
    down_bias: Option<Buffer>,
    shared: Option<[Buffer; 4]>,
}

fn model(config: LayerConfig, dtype: DType) -> Model {
    let LayerConfig { hidden: h, intermediate: i, experts: e, top_k: k, .. } = config;
    let mut random = Random(17);
    let mut vector = |wanted: bool, n| {
        let values = random.units(n, 1.0);
        wanted.then(|| Buffer::floats(dtype, [n], 0, &values))
    };
    let router_bias = vector(config.gate.scale != 1.0, e);
    let router_norm = vector(config.gate.norm.is_some(), h);
    let correction_bias = vector(matches!(config.routing.selection, Selection::TopK { bias: true, .. }), e);
    let expert_scale = vector(config.routing.weights.expert_scale.is_some(), e);
    let down_bias = vector(config.activation.is_gated(), e * h);
    let shared_gate = vector(true, h).unwrap();
    let table = (config.routing.selection == Selection::Table)
        .then(|| (0..10 * k).map(|n| ((n * 7 + n / k) % e) as u32).collect());
    let mut stack = |[e, n, c]: [usize; 3]| Buffer::floats(dtype, [e, n, c], 0, &random.units(e * n * c, 0.5));
    let shared = config.shared.map(|shared| {
        let s = shared.intermediate;
        [stack([1, s, h]), stack([1, s, h]), stack([1, h, s]), shared_gate]
    });
    Model {
        router: stack([1, e, h]),
        gate_up: stack([e, config.gate_up_rows(), h]),
        down: stack([e, h, i]),
        config,
        router_bias,
        router_norm,
        correction_bias,
        expert_scale,
        table,
        down_bias,
        shared,
    }
}

/// A matrix of a stack of one.
fn matrix(buffer: &Buffer) -> Matrix<'_> {
    let view = buffer.view();
    Matrix::new(view.row_range(0, view.rows()).unwrap(), Orientation::OutIn).unwrap()
}

impl Model {
    fn prepare(&self, cpu: &Cpu, options: &Options) -> CpuLayer {
        let config = &self.config;
        let order = if config.activation.is_gated() { GateUpOrder::GateThenUp } else { GateUpOrder::UpOnly };
        let layout = StackLayout { order, ..StackLayout::default() };
        let down_bias =
            self.down_bias.as_ref().map(|bias| bias.view().reshape([config.experts, config.hidden]).unwrap());
        let experts = ExpertWeights::stacked(self.gate_up.view(), self.down.view(), layout).unwrap();
        let router = self.router.view().reshape([config.experts, config.hidden]).unwrap();
        let shared = config.shared.zip(self.shared.as_ref()).map(|(config, [gate, up, down, logit])| SharedWeights {
            matrices: ExpertMatrices::new(config.activation.is_gated().then(|| matrix(gate)), matrix(up), matrix(down)),
            gate: config.gated.then(|| logit.view()),
        });
        let view = |buffer: &'static str| match buffer {
            "router_bias" => self.router_bias.as_ref().map(|b| b.view()),
            "router_norm" => self.router_norm.as_ref().map(|b| b.view()),
            "correction_bias" => self.correction_bias.as_ref().map(|b| b.view()),
            _ => self.expert_scale.as_ref().map(|b| b.view()),
        };
        let weights = LayerWeights {
            router_bias: view("router_bias"),
            router_norm: view("router_norm"),
            correction_bias: view("correction_bias"),
            expert_scale: view("expert_scale"),
            table: self.table.as_ref().map(|ids| Table { experts: Cow::Borrowed(ids), vocabulary: 10 }),
            shared,
            ..LayerWeights::new(router, experts.with_biases(None, down_bias, order).unwrap())
        };
        cpu.prepare(config, &weights, options).unwrap()
    }
}

#[derive(Clone, Copy, PartialEq)]
enum From {
    Router,
    Logits,
    Routes,
}

/// A call with every part that it can have, against the reference.
fn check_model(model: &Model, tokens: usize, from: From, options: &Options) {
    let LayerConfig { hidden: h, experts: e, top_k: k, .. } = model.config;
    let mut random = Random(tokens as u64);
    let dtype = FLOATS[tokens % 3];
    let mut floats = |dtype, rows, cols| Buffer::floats(dtype, [rows, cols], 0, &random.units(rows * cols, 1.0));
    let (x, residual) = (floats(dtype, tokens, h), floats(dtype, tokens, h));
    let (logits, given_weights) = (floats(DType::F32, tokens, e), floats(DType::F32, tokens, k));
    let norm_weight = floats(DType::BF16, 1, h);
    let token_ids: Vec<u32> = (0..tokens).map(|_| random.below(10) as u32).collect();
    let given: Vec<u32> = (0..tokens * k).map(|_| random.pick(&[0, (e - 1) as u32, NO_EXPERT, e as u32])).collect();
    let (ids, given) = (Buffer::ids([tokens], 0, &token_ids), Buffer::ids([tokens, k], 0, &given));
    let local = options.local_experts.clone().unwrap_or(0..e);

    let values = |buffer: &Option<Buffer>| buffer.as_ref().map(Buffer::values);
    let [router, gate_up, down] = [&model.router, &model.gate_up, &model.down].map(Buffer::values);
    let vectors =
        [&model.router_bias, &model.router_norm, &model.correction_bias, &model.expert_scale, &model.down_bias]
            .map(values);
    let shared = model.shared.as_ref().map(|parts| parts.each_ref().map(Buffer::values));
    let shared_gate_up = shared.as_ref().map(|[gate, up, ..]| {
        let gated = model.config.shared.is_some_and(|shared| shared.activation.is_gated());
        if gated { [&gate[..], up].concat() } else { up.clone() }
    });
    let layer = reference::Layer {
        router: &router,
        router_bias: vectors[0].as_deref(),
        router_norm: vectors[1].as_deref(),
        correction_bias: vectors[2].as_deref(),
        expert_scale: vectors[3].as_deref(),
        table: model.table.as_deref(),
        gate_up: &gate_up,
        gate_up_bias: None,
        down: &down,
        down_bias: vectors[4].as_deref(),
        shared: shared.as_ref().zip(shared_gate_up.as_ref()).map(|([.., down, gate], gate_up)| {
            reference::SharedExpert { gate_up, gate_up_bias: None, down, down_bias: None, gate: Some(gate) }
        }),
        ..reference::Layer::default()
    };
    let (xs, residuals, norm_weights) = (x.values(), residual.values(), norm_weight.values());
    let input = reference::Input {
        x: &xs,
        token_ids: Some(&token_ids),
        residual: Some(&residuals),
        norm: Some(reference::Norm { weight: Some(&norm_weights), eps: 1e-3 }),
        tokens,
        ..reference::Input::default()
    };
    let routed = match from {
        From::Router => reference::forward(&model.config, &layer, &input),
        From::Logits => reference::forward_from_logits(&model.config, &layer, &input, &logits.values()),
        From::Routes => {
            let (ids, weights) = (given.numbers(), given_weights.values());
            reference::forward_from_routes(&model.config, &layer, &input, &ids, &weights)
        }
    };
    // Experts that are elsewhere contribute nothing here.
    let here: Vec<u32> =
        routed.routes.experts.iter().map(|&id| if local.contains(&(id as usize)) { id } else { NO_EXPERT }).collect();
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
            let call = Forward {
                source: match from {
                    From::Router => Source::Router,
                    From::Logits => Source::Logits(logits.view()),
                    From::Routes => Source::Routes(Routing { experts: given.view(), weights: given_weights.view() }),
                },
                token_ids: (model.table.is_some() && from != From::Routes).then(|| ids.view()),
                residual: Some(if in_place { Residual::InPlace } else { Residual::Of(residual.view()) }),
                norm: Some(NextNorm { weight: Some(norm_weight.view()), eps: 1e-3, out: normed.view_mut() }),
                routes: Some(RoutesOut { experts: experts.view_mut(), weights: weights.view_mut() }),
                counts: Some(counts.view_mut()),
                ..Forward::new(x.view(), y.view_mut())
            };
            prepared.run(stream, call, workspace).unwrap();
            vec![y, normed, experts, weights, counts]
        };
        let outputs = run(false, &mut workspace);
        assert!(outputs == run(true, &mut workspace));
        outputs
    };
    check(run, |outputs, status| {
        assert_eq!(outputs[2].numbers(), routed.routes.experts);
        close(&outputs[3], &routed.routes.weights, |_| 2e-5);
        assert_eq!(outputs[4].numbers(), expected.permutation.counts());
        close(&outputs[0], &expected.y, |_| 2e-4);
        close(&outputs[1], expected.normed.as_deref().unwrap_or(&[]), |_| 2e-3);
        let bad = from == From::Routes && given.numbers().contains(&(e as u32));
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

#[test]
fn against_the_reference() {
    for (n, config) in configs().into_iter().enumerate() {
        let model = model(config, FLOATS[n % 3]);
        for tokens in [0, 1, 5, 33] {
            for from in [From::Router, From::Logits, From::Routes] {
                check_model(&model, tokens, from, &Options::default());
            }
        }
        let e = model.config.experts;
        for local in [0..0, 1..e - 1] {
            check_model(&model, 7, From::Router, &Options { local_experts: Some(local), ..Options::default() });
        }
    }
}

#[test]
fn a_token_does_not_depend_on_its_batch() {
    let model = model(configs().remove(1), DType::BF16);
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
    assert!(layer.weight_bytes() > weights && layer.weight_bytes() < weights + 16384);
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
}
