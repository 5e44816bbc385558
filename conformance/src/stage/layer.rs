//! The whole layer.

use super::choice::relative_error;
use super::combine::{ResidualPart, norm_errors};
use super::drop_overflow::Sequences;
use super::experts::{Experts, Weights};
use super::{Check, bound};
use crate::data::{Data, Spread, Tensor};
use crate::operands::{Operands, Output, Prepared};
use crate::tolerance;
use fused_moe_core::backend::reborrow;
use fused_moe_core::config::{CapacityOrder, LayerConfig, RoutingRule, Selection};
use fused_moe_core::operation::{Forward, NextNorm, Residual, RouterState, RoutesOut, Source};
use fused_moe_core::weights::{ExpertMatrices, LayerWeights, Matrix, Orientation, SharedWeights, Table};
use fused_moe_core::{Backend, DType, Error, Layer, NO_EXPERT, Numerics, Options, Routing, reference};
use std::borrow::Cow;
use std::ops::Range;

mod around;
mod cases;
mod parts;

use around::Routed;
pub use around::{Around, StateScale};
pub(crate) use cases::cases;

/// A case of a whole layer.
#[derive(Clone, Debug)]
pub struct LayerCase {
    /// T.
    pub tokens: usize,
    /// What the layer is.
    pub config: LayerConfig,
    /// Formats of x and the residual, of the weights, of the outputs.
    pub dtypes: [DType; 3],
    /// Where the routes come from.
    pub source: Origin,
    /// How the experts' matrices lie.
    pub weights: Weights,
    /// Whether the experts have biases.
    pub bias: bool,
    /// Whether the router has a bias.
    pub router_bias: bool,
    /// Whether the gate's norm has a weight.
    pub norm_weight: bool,
    /// What the result is added to.
    pub residual: ResidualPart,
    /// Whether the next norm is asked for, and whether it has a weight.
    pub norm: Option<bool>,
    /// Whether routes and counts are asked for.
    pub routes: bool,
    /// The experts that live here.
    pub local: Option<Range<usize>>,
    /// What results may depend on.
    pub numerics: Numerics,
    /// The first run takes tokens one by one, the second so many at once: both must give the same bits.
    pub batches: Option<usize>,
    /// What the parts around the experts come with.
    pub around: Around,
}

/// Where routes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// x.
    Router,
    /// Logits.
    Logits,
    /// Logits, NaN for every fourth token.
    BadLogits,
    /// Given routes.
    Routes(Spread),
}

const EPS: f32 = 0.02;
const VOCABULARY: usize = 11;
/// Keys of tokens that go through a whole layer lie at least this far apart.
const CLEAR: f64 = 2e-4;
/// How many sets of data are tried for that.
const ATTEMPTS: usize = 64;

impl LayerCase {
    /// From x, with routes and counts.
    pub fn new(tokens: usize, config: LayerConfig, dtypes: [DType; 3]) -> Self {
        Self {
            tokens,
            config,
            dtypes,
            source: Origin::Router,
            weights: Weights::packed(),
            bias: false,
            router_bias: false,
            norm_weight: false,
            residual: ResidualPart::None,
            norm: None,
            routes: true,
            local: None,
            numerics: Numerics::Fast,
            batches: None,
            around: Around::default(),
        }
    }

    fn experts(&self) -> Experts {
        Experts {
            sizes: [self.config.expert_width(), self.config.intermediate, self.config.experts],
            dtype: self.dtypes[1],
            activation: self.config.activation,
            weights: self.weights,
            bias: self.bias,
        }
    }

    /// Adds what is read, but for the experts and the routes' source.
    fn inputs(&self, data: Data, prepared: &mut Prepared) {
        let LayerConfig { hidden, top_k, .. } = self.config;
        let [x, weights, written] = self.dtypes;
        let (tokens, rule) = (self.tokens, self.config.routing);
        let (choices, width) = (self.config.choices(), self.config.router_width());
        prepared.input("x", data.of("x").tokens(x, [tokens, hidden]));
        let mut host = |name, tensor| prepared.host.push((name, tensor));
        host("router", data.of("router").normal(weights, [choices, width], 1.5 / (width as f64).sqrt()));
        if self.router_bias {
            host("router_bias", data.of("router_bias").normal(weights, [choices], 0.5));
        }
        if self.norm_weight {
            host("router_norm", data.of("router_norm").between(weights, [width], 0.5, 1.5));
        }
        if matches!(rule.selection, Selection::TopK { bias: true, .. }) {
            let competing = choices - rule.always;
            host("correction_bias", data.of("correction_bias").normal(DType::F32, [competing], 0.3));
        }
        if rule.weights.expert_scale.is_some() {
            host("expert_scale", data.of("expert_scale").between(weights, [choices], 0.5, 2.0));
        }
        if rule.selection == Selection::Table {
            host("table", data.of("table").routes([VOCABULARY, top_k, choices], Spread::Even));
        }
        if let Some(shared) = self.config.shared {
            let width = shared.intermediate;
            let rows = shared.activation.gate_up_rows(width);
            let scale = |inner: usize| 1.3 / (inner as f64).sqrt();
            host("shared_gate_up", data.of("shared_gate_up").normal(weights, [rows, hidden], scale(hidden)));
            host("shared_down", data.of("shared_down").normal(weights, [hidden, width], scale(width)));
            if self.bias {
                host("shared_gate_up_bias", data.of("shared_gate_up_bias").normal(weights, [rows], 0.4));
                host("shared_down_bias", data.of("shared_down_bias").normal(weights, [hidden], 0.4));
            }
            if shared.gated {
                host("shared_gate", data.of("shared_gate").normal(weights, [hidden], scale(hidden)));
            }
        }
        if self.residual == ResidualPart::InPlace {
            host("residual", data.of("residual").tokens(written, [tokens, hidden]));
        }
        if self.residual == ResidualPart::Of {
            prepared.input("residual", data.of("residual").tokens(x, [tokens, hidden]));
        }
        if self.norm == Some(true) {
            prepared.input("norm_weight", data.of("norm_weight").between(weights, [hidden], 0.5, 1.5));
        }
        if self.by_token_id() {
            let ids = data.of("token_ids");
            let ids = (0..tokens).map(|t| ids.below(t as u64, VOCABULARY) as u32).collect();
            prepared.input("token_ids", Tensor::ids([tokens], ids));
        }
        self.around_inputs(data, prepared);
    }

    fn by_token_id(&self) -> bool {
        self.config.routing.selection == Selection::Table && !matches!(self.source, Origin::Routes(_))
    }

    /// The reference's weights, but for the experts' own.
    fn reference<'a>(
        &self,
        prepared: &'a Prepared,
        canonical: &'a [(&'static str, Option<Tensor>); 4],
    ) -> reference::Layer<'a> {
        let [gate_up, down, gate_up_bias, down_bias] =
            canonical.each_ref().map(|(_, t)| t.as_ref().map(Tensor::as_floats));
        reference::Layer {
            router: prepared.floats("router"),
            router_bias: prepared.floats_if("router_bias"),
            router_norm: prepared.floats_if("router_norm"),
            correction_bias: prepared.floats_if("correction_bias"),
            expert_scale: prepared.floats_if("expert_scale"),
            table: (self.config.routing.selection == Selection::Table).then(|| prepared.ids("table")),
            gate_up: gate_up.unwrap_or_default(),
            gate_up_bias,
            down: down.unwrap_or_default(),
            down_bias,
            shared: self.config.shared.map(|_| reference::SharedExpert {
                gate_up: prepared.floats("shared_gate_up"),
                gate_up_bias: prepared.floats_if("shared_gate_up_bias"),
                down: prepared.floats("shared_down"),
                down_bias: prepared.floats_if("shared_down_bias"),
                gate: prepared.floats_if("shared_gate"),
            }),
            ..self.around_reference(prepared)
        }
    }

    /// What goes into the layer.
    fn reference_input<'a>(&self, prepared: &'a Prepared) -> reference::Input<'a> {
        let eps = f64::from(EPS);
        reference::Input {
            x: prepared.floats("x"),
            token_ids: self.by_token_id().then(|| prepared.ids("token_ids")),
            sequences: (self.around.sequences != Sequences::Absent).then(|| prepared.ids("sequences")),
            router_state: prepared.floats_if("previous"),
            residual: prepared.floats_if("residual"),
            norm: self.norm.map(|_| reference::Norm { weight: prepared.floats_if("norm_weight"), eps }),
            tokens: self.tokens,
        }
    }

    /// The logits.
    fn logits(&self, data: Data, prepared: &mut Prepared) -> Routed {
        let choices = self.config.choices();
        if self.source == Origin::Router {
            let none = Default::default();
            let layer = self.reference(prepared, &none);
            return Routed::of(&self.config, &layer, &self.reference_input(prepared));
        }
        let mut logits = data.of("logits").normal(self.dtypes[0], [self.tokens, choices], 1.5);
        if self.source == Origin::BadLogits {
            let values: Vec<f64> = logits.as_floats().to_vec();
            let bad = |i: usize| i / choices % 4 == 1;
            let values = values.iter().enumerate().map(|(i, &l)| if bad(i) { f64::NAN } else { l });
            logits = Tensor::floats(self.dtypes[0], [self.tokens, choices], values.collect::<Vec<_>>());
        }
        let values = logits.as_floats().to_vec();
        let errors = vec![0.0; values.len()];
        if !matches!(self.source, Origin::Routes(_)) {
            prepared.input("logits", logits);
        }
        Routed { logits: [values, errors], state: None }
    }

    /// Whether every choice among the logits is clear, in the order of the choice too, and which tokens come first.
    fn is_clear(&self, [logits, errors]: &[Vec<f64>; 2], layer: &reference::Layer<'_>) -> bool {
        let (experts, top_k, rule) = (self.config.choices(), self.config.top_k, self.config.routing);
        let (correction_bias, tokens) = (layer.correction_bias, self.tokens);
        let clear = errors.iter().fold(CLEAR, |clear, error| clear.max(2.0 * error));
        let route = |rule, top_k, correction_bias| {
            let (expert_scale, table) = (None, None);
            let op = reference::Route { rule, correction_bias, expert_scale, table, tokens, experts, top_k };
            reference::route(logits, &op)
        };
        let chosen = matches!(rule.selection, Selection::Table)
            || self.source != Origin::Router
            || (rule.always + 1..=top_k).all(|top_k| {
                let mut witness = route(rule, top_k, correction_bias).witness.into_iter();
                witness.all(|w| w.next.key == f64::NEG_INFINITY || w.last.key - w.next.key > clear)
            });
        let by_score = self.config.capacity.is_some_and(|capacity| capacity.order == CapacityOrder::Score);
        if !by_score || matches!(self.source, Origin::Routes(_)) {
            return chosen;
        }
        let mut importance = route(RoutingRule::default(), 1, None).weights;
        importance.retain(|x| x.is_finite());
        importance.sort_by(f64::total_cmp);
        chosen
            && importance
                .windows(2)
                .all(|pair| pair[1] - pair[0] > tolerance::near_tie(self.relative([logits, errors]), pair[1]))
    }

    /// What a routing weight may be off by, as a part of it.
    fn relative(&self, [logits, errors]: [&[f64]; 2]) -> f64 {
        let rows = logits.chunks(self.config.choices()).zip(errors.chunks(self.config.choices()));
        rows.map(|(logits, errors)| relative_error(logits, errors)).fold(0.0, f64::max)
    }
}

impl Check for LayerCase {
    fn prepare(&self) -> Prepared {
        let LayerConfig { hidden, experts, top_k, .. } = self.config;
        let tokens = self.tokens;
        let named = |attempt: usize| Data::new("layer").of(&format!("{tokens} {hidden} {experts} {attempt}"));
        let mut attempt = 0;
        let (mut prepared, Routed { logits: [logits, logit_errors], state }) = loop {
            let (mut prepared, none) = (Prepared::default(), Default::default());
            self.inputs(named(attempt), &mut prepared);
            let routed = self.logits(named(attempt), &mut prepared);
            if attempt == ATTEMPTS || self.is_clear(&routed.logits, &self.reference(&prepared, &none)) {
                break (prepared, routed);
            }
            attempt += 1;
        };
        let data = named(attempt);
        self.experts().host(data, &mut prepared);
        let canonical = self.experts().canonical(data);
        let layer = self.reference(&prepared, &canonical);
        let input = self.reference_input(&prepared);
        let given = match self.source {
            Origin::Routes(spread) => {
                let ids = data.of("routes").routes([tokens, top_k, self.config.choices()], spread);
                Some((ids, data.of("weights").between(DType::F32, [tokens, top_k], 0.05, 0.9)))
            }
            _ => None,
        };
        let mut output = match &given {
            Some((ids, weights)) => {
                reference::forward_from_routes(&self.config, &layer, &input, ids.as_ids(), weights.as_floats())
            }
            None if self.source == Origin::Router => reference::forward(&self.config, &layer, &input),
            None => reference::forward_from_logits(&self.config, &layer, &input, &logits),
        };
        let (routes, router_state) = (output.routes.clone(), output.router_state.take());
        if let Some(local) = &self.local {
            // of several devices with some experts each, the one with the last has those without weights too
            let end = if local.contains(&(experts - 1)) { self.config.choices() } else { local.end };
            let here = |&id: &u32| {
                let elsewhere = (id as usize) < self.config.choices() && !(local.start..end).contains(&(id as usize));
                if elsewhere { NO_EXPERT } else { id }
            };
            let ids: Vec<u32> = routes.experts.iter().map(here).collect();
            let status = output.status;
            output = reference::forward_from_routes(&self.config, &layer, &input, &ids, &routes.weights);
            output.status |= status;
        }
        let relative = match (&given, self.config.capacity.and_then(|capacity| capacity.renormalize)) {
            (Some(_), _) => 0.0,
            (None, None) => self.relative([&logits, &logit_errors]),
            // divided by a sum of such weights
            (None, Some(_)) => 2.0 * self.relative([&logits, &logit_errors]) + tolerance::sum(top_k, 1.0),
        };
        let (latent, norms) = (self.config.latent, self.config.norms);
        let inner = hidden + self.config.intermediate + top_k + self.config.shared.map_or(0, |s| s.intermediate);
        let before = [latent.is_some(), norms.experts_in.is_some(), norms.shared_in.is_some()];
        let before = before.into_iter().filter(|&stored| stored).count();
        let part = tolerance::layer(inner + latent.unwrap_or(0), self.dtypes[0], relative);
        let part = part + tolerance::stored_before(before, self.dtypes[0]);
        let errors = bound::of(&self.config, &layer, &input, &output, part);
        let weight_errors = routes.weights.iter().map(|w| relative * w.abs()).collect();
        let mut counts = output.permutation.counts();
        counts.truncate(experts);
        let normed = output.normed.map(|normed| {
            let errors = norm_errors(&output.y, &normed, &errors, hidden);
            Output::floats("normed", self.dtypes[2], [tokens, hidden], [normed, errors])
        });
        let mut y = Output::floats("y", self.dtypes[2], [tokens, hidden], [output.y, errors]);
        prepared.status = output.status;
        if self.residual == ResidualPart::InPlace {
            let at = prepared.host.iter().position(|(name, _)| *name == "residual");
            y.initial = at.map(|at| prepared.host.remove(at).1);
        }
        prepared.output(y).outputs.extend(normed);
        if let (Some(values), Some([_, errors]), true) = (router_state, state, self.around.next) {
            let width = self.config.router_width();
            prepared.output(Output::floats("next", DType::F32, [tokens, width], [values, errors]));
        }
        if self.routes {
            prepared
                .output(Output::ids("experts", [tokens, top_k], routes.experts))
                .output(Output::floats("weights", DType::F32, [tokens, top_k], [routes.weights, weight_errors]))
                .output(Output::ids("counts", [experts], counts));
        }
        if let Some((ids, weights)) = given {
            prepared.input("given_experts", ids).input("given_weights", weights);
        }
        prepared
    }

    fn call<B: Backend>(&self, backend: &B, stream: &B::Stream, mut operands: Operands<'_, B>) -> Result<(), B::Error> {
        let options = Options { numerics: self.numerics, local_experts: self.local.clone() };
        let layer = backend.prepare(&self.config, &self.layer_weights(&operands)?, &options)?;
        // the second run takes a workspace that is too large, the first one of foreign memory that is not zero
        let mut workspace = if operands.attempt == 0 {
            let bytes = layer.workspace_bytes(self.tokens)?;
            let mut memory = backend.allocate(bytes)?;
            backend.upload(&vec![0xff; bytes], &mut memory)?;
            layer.workspace_in(memory, self.tokens)?
        } else {
            layer.workspace(self.tokens + 3)?
        };
        if let Some(size) = self.batches {
            let size = if operands.attempt == 0 { 1 } else { size };
            let (x, mut y) = (operands.input("x")?, operands.output("y")?);
            for first in (0..self.tokens).step_by(size) {
                let count = size.min(self.tokens - first);
                let y = reborrow::<B>(&mut y).row_range(first, count)?;
                layer.forward(stream, x.row_range(first, count)?, y, &mut workspace)?;
            }
            return Ok(());
        }
        let call = Forward {
            x: operands.input("x")?,
            source: match self.source {
                Origin::Router => Source::Router,
                Origin::Logits | Origin::BadLogits => Source::Logits(operands.input("logits")?),
                Origin::Routes(_) => Source::Routes(Routing {
                    experts: operands.input("given_experts")?,
                    weights: operands.input("given_weights")?,
                }),
            },
            token_ids: operands.input_if("token_ids"),
            sequences: operands.input_if("sequences"),
            router_state: RouterState { previous: operands.input_if("previous"), next: operands.output_if("next") },
            residual: match self.residual {
                ResidualPart::None => None,
                ResidualPart::Of => Some(Residual::Of(operands.input("residual")?)),
                ResidualPart::InPlace => Some(Residual::InPlace),
            },
            norm: match operands.output_if("normed") {
                Some(out) => Some(NextNorm { weight: operands.input_if("norm_weight"), eps: EPS, out }),
                None => None,
            },
            routes: match (operands.output_if("experts"), operands.output_if("weights")) {
                (Some(experts), Some(weights)) => Some(RoutesOut { experts, weights }),
                _ => None,
            },
            counts: operands.output_if("counts"),
            y: operands.output("y")?,
        };
        layer.run(stream, call, &mut workspace)
    }
}

impl LayerCase {
    fn layer_weights<'a, B: Backend>(&self, operands: &Operands<'a, B>) -> Result<LayerWeights<'a>, Error> {
        let view = |name| operands.host_if(name).map(Tensor::view).transpose();
        let shared = match self.config.shared {
            None => None,
            Some(shared) => {
                let (gate_up, width) = (operands.host("shared_gate_up")?.view()?, shared.intermediate);
                let gated = shared.activation.gate_up_rows(width) - width;
                let of = |view| Matrix::new(view, Orientation::OutIn);
                let gate = (gated > 0).then(|| of(gate_up.row_range(0, gated)?)).transpose()?;
                let down = of(operands.host("shared_down")?.view()?)?;
                let mut matrices = ExpertMatrices::new(gate, of(gate_up.row_range(gated, width)?)?, down);
                if let Some(bias) = view("shared_gate_up_bias")? {
                    matrices.gate_bias = (gated > 0).then(|| of(bias.columns(0, gated)?)).transpose()?;
                    matrices.up_bias = Some(of(bias.columns(gated, width)?)?);
                }
                matrices.down_bias = view("shared_down_bias")?.map(of).transpose()?;
                Some(SharedWeights { matrices, gate: view("shared_gate")? })
            }
        };
        let table = operands.host_if("table");
        let (latent, norms, router_mlp) = self.around_weights(operands)?;
        Ok(LayerWeights {
            router: view("router")?,
            router_bias: view("router_bias")?,
            router_norm: view("router_norm")?,
            correction_bias: view("correction_bias")?,
            expert_scale: view("expert_scale")?,
            table: table.map(|table| Table { experts: Cow::Borrowed(table.as_ids()), vocabulary: VOCABULARY }),
            experts: self.experts().of_host(operands)?,
            shared,
            latent,
            norms,
            router_mlp,
        })
    }
}
