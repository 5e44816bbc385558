use super::routes::{BIAS_REASONS, SCALE_REASONS, TABLE_REASONS};
use super::rows::tail;
use super::{Check, MAX_EXPERTS};
use crate::backend::{Backend, Options};
use crate::config::{Activation, LayerConfig, Selection, ZeroOutput};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::operation::{Forward, Source};
use crate::tensor::Shape;
use crate::weights::{ExpertMatrices, ExpertWeights, LayerWeights, Matrix};
use std::ops::Range;

/// A checked layer: description and weights fit each other.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerProblem {
    /// The description.
    pub config: LayerConfig,
    /// The part of it that the stages from router to combine compute: all of it, unless there are surroundings.
    pub core: LayerConfig,
    /// Format of the gate_up matrices.
    pub gate_up: DType,
    /// Format of the down matrices.
    pub down: DType,
    /// Format of the router, if there is one.
    pub router: Option<DType>,
    /// Formats of the shared expert's gate_up and down, if there is one.
    pub shared: Option<[DType; 2]>,
    /// The experts that live here.
    pub local: Range<usize>,
}

/// A checked call of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForwardProblem {
    /// T.
    pub tokens: usize,
    /// Format of x.
    pub x: DType,
    /// Format of y.
    pub y: DType,
}

impl LayerProblem {
    /// Checks a description, its weights and the options.
    pub fn new(config: &LayerConfig, weights: &LayerWeights<'_>, options: &Options) -> Result<Self> {
        let check = Check("layer");
        check.config(config)?;
        let (hidden, experts, choices) = (config.hidden, config.experts, config.choices());
        let router = match &weights.router {
            Some(view) => {
                check.shape("router", view, "[E, H]", [choices, config.router_width()])?;
                Some(check.float("router", view)?)
            }
            None => None,
        };
        let competing = choices - config.routing.always;
        check.optional_vector("router_bias", &weights.router_bias, "[E]", choices)?;
        check.optional_vector("router_norm", &weights.router_norm, "[H]", config.router_width())?;
        check.optional_vector("correction_bias", &weights.correction_bias, "[E]", competing)?;
        check.optional_vector("expert_scale", &weights.expert_scale, "[E]", choices)?;
        if router.is_none() {
            check.absent("router_bias", &weights.router_bias, "the layer has no router")?;
        }
        if config.gate.norm.is_none() {
            check.absent("router_norm", &weights.router_norm, "the gate has no norm")?;
        }
        let biased = matches!(config.routing.selection, Selection::TopK { bias: true, .. });
        check.matches("correction_bias", &weights.correction_bias, biased, BIAS_REASONS)?;
        let scaled = config.routing.weights.expert_scale.is_some();
        check.matches("expert_scale", &weights.expert_scale, scaled, SCALE_REASONS)?;
        check.matches("table", &weights.table, config.routing.selection == Selection::Table, TABLE_REASONS)?;
        if let Some(table) = &weights.table {
            let entries = table.vocabulary.saturating_mul(config.top_k);
            check.value(table.experts.len() == entries, "table.experts", "[V, K]", table.experts.len())?;
        }
        let local = options.local_experts.clone().unwrap_or(0..experts);
        check.value(
            local.start <= local.end && local.end <= experts,
            "local_experts",
            "a range within 0..E",
            format_args!("{}..{}", local.start, local.end),
        )?;
        check.value(
            weights.experts.len() == experts,
            "experts",
            "matrices for every one of the E experts",
            format_args!("{} of {experts}", weights.experts.len()),
        )?;
        let [gate_up, down] =
            experts_formats(check, &weights.experts, [config.intermediate, config.expert_width()], config.activation)?;
        let shared = match (&config.shared, &weights.shared) {
            (None, None) => None,
            (config, weights) => {
                let config = check.present("shared", config.as_ref(), "weights of a shared expert are given")?;
                let weights = check.present("shared", weights.as_ref(), "the layer has a shared expert")?;
                check.matches("shared.gate", &weights.gate, config.gated, GATED_REASONS)?;
                check.optional_vector("shared.gate", &weights.gate, "[H]", hidden)?;
                let sizes = [config.intermediate, hidden];
                Some(expert_formats(check, &weights.matrices, sizes, config.activation, &SHARED)?)
            }
        };
        check.around_weights(config, weights, options)?;
        Ok(Self { config: config.clone(), core: config.core(), gate_up, down, router, shared, local })
    }

    /// Whether experts that copy the token are here: with the last of the others.
    pub fn has_copies(&self) -> bool {
        let copy = self.config.zero_experts.is_some_and(|zero| zero.output == ZeroOutput::Copy);
        copy && self.local.contains(&(self.config.experts - 1))
    }

    /// Whether every slot of a call that brings no routes is sure to have an expert that is here: the slots of a single
    /// token need no permutation then.
    pub fn slots_are_rows(&self) -> bool {
        let config = &self.config;
        let chosen = config.routing.selection != Selection::Table && config.capacity.is_none();
        chosen && config.zero_experts.is_none() && self.local == (0..config.experts)
    }

    /// Checks one call.
    pub fn forward<B: Backend>(&self, call: &Forward<'_, B>) -> Result<ForwardProblem> {
        let check = Check("forward");
        let config = &self.config;
        let tokens = call.x.rows();
        check.slots(tokens, config.top_k)?;
        let x = check.float("x", &call.x)?;
        check.rows("x", &call.x, "[T, H]", [tokens, config.hidden])?;
        let y = check.float("y", &call.y)?;
        check.rows("y", &call.y, "[T, H]", [tokens, config.hidden])?;
        match &call.source {
            Source::Router => {
                check.present("router", self.router, "the routes come from the layer's router")?;
            }
            Source::Logits(logits) => {
                check.float("source.logits", logits)?;
                check.rows("source.logits", logits, "[T, E]", [tokens, config.choices()])?;
            }
            Source::Routes(routing) => {
                let views = (&routing.experts, &routing.weights);
                check.routes(["source.experts", "source.weights"], views, [tokens, config.top_k])?;
            }
        }
        let by_id = config.routing.selection == Selection::Table && !matches!(call.source, Source::Routes(_));
        check.matches("token_ids", &call.token_ids, by_id, TABLE_REASONS)?;
        if let Some(ids) = &call.token_ids {
            check.only("token_ids", ids, DType::U32)?;
            check.shape("token_ids", ids, "[T]", [tokens])?;
        }
        if let Some(sequences) = &call.sequences {
            check.present("capacity", config.capacity, "sequences are given")?;
            check.sequences(sequences)?;
        }
        self.router_state(check, call, tokens)?;
        tail(check, call.residual.as_ref(), call.norm.as_ref(), [tokens, config.hidden])?;
        if let Some(routes) = &call.routes {
            let views = (&routes.experts, &routes.weights);
            check.routes(["routes.experts", "routes.weights"], views, [tokens, config.top_k])?;
        }
        if let Some(counts) = &call.counts {
            check.only("counts", counts, DType::U32)?;
            check.shape("counts", counts, "[E]", [config.experts])?;
        }
        Ok(ForwardProblem { tokens, x, y })
    }

    fn router_state<B: Backend>(&self, check: Check, call: &Forward<'_, B>, tokens: usize) -> Result<()> {
        let mlp = self.config.router_mlp.filter(|_| matches!(call.source, Source::Router));
        let (previous, next) = (&call.router_state.previous, &call.router_state.next);
        let Some(mlp) = mlp else {
            let reason = "no router of several layers runs in this call";
            check.absent("router_state.previous", previous, reason)?;
            return check.absent("router_state.next", next, reason);
        };
        if let Some(previous) = previous {
            check.only("router_state.previous", previous, DType::F32)?;
            check.rows("router_state.previous", previous, "[T, M]", [tokens, mlp.width])?;
        }
        if let Some(next) = next {
            check.only("router_state.next", next, DType::F32)?;
            check.rows("router_state.next", next, "[T, M]", [tokens, mlp.width])?;
        }
        Ok(())
    }
}

/// The sum of the sizes of a workspace's buffers.
///
/// Errors: `Value` when one of them, or the sum, is no number of bytes.
pub fn workspace_bytes(buffers: Option<impl IntoIterator<Item = usize>>, tokens: usize) -> Result<usize> {
    let total = buffers.and_then(|bytes| bytes.into_iter().try_fold(0usize, usize::checked_add));
    total.ok_or_else(|| Error::Value {
        operation: "workspace",
        parameter: "max_tokens",
        expected: "as many tokens as the address space has room for",
        actual: tokens.to_string(),
    })
}

impl ExpertWeights<'_> {
    /// Checks that the experts fit each other and an activation; returns `[E, I, H]`.
    ///
    /// Errors: `Value` for a size out of range, `Expert` for the first expert that does not fit.
    pub fn problem(&self, activation: Activation) -> Result<Shape> {
        let check = Check("experts");
        check.value((1..=MAX_EXPERTS).contains(&self.len()), "E", "1 to 4096 experts", self.len())?;
        let sizes = self.iter().next().map_or([0, 0], |expert| [expert.up.rows(), expert.up.cols()]);
        check.value(sizes[0] > 0 && sizes[1] > 0, "up", "sizes above zero", Shape::from(sizes))?;
        experts_formats(check, self, sizes, activation)?;
        Ok(Shape::from([self.len(), sizes[0], sizes[1]]))
    }
}

/// The formats of gate_up and down, the same for all experts.
fn experts_formats(
    check: Check,
    experts: &ExpertWeights<'_>,
    sizes: [usize; 2],
    activation: Activation,
) -> Result<[DType; 2]> {
    let mut formats = None;
    for (index, expert) in experts.iter().enumerate() {
        let of_expert = |error| Error::Expert { expert: index, error: Box::new(error) };
        let found = expert_formats(check, expert, sizes, activation, &ROUTED).map_err(of_expert)?;
        let first = *formats.get_or_insert(found);
        check
            .value(
                found == first,
                "experts",
                "one format for all experts",
                format_args!("{} and {}, {} and {}", first[0], first[1], found[0], found[1]),
            )
            .map_err(of_expert)?;
    }
    check.present("experts", formats, "a layer has at least one")
}

/// Names of gate, up, down and their biases.
type Names = [&'static str; 6];

const ROUTED: Names = ["gate", "up", "down", "gate_bias", "up_bias", "down_bias"];
const SHARED: Names = [
    "shared.matrices.gate",
    "shared.matrices.up",
    "shared.matrices.down",
    "shared.matrices.gate_bias",
    "shared.matrices.up_bias",
    "shared.matrices.down_bias",
];

/// The formats of one expert's gate_up and down.
fn expert_formats(
    check: Check,
    expert: &ExpertMatrices<'_>,
    [intermediate, hidden]: [usize; 2],
    activation: Activation,
    names: &Names,
) -> Result<[DType; 2]> {
    let matrix = |operand, matrix: &Matrix<'_>, layout, dims: [usize; 2]| -> Result<DType> {
        if !matrix.dtype().is_float() {
            return check.dtype(operand, matrix.dtype(), "f32, f16 or bf16");
        }
        if matrix.shape() == Shape::from(dims) {
            return Ok(matrix.dtype());
        }
        Err(Error::Shape { operation: check.0, operand, layout, expected: dims.into(), actual: matrix.shape() })
    };
    let &[gate_name, up_name, down_name, gate_bias, up_bias, down_bias] = names;
    check.matches(gate_name, &expert.gate, activation.is_gated(), GATE_REASONS)?;
    let up = matrix(up_name, &expert.up, "[I, H]", [intermediate, hidden])?;
    if let Some(gate) = &expert.gate {
        let format = matrix(gate_name, gate, "[I, H]", [intermediate, hidden])?;
        check.value(format == up, gate_name, "the format of up", format)?;
    }
    let down = matrix(down_name, &expert.down, "[H, I]", [hidden, intermediate])?;
    if !activation.is_gated() {
        check.absent(gate_bias, &expert.gate_bias, GATE_REASONS[1])?;
    }
    for (operand, bias, layout, n) in [
        (gate_bias, &expert.gate_bias, "[I, 1]", intermediate),
        (up_bias, &expert.up_bias, "[I, 1]", intermediate),
        (down_bias, &expert.down_bias, "[H, 1]", hidden),
    ] {
        if let Some(bias) = bias {
            matrix(operand, bias, layout, [n, 1])?;
        }
    }
    Ok([up, down])
}

pub(super) const GATED_REASONS: [&str; 2] = ["the shared expert is gated", "the shared expert is not gated"];
pub(super) const GATE_REASONS: [&str; 2] = ["the activation is gated", "the activation has no gate"];
