//! A layer's description and weights, as a backend and as the reference read them.

use crate::support::*;
use fused_moe_core::config::*;
use fused_moe_core::weights::{
    ExpertMatrices, ExpertWeights, GateUpOrder, LatentWeights, LayerWeights, Matrix, NormWeights, Orientation,
    RouterMlpWeights, SharedWeights, StackLayout, Table,
};
use fused_moe_core::{Backend, DType, HostView, Options, reference};
use fused_moe_cpu::{Cpu, CpuLayer};
use std::borrow::Cow;

pub(crate) struct Model {
    pub(crate) config: LayerConfig,
    pub(crate) gate_up: Buffer,
    pub(crate) down: Buffer,
    pub(crate) table: Option<Vec<u32>>,
    router: Buffer,
    router_bias: Option<Buffer>,
    router_norm: Option<Buffer>,
    correction_bias: Option<Buffer>,
    expert_scale: Option<Buffer>,
    down_bias: Option<Buffer>,
    shared: Option<[Buffer; 4]>,
    /// Down and up.
    latent: Option<[Buffer; 2]>,
    /// In the order of [`Norms`].
    norms: [Option<Buffer>; 6],
    router_mlp: Option<RouterLayers<Buffer>>,
}

struct RouterLayers<T> {
    /// Down, fc1 and fc2.
    matrices: [T; 3],
    /// The bias of down, the scale of the state, the weight of the norm and the bias of fc2.
    vectors: [T; 4],
}

pub(crate) fn model(config: LayerConfig, dtype: DType) -> Model {
    let LayerConfig { hidden: h, intermediate: i, experts: e, top_k: k, .. } = config;
    let (choices, width) = (config.choices(), config.expert_width());
    let mut random = Random(17);
    let mut vector = |wanted: bool, n| {
        let values = random.units(n, 1.0);
        wanted.then(|| Buffer::floats(dtype, [n], 0, &values))
    };
    let router_bias = vector(config.gate.scale != 1.0, choices);
    let router_norm = vector(config.gate.norm.is_some(), config.router_width());
    let biased = matches!(config.routing.selection, Selection::TopK { bias: true, .. });
    let correction_bias = vector(biased, choices - config.routing.always);
    let expert_scale = vector(config.routing.weights.expert_scale.is_some(), choices);
    let down_bias = vector(config.activation.is_gated(), e * width);
    let shared_gate = vector(true, h).unwrap();
    let Norms { experts_in, expert_out, routed_out, shared_in, shared_out, out } = config.norms;
    // One of them has no weight.
    let norms = [
        vector(experts_in.is_some(), width),
        vector(expert_out.is_some(), width),
        vector(routed_out.is_some_and(|norm| norm.unit_offset), h),
        vector(shared_in.is_some(), h),
        vector(shared_out.is_some(), h),
        vector(out.is_some(), h),
    ];
    let mlp_vectors = config.router_mlp.map(|mlp| [(); 4].map(|()| vector(true, mlp.width).unwrap()));
    let table = (config.routing.selection == Selection::Table)
        .then(|| (0..10 * k).map(|n| ((n * 7 + n / k) % e) as u32).collect());
    let mut stack = |[e, n, c]: [usize; 3]| Buffer::floats(dtype, [e, n, c], 0, &random.units(e * n * c, 0.5));
    let shared = config.shared.map(|shared| {
        let s = shared.intermediate;
        [stack([1, s, h]), stack([1, s, h]), stack([1, h, s]), shared_gate]
    });
    let latent = config.latent.map(|width| [stack([1, width, h]), stack([1, h, width])]);
    let router_mlp = config.router_mlp.zip(mlp_vectors).map(|(RouterMlp { width: m, .. }, vectors)| RouterLayers {
        matrices: [stack([1, m, h]), stack([1, m, m]), stack([1, m, m])],
        vectors,
    });
    Model {
        router: stack([1, choices, config.router_width()]),
        gate_up: stack([e, config.gate_up_rows(), width]),
        down: stack([e, width, i]),
        config,
        table,
        router_bias,
        router_norm,
        correction_bias,
        expert_scale,
        down_bias,
        shared,
        latent,
        norms,
        router_mlp,
    }
}

/// The matrix of a stack of one.
fn plane(buffer: &Buffer) -> HostView<'_> {
    let view = buffer.view();
    view.row_range(0, view.rows()).unwrap()
}

fn matrix(buffer: &Buffer) -> Matrix<'_> {
    Matrix::new(plane(buffer), Orientation::OutIn).unwrap()
}

fn view(buffer: &Option<Buffer>) -> Option<HostView<'_>> {
    buffer.as_ref().map(|buffer| buffer.view())
}

impl Model {
    pub(crate) fn prepare(&self, cpu: &Cpu, options: &Options) -> CpuLayer {
        let config = &self.config;
        let order = if config.activation.is_gated() { GateUpOrder::GateThenUp } else { GateUpOrder::UpOnly };
        let layout = StackLayout { order, ..StackLayout::default() };
        let biases = [config.experts, config.expert_width()];
        let down_bias = self.down_bias.as_ref().map(|bias| bias.view().reshape(biases).unwrap());
        let experts = ExpertWeights::stacked(self.gate_up.view(), self.down.view(), layout).unwrap();
        let shared = config.shared.zip(self.shared.as_ref()).map(|(config, [gate, up, down, logit])| SharedWeights {
            matrices: ExpertMatrices::new(config.activation.is_gated().then(|| matrix(gate)), matrix(up), matrix(down)),
            gate: config.gated.then(|| logit.view()),
        });
        let [experts_in, expert_out, routed_out, shared_in, shared_out, out] = self.norms.each_ref().map(view);
        let router_mlp = self.router_mlp.as_ref().map(|RouterLayers { matrices, vectors }| {
            let ([down, fc1, fc2], [bias, scale, norm, last]) = (matrices.each_ref().map(plane), vectors);
            RouterMlpWeights {
                down,
                down_bias: Some(bias.view()),
                state_scale: Some(scale.view()),
                norm: Some(norm.view()),
                fc1,
                fc1_bias: None,
                fc2,
                fc2_bias: Some(last.view()),
            }
        });
        let weights = LayerWeights {
            router_bias: view(&self.router_bias),
            router_norm: view(&self.router_norm),
            correction_bias: view(&self.correction_bias),
            expert_scale: view(&self.expert_scale),
            table: self.table.as_ref().map(|ids| Table { experts: Cow::Borrowed(ids), vocabulary: 10 }),
            shared,
            latent: self.latent.as_ref().map(|[down, up]| LatentWeights { down: plane(down), up: plane(up) }),
            norms: NormWeights { experts_in, expert_out, routed_out, shared_in, shared_out, out },
            router_mlp,
            ..LayerWeights::new(plane(&self.router), experts.with_biases(None, down_bias, order).unwrap())
        };
        cpu.prepare(config, &weights, options).unwrap()
    }

    pub(crate) fn numbers(&self) -> Numbers<'_> {
        let values = |buffer: &Option<Buffer>| buffer.as_ref().map(Buffer::values);
        let gated = self.config.shared.is_some_and(|shared| shared.activation.is_gated());
        let vectors =
            [&self.router_bias, &self.router_norm, &self.correction_bias, &self.expert_scale, &self.down_bias];
        Numbers {
            model: self,
            matrices: [&self.router, &self.gate_up, &self.down].map(Buffer::values),
            vectors: vectors.map(values),
            shared: self.shared.as_ref().map(|parts| {
                let [gate, up, down, logit] = parts.each_ref().map(Buffer::values);
                [if gated { [gate, up].concat() } else { up }, down, logit]
            }),
            latent: self.latent.as_ref().map(|parts| parts.each_ref().map(Buffer::values)),
            norms: self.norms.each_ref().map(values),
            router_mlp: self.router_mlp.as_ref().map(|RouterLayers { matrices, vectors }| RouterLayers {
                matrices: matrices.each_ref().map(Buffer::values),
                vectors: vectors.each_ref().map(Buffer::values),
            }),
        }
    }
}

/// The weights as the reference reads them.
pub(crate) struct Numbers<'a> {
    model: &'a Model,
    matrices: [Vec<f64>; 3],
    vectors: [Option<Vec<f64>>; 5],
    shared: Option<[Vec<f64>; 3]>,
    latent: Option<[Vec<f64>; 2]>,
    norms: [Option<Vec<f64>>; 6],
    router_mlp: Option<RouterLayers<Vec<f64>>>,
}

impl Numbers<'_> {
    pub(crate) fn layer(&self) -> reference::Layer<'_> {
        let [router, gate_up, down] = &self.matrices;
        let [router_bias, router_norm, correction_bias, expert_scale, down_bias] =
            self.vectors.each_ref().map(|vector| vector.as_deref());
        let [experts_in, expert_out, routed_out, shared_in, shared_out, out] =
            self.norms.each_ref().map(|vector| vector.as_deref());
        reference::Layer {
            router,
            router_bias,
            router_norm,
            correction_bias,
            expert_scale,
            table: self.model.table.as_deref(),
            gate_up,
            gate_up_bias: None,
            down,
            down_bias,
            shared: self.shared.as_ref().map(|[gate_up, down, gate]| reference::SharedExpert {
                gate_up,
                gate_up_bias: None,
                down,
                down_bias: None,
                gate: Some(gate),
            }),
            latent: self.latent.as_ref().map(|[down, up]| reference::Latent { down, up }),
            norms: reference::NormVectors { experts_in, expert_out, routed_out, shared_in, shared_out, out },
            router_mlp: self.router_mlp.as_ref().map(|RouterLayers { matrices, vectors }| {
                let ([down, fc1, fc2], [bias, scale, norm, last]) = (matrices, vectors);
                reference::RouterMlp {
                    down,
                    down_bias: Some(bias),
                    state_scale: Some(scale),
                    norm: Some(norm),
                    fc1,
                    fc1_bias: None,
                    fc2,
                    fc2_bias: Some(last),
                }
            }),
        }
    }
}
