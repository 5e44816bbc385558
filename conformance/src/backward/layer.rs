//! A whole layer that is trained: forward, keeping what is needed, and every gradient.

use super::{BackwardCase, BackwardOperation, CheckBackward, MODES, gradient, output};
use crate::cases::Stage;
use crate::data::{Data, Tensor};
use crate::operands::{Operands, Output, Prepared};
use crate::tolerance;
use fused_moe_core::backend::{reborrow, share, shorten, shorten_mut};
use fused_moe_core::config::*;
use fused_moe_core::operation::{
    ForwardSaving, Gradient, GradientMode, LayerBackward, LayerGradients, LayerParameters, NextNorm, Residual,
    RoutesFrom, RoutesOut, SharedGradients, SharedParameters, Source,
};
use fused_moe_core::reference::{self, Input};
use fused_moe_core::training::TrainingLayer;
use fused_moe_core::{BackendBackward, DType, Routing};

/// A case of a layer that is trained.
#[derive(Clone, Debug)]
pub struct Layer {
    /// T.
    pub tokens: usize,
    /// Format of x, y, the weights, what is kept and the gradients of all these.
    pub dtype: DType,
    /// The layer.
    pub config: LayerConfig,
    /// Where its routes come from.
    pub from: Origin,
    /// Whether there are biases, of the router too.
    pub biases: bool,
    /// Whether y has a residual, and a norm follows.
    pub tail: bool,
    /// How the gradients are stored.
    pub mode: GradientMode,
}

/// Where the routes of a case come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The layer's router.
    Router,
    /// Logits.
    Logits,
    /// Routes.
    Routes,
}

/// V, where experts are chosen by token id.
const VOCABULARY: usize = 11;
const NEXT_EPS: f32 = 1e-4;

const F32: DType = DType::F32;

/// The names of the operands whose gradients a layer has, and their shapes.
type Weights = Vec<(&'static str, Tensor)>;

impl Layer {
    fn weights(&self, data: Data) -> Weights {
        let c = &self.config;
        let (n, h, dtype) = (c.gate_up_rows(), c.hidden, self.dtype);
        let scale = |inner: usize| 1.3 / (inner as f64).sqrt();
        let matrix = |name: &str, rows, cols| data.of(name).normal(dtype, [rows, cols], scale(cols));
        let stack = |name: &str, rows, cols| data.of(name).normal(dtype, [c.experts, rows, cols], scale(cols));
        let vector = |name: &str, n| data.of(name).normal(dtype, [n], 0.4);
        let rows = |name: &str, n| data.of(name).normal(dtype, [c.experts, n], 0.4);
        let mut weights = vec![("gate_up", stack("gate_up", n, h)), ("down", stack("down", h, c.intermediate))];
        if self.from == Origin::Router {
            weights.push(("router", matrix("router", c.experts, h)));
        }
        if c.gate.norm.is_some_and(|norm| norm.feeds_experts || self.from == Origin::Router) {
            weights.push(("router_norm", data.of("router_norm").between(dtype, [h], 0.5, 1.5)));
        }
        if c.routing.weights.expert_scale.is_some() && self.from != Origin::Routes {
            weights.push(("expert_scale", data.of("expert_scale").between(dtype, [c.experts], 0.5, 1.5)));
        }
        if self.biases {
            weights.extend([("gate_up_bias", rows("gate_up_bias", n)), ("down_bias", rows("down_bias", h))]);
            weights.extend((self.from == Origin::Router).then(|| ("router_bias", vector("router_bias", c.experts))));
        }
        if let Some(shared) = c.shared {
            let (s, rows) = (shared.intermediate, shared.activation.gate_up_rows(shared.intermediate));
            weights.push(("shared_gate_up", matrix("shared_gate_up", rows, h)));
            weights.push(("shared_down", matrix("shared_down", h, s)));
            weights.extend(shared.gated.then(|| ("shared_gate", vector("shared_gate", h))));
            if self.biases {
                weights.push(("shared_gate_up_bias", vector("shared_gate_up_bias", rows)));
                weights.push(("shared_down_bias", vector("shared_down_bias", h)));
            }
        }
        weights
    }
}

impl CheckBackward for Layer {
    fn prepare(&self) -> Prepared {
        let (tokens, c, dtype) = (self.tokens, &self.config, self.dtype);
        let data = Data::new("layer_backward").of(&format!("{c:?} {:?}", self.from));
        let weights = self.weights(data);
        let of = |name: &str| weights.iter().find(|(n, _)| *n == name).map(|(_, tensor)| tensor.as_floats());
        let x = data.of("x").tokens(dtype, [tokens, c.hidden]);
        let d_y = data.of("d_y").normal(dtype, [tokens, c.hidden], 0.7);
        let logits = data.of("logits").normal(F32, [tokens, c.experts], 1.5);
        let d_logits = data.of("d_logits").normal(F32, [tokens, c.experts], 0.2);
        let ids = data.of("ids").routes([tokens, c.top_k, c.experts], crate::data::Spread::Holes);
        let given = data.of("given").between(F32, [tokens, c.top_k], 0.1, 1.0);
        let biased = matches!(c.routing.selection, Selection::TopK { bias: true, .. });
        let correction_bias = biased.then(|| data.of("correction_bias").normal(F32, [c.experts], 0.2));
        let by_id = c.routing.selection == Selection::Table;
        let table = by_id.then(|| data.of("table").routes([VOCABULARY, c.top_k, c.experts], crate::data::Spread::Even));
        let token_ids = (by_id && self.from != Origin::Routes).then(|| {
            let ids = (0..tokens as u64).map(|t| data.of("token_ids").below(t, VOCABULARY) as u32);
            Tensor::ids([tokens], ids.collect())
        });
        let residual = self.tail.then(|| data.of("residual").normal(dtype, [tokens, c.hidden], 1.0));
        let next_weight = self.tail.then(|| data.of("next_weight").between(dtype, [c.hidden], 0.5, 1.5));
        let shared = of("shared_gate_up").zip(of("shared_down")).map(|(gate_up, down)| reference::SharedExpert {
            gate_up,
            gate_up_bias: of("shared_gate_up_bias"),
            down,
            down_bias: of("shared_down_bias"),
            gate: of("shared_gate"),
        });
        let layer = reference::Layer {
            router: of("router").unwrap_or_default(),
            router_bias: of("router_bias"),
            router_norm: of("router_norm"),
            correction_bias: correction_bias.as_ref().map(Tensor::as_floats),
            expert_scale: of("expert_scale"),
            table: table.as_ref().map(Tensor::as_ids),
            gate_up: of("gate_up").unwrap_or_default(),
            gate_up_bias: of("gate_up_bias"),
            down: of("down").unwrap_or_default(),
            down_bias: of("down_bias"),
            shared,
            ..reference::Layer::default()
        };
        let source = match self.from {
            Origin::Router => reference::Source::Router,
            Origin::Logits => reference::Source::Logits(logits.as_floats()),
            Origin::Routes => reference::Source::Routes { ids: ids.as_ids(), weights: given.as_floats() },
        };
        let next = next_weight.as_ref().map(Tensor::as_floats);
        let input = Input {
            x: x.as_floats(),
            token_ids: token_ids.as_ref().map(Tensor::as_ids),
            residual: residual.as_ref().map(Tensor::as_floats),
            norm: next.map(|weight| reference::Norm { weight: Some(weight), eps: NEXT_EPS.into() }),
            tokens,
            ..Input::default()
        };
        let (found, saved) = reference::forward_saving(c, &layer, &input, source);
        let [z, shared_z] = [&saved.pre_activation, &saved.shared_pre_activation].map(Vec::clone);
        // the backward pass reads what was stored: at a kink the last bit decides
        let stored = |z: &[f64]| z.iter().map(|&z| crate::data::round(dtype, z)).collect();
        let saved = reference::Saved { pre_activation: stored(&z), shared_pre_activation: stored(&shared_z), ..saved };
        let more = (self.from != Origin::Routes).then_some(d_logits.as_floats());
        let (x_floats, d_y_floats) = (x.as_floats(), d_y.as_floats());
        let op =
            reference::LayerBackward { d_y: d_y_floats, d_logits: more, x: x_floats, source, saved: &saved, tokens };
        let d = reference::backward(c, &layer, &op);
        let written = found.permutation.offsets.last().copied().unwrap_or(0) as usize;

        // every step of the way is a sum in f32; what it may be off by is a part of the largest of its kind
        let inner = c.hidden + c.intermediate + c.top_k + c.experts + tokens * c.top_k;
        // a norm may lie in x's format before the experts read it
        let norms = if dtype == F32 { 0 } else { usize::from(c.gate.norm.is_some()) };
        let relative = tolerance::layer(inner, dtype, 0.0) + tolerance::stored_before(norms, dtype);
        let expected = |values: Vec<f64>| {
            let largest = values.iter().fold(0.0f64, |m, v| m.max(v.abs()));
            let errors = vec![relative * largest; values.len()];
            [values, errors]
        };
        let mut prepared = Prepared::default();
        let slots = [tokens, c.top_k];
        let pre_activation = Output::floats("pre_activation", dtype, [tokens * c.top_k, c.gate_up_rows()], expected(z));
        prepared.output(pre_activation.only(written));
        if let Some(normed) = found.normed {
            let [y, errors] = expected(found.y.clone());
            let rows = y.chunks_exact(c.hidden).zip(normed.chunks_exact(c.hidden)).zip(errors.chunks_exact(c.hidden));
            let errors = rows.flat_map(|((y, n), errors)| tolerance::normed(y, n, errors)).collect();
            prepared.output(Output::floats("normed", dtype, [tokens, c.hidden], [normed, errors]));
        }
        prepared.output(Output::floats("y", dtype, [tokens, c.hidden], expected(found.y)));
        if self.from != Origin::Routes {
            prepared.output(Output::ids("experts", slots, saved.experts));
            prepared.output(Output::floats("weights", F32, slots, expected(saved.weights)));
        }
        if let Some(shared) = c.shared {
            let shape = [tokens, shared.activation.gate_up_rows(shared.intermediate)];
            prepared.output(Output::floats("shared_z", dtype, shape, expected(shared_z)));
        }
        let (to, of_routes) = ((dtype, self.mode), (F32, self.mode));
        prepared.output(output("d_x", to, [tokens, c.hidden], expected(d.x)));
        prepared.output(output("d_weights", of_routes, slots, expected(d.weights)));
        if self.from != Origin::Routes {
            prepared.output(output("d_all_logits", of_routes, [tokens, c.experts], expected(d.logits)));
            prepared.input("d_logits", d_logits);
        }
        let s = d.shared;
        let part = |of: fn(&reference::SharedGradients) -> &Vec<f64>| s.as_ref().map_or(Vec::new(), |s| of(s).clone());
        for (name, tensor) in weights {
            let (gradient, values) = match name {
                "gate_up" => ("d_gate_up", d.gate_up.clone()),
                "down" => ("d_down", d.down.clone()),
                "router" => ("d_router", d.router.clone()),
                "router_norm" => ("d_router_norm", d.router_norm.clone()),
                "router_bias" => ("d_router_bias", d.router_bias.clone()),
                "expert_scale" => ("d_expert_scale", d.expert_scale.clone()),
                "gate_up_bias" => ("d_gate_up_bias", d.gate_up_bias.clone()),
                "down_bias" => ("d_down_bias", d.down_bias.clone()),
                "shared_gate_up" => ("d_shared_gate_up", part(|s| &s.gate_up)),
                "shared_down" => ("d_shared_down", part(|s| &s.down)),
                "shared_gate_up_bias" => ("d_shared_gate_up_bias", part(|s| &s.gate_up_bias)),
                "shared_down_bias" => ("d_shared_down_bias", part(|s| &s.down_bias)),
                _ => ("d_shared_gate", part(|s| &s.gate)),
            };
            let mut gradient = output(gradient, to, tensor.shape(), expected(values));
            gradient.contiguous = true;
            prepared.output(gradient).input(name, tensor);
        }
        prepared.input("x", x).input("d_y", d_y).input("logits", logits).input("ids", ids).input("given", given);
        prepared.input_if("correction_bias", correction_bias).input_if("table", table).input_if("token_ids", token_ids);
        prepared.input_if("residual", residual).input_if("next_weight", next_weight);
        prepared
    }

    fn call<B: BackendBackward>(
        &self,
        backend: &B,
        stream: &B::Stream,
        operands: Operands<'_, B>,
    ) -> Result<(), B::Error> {
        let layer = TrainingLayer::new(&self.config)?;
        let mut workspace = layer.workspace(backend, self.tokens)?;
        let mut operands = operands.shorten();
        let shared = match operands.input_if("shared_gate_up") {
            Some(gate_up) => Some(SharedParameters {
                gate_up,
                gate_up_bias: operands.input_if("shared_gate_up_bias"),
                down: operands.input("shared_down")?,
                down_bias: operands.input_if("shared_down_bias"),
                gate: operands.input_if("shared_gate"),
            }),
            None => None,
        };
        let parameters = LayerParameters {
            router: operands.input_if("router"),
            router_bias: operands.input_if("router_bias"),
            router_norm: operands.input_if("router_norm"),
            correction_bias: operands.input_if("correction_bias"),
            expert_scale: operands.input_if("expert_scale"),
            table: operands.input_if("table"),
            gate_up: operands.input("gate_up")?,
            gate_up_bias: operands.input_if("gate_up_bias"),
            down: operands.input("down")?,
            down_bias: operands.input_if("down_bias"),
            shared,
        };
        let mut pre_activation = operands.output("pre_activation")?;
        let mut shared_z = operands.output_if("shared_z");
        let mut routes = operands.output_if("experts").zip(operands.output_if("weights"));
        let (ids, given) = (operands.input("ids")?, operands.input("given")?);
        let (x, logits, y) = (operands.input("x")?, operands.input("logits")?, operands.output("y")?);
        let (next_weight, normed) = (operands.input_if("next_weight"), operands.output_if("normed"));
        let (d_y, d_logits) = (operands.input("d_y")?, operands.input_if("d_logits"));
        let source = match self.from {
            Origin::Router => Source::Router,
            Origin::Logits => Source::Logits(shorten::<B>(logits)),
            Origin::Routes => Source::Routes(Routing { experts: shorten::<B>(ids), weights: shorten::<B>(given) }),
        };
        let forward = ForwardSaving {
            x: shorten::<B>(x),
            parameters: &parameters,
            source,
            token_ids: operands.input_if("token_ids").map(shorten::<B>),
            residual: operands.input_if("residual").map(|residual| Residual::Of(shorten::<B>(residual))),
            norm: normed.map(|out| NextNorm {
                weight: next_weight.map(shorten::<B>),
                eps: NEXT_EPS,
                out: shorten_mut::<B>(out),
            }),
            pre_activation: reborrow::<B>(&mut pre_activation),
            shared_pre_activation: shared_z.as_mut().map(reborrow::<B>),
            routes: routes.as_mut().map(|(experts, weights)| RoutesOut {
                experts: reborrow::<B>(experts),
                weights: reborrow::<B>(weights),
            }),
            y: shorten_mut::<B>(y),
        };
        layer.forward(backend, stream, forward, &mut workspace)?;
        let mut to = |name: &str| {
            let Gradient { view, mode } = gradient(&mut operands, name, self.mode)?;
            Some(Gradient { view: shorten_mut::<B>(view), mode })
        };
        let gradients = LayerGradients {
            x: to("d_x"),
            weights: to("d_weights"),
            logits: to("d_all_logits"),
            router: to("d_router"),
            router_bias: to("d_router_bias"),
            router_norm: to("d_router_norm"),
            expert_scale: to("d_expert_scale"),
            gate_up: to("d_gate_up"),
            gate_up_bias: to("d_gate_up_bias"),
            down: to("d_down"),
            down_bias: to("d_down_bias"),
            shared: SharedGradients {
                gate_up: to("d_shared_gate_up"),
                gate_up_bias: to("d_shared_gate_up_bias"),
                down: to("d_shared_down"),
                down_bias: to("d_shared_down_bias"),
                gate: to("d_shared_gate"),
            },
        };
        let routing = match &routes {
            Some((experts, weights)) => Routing { experts: share::<B>(experts), weights: share::<B>(weights) },
            None => Routing { experts: shorten::<B>(ids), weights: shorten::<B>(given) },
        };
        let source = match self.from {
            Origin::Router => RoutesFrom::Router,
            Origin::Logits => RoutesFrom::Logits(shorten::<B>(logits)),
            Origin::Routes => RoutesFrom::Routes,
        };
        let backward = LayerBackward {
            d_y: shorten::<B>(d_y),
            d_logits: d_logits.map(shorten::<B>),
            x: shorten::<B>(x),
            parameters: &parameters,
            source,
            routing,
            pre_activation: share::<B>(&pre_activation),
            shared_pre_activation: shared_z.as_ref().map(share::<B>),
            gradients,
        };
        layer.backward(backend, stream, backward, &mut workspace)
    }
}

/// The cases of a layer that is trained.
pub(super) fn cases() -> Vec<BackwardCase> {
    let mut plain = LayerConfig { routed_scale: 1.5, ..LayerConfig::new(45, 26, 9, 3) };
    plain.routing.weights.normalize = Normalize::Sum { eps: 0.0 };
    let shared =
        SharedConfig { intermediate: 19, activation: Activation::Gated(Function::Silu), gated: true, scale: 0.7 };
    let gate = |feeds_experts, softcap| GateConfig {
        norm: Some(GateNorm { eps: 1e-5, feeds_experts }),
        softcap,
        ..GateConfig::default()
    };
    let scaled = RoutingRule {
        score: Score::Sigmoid,
        weights: WeightRule {
            expert_scale: Some(ExpertScale::AfterNormalize),
            normalize: Normalize::Sum { eps: 0.0 },
            scale: 2.5,
            ..WeightRule::default()
        },
        ..RoutingRule::default()
    };
    let swish = Activation::ClampedSwish { alpha: 1.702, limit: 1.5 };
    let softcapped = Activation::SoftcappedSilu { gate_cap: 1.5, up_cap: 0.75 };
    let up = Activation::Plain(Function::ReluSquared);
    let groups = Groups { count: 3, keep: 2, score: GroupScore::SumOfBestTwo, masked: Masked::NegInfinity };
    let top = |groups| Selection::TopK { by: SelectBy::Score, bias: true, groups };
    let selected = |selection| LayerConfig { routing: RoutingRule { selection, ..plain.routing }, ..plain.clone() };
    // rows in whole pieces of 16 bytes, without biases: what a backend may do in fewer launches
    let whole = |intermediate, activation| LayerConfig { intermediate, activation, ..plain.clone() };
    let layers = [
        ("plain", plain.clone(), false),
        ("whole pieces", whole(24, plain.activation), false),
        ("whole pieces long", whole(520, plain.activation), false),
        ("whole pieces swish", whole(24, swish), false),
        ("whole pieces softcapped", whole(24, softcapped), false),
        ("whole pieces without gate", whole(24, up), false),
        ("biases", LayerConfig { activation: swish, ..plain.clone() }, true),
        ("shared", LayerConfig { shared: Some(shared), ..plain.clone() }, true),
        (
            "shared ungated",
            LayerConfig { shared: Some(SharedConfig { gated: false, ..shared }), ..plain.clone() },
            false,
        ),
        ("norm feeds", LayerConfig { gate: gate(true, None), shared: Some(shared), ..plain.clone() }, false),
        ("norm", LayerConfig { gate: gate(false, Some(2.0)), ..plain.clone() }, true),
        ("on input", LayerConfig { weight_on: WeightOn::Input, shared: Some(shared), ..plain.clone() }, true),
        ("without gate", LayerConfig { activation: up, ..plain.clone() }, false),
        ("sigmoid scaled", LayerConfig { routing: scaled, ..plain.clone() }, false),
        ("always", LayerConfig { routing: RoutingRule { always: 1, ..scaled }, ..plain.clone() }, false),
        ("softcapped", LayerConfig { activation: softcapped, ..plain.clone() }, true),
        ("tail", plain.clone(), true),
        ("by token id", selected(Selection::Table), false),
        ("correction bias", selected(top(None)), false),
        ("groups", selected(top(Some(groups))), false),
    ];
    let mut cases = Vec::new();
    for (named, config, biases) in layers {
        let tail = named == "tail";
        for from in [Origin::Router, Origin::Logits, Origin::Routes] {
            for (added, mode) in MODES {
                for (dtype, tokens) in [(F32, 0), (F32, 1), (F32, 37), (DType::F16, 37), (DType::BF16, 37)] {
                    let name = format!("{added}{named} {from:?} T={tokens}");
                    let layer = Layer { tokens, dtype, config: config.clone(), from, biases, tail, mode };
                    let operation = BackwardOperation::Layer(Box::new(layer));
                    let (stage, dtype, placement) = (Stage::LayerBackward, dtype.to_string(), Default::default());
                    let case = BackwardCase { stage, name, dtype, placement, operation };
                    let strided = (named == "plain" || tail) && tokens == 37;
                    cases.extend(strided.then(|| case.clone().strided()));
                    cases.push(case);
                }
            }
        }
    }
    cases
}
