//! The only validation: operands to a Problem, the sizes and formats a backend plans from.
//!
//! Each struct of operands has a method `problem` that checks it; a Problem holds no memory, so that a plan can be made
//! and tested without a device.

mod around;
mod backward;
mod expert_loop;
mod experts;
mod layer;
mod layer_backward;
mod routes;
mod routes_backward;
mod rows;

pub use backward::{ActivationBackwardProblem, CombineBackwardProblem, GroupedBackwardProblem};
pub use expert_loop::ExpertLoopProblem;
pub use experts::{ActivationProblem, Arrangement, DownProblem, GateUpProblem, LinearProblem};
pub use layer::{ForwardProblem, LayerProblem, workspace_bytes};
pub use routes::{ChoiceProblem, DropOverflowProblem, GateProblem, GatherWeightsProblem, PermuteProblem};
pub use routes_backward::{GateBackwardProblem, LossProblem, NormBackwardProblem, RouteBackwardProblem};
pub use rows::{AccumulateProblem, CombineProblem, ZeroProblem};

use crate::config::{Activation, LayerConfig, Normalize, RoutingRule, Selection};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::{Shape, View};

/// The largest E.
pub const MAX_EXPERTS: usize = 4096;

/// Names of the numbers in an operand `activation`.
const ACTIVATION: [&str; 4] = ["activation.limit", "activation.alpha", "activation.gate_cap", "activation.up_cap"];
const SHARED_ACTIVATION: [&str; 4] =
    ["shared.activation.limit", "shared.activation.alpha", "shared.activation.gate_cap", "shared.activation.up_cap"];

/// Checks of one operation's operands; every error names the operation and the operand.
#[derive(Clone, Copy)]
struct Check(&'static str);

impl Check {
    fn shape<S>(
        self,
        operand: &'static str,
        view: &View<S>,
        layout: &'static str,
        dims: impl Into<Shape>,
    ) -> Result<()> {
        let expected = dims.into();
        if view.shape() == expected {
            return Ok(());
        }
        Err(Error::Shape { operation: self.0, operand, layout, expected, actual: view.shape() })
    }

    /// Any leading dimensions, as long as rows and columns come out right.
    fn rows<S>(self, operand: &'static str, view: &View<S>, layout: &'static str, dims: [usize; 2]) -> Result<()> {
        if [view.rows(), view.cols()] == dims {
            return Ok(());
        }
        self.shape(operand, view, layout, dims)
    }

    fn float<S>(self, operand: &'static str, view: &View<S>) -> Result<DType> {
        if view.dtype().is_float() {
            return Ok(view.dtype());
        }
        self.dtype(operand, view.dtype(), "f32, f16 or bf16")
    }

    fn only<S>(self, operand: &'static str, view: &View<S>, dtype: DType) -> Result<()> {
        if view.dtype() == dtype { Ok(()) } else { self.dtype(operand, view.dtype(), dtype.name()) }
    }

    fn dtype<T>(self, operand: &'static str, actual: DType, expected: &'static str) -> Result<T> {
        Err(Error::DType { operation: self.0, operand, expected, actual })
    }

    /// A vector `[n]`, or `[1, n]`.
    fn vector<S>(self, operand: &'static str, view: &View<S>, layout: &'static str, n: usize) -> Result<()> {
        self.float(operand, view)?;
        if view.rows() == 1 && view.cols() == n {
            return Ok(());
        }
        self.shape(operand, view, layout, [n])
    }

    /// One float a token: `[T]`, or `[T, 1]`.
    fn column<S>(self, operand: &'static str, view: &View<S>, layout: &'static str, n: usize) -> Result<()> {
        self.float(operand, view)?;
        if view.shape().dims() == [n, 1] {
            return Ok(());
        }
        self.shape(operand, view, layout, [n])
    }

    /// `actual` becomes a string only where there is an error: a check that passes allocates nothing.
    fn value(self, ok: bool, parameter: &'static str, expected: &'static str, actual: impl ToString) -> Result<()> {
        if ok {
            return Ok(());
        }
        Err(Error::Value { operation: self.0, parameter, expected, actual: actual.to_string() })
    }

    fn present<T>(self, operand: &'static str, given: Option<T>, reason: &'static str) -> Result<T> {
        given.ok_or(Error::Missing { operation: self.0, operand, reason })
    }

    fn absent<T>(self, operand: &'static str, given: &Option<T>, reason: &'static str) -> Result<()> {
        if given.is_none() {
            return Ok(());
        }
        Err(Error::Unexpected { operation: self.0, operand, reason })
    }

    /// Present exactly where the rule asks for it.
    fn matches<T>(
        self,
        operand: &'static str,
        given: &Option<T>,
        wanted: bool,
        reasons: [&'static str; 2],
    ) -> Result<()> {
        match (wanted, given) {
            (true, None) => Err(Error::Missing { operation: self.0, operand, reason: reasons[0] }),
            (false, Some(_)) => Err(Error::Unexpected { operation: self.0, operand, reason: reasons[1] }),
            _ => Ok(()),
        }
    }

    /// `tokens * top_k` slots, numbered by u32 with two numbers to spare.
    fn slots(self, tokens: usize, top_k: usize) -> Result<usize> {
        match tokens.checked_mul(top_k).filter(|&slots| slots < u32::MAX as usize - 1) {
            Some(slots) => Ok(slots),
            None => Err(Error::Value {
                operation: self.0,
                parameter: "T * K",
                expected: "fewer than 2^32 - 2 slots",
                actual: format!("{tokens} * {top_k}"),
            }),
        }
    }

    fn finite(self, parameter: &'static str, x: f32) -> Result<()> {
        self.value(x.is_finite(), parameter, "a finite number", x)
    }

    fn positive(self, parameter: &'static str, x: f32) -> Result<()> {
        self.value(x.is_finite() && x > 0.0, parameter, "a positive number", x)
    }

    fn not_negative(self, parameter: &'static str, x: f32) -> Result<()> {
        self.value(x.is_finite() && x >= 0.0, parameter, "a number not below zero", x)
    }

    fn experts(self, experts: usize, top_k: usize) -> Result<()> {
        self.value((1..=MAX_EXPERTS).contains(&experts), "E", "1 to 4096 experts", experts)?;
        self.value((1..=experts).contains(&top_k), "K", "1 <= K <= E", format_args!("K = {top_k}, E = {experts}"))
    }

    /// Whether a rule makes sense for E experts and K choices.
    fn rule(self, rule: &RoutingRule, experts: usize, top_k: usize) -> Result<()> {
        self.experts(experts, top_k)?;
        let top = matches!(rule.selection, Selection::TopK { .. });
        self.value(rule.always == 0 || top, "always", "0 but for top-K selection", rule.always)?;
        self.value(rule.always < top_k, "always", "fewer than K", format_args!("{} of {top_k}", rule.always))?;
        let (experts, top_k) = (experts - rule.always, top_k - rule.always);
        match rule.selection {
            Selection::TopK { groups: Some(groups), .. } => {
                let divides = groups.count > 0 && experts.is_multiple_of(groups.count);
                self.value(
                    divides,
                    "groups.count",
                    "a divisor of E (less those that are always chosen)",
                    format_args!("{} for E = {experts}", groups.count),
                )?;
                self.value((1..=groups.count).contains(&groups.keep), "groups.keep", "1 to groups.count", groups.keep)?;
                let room = groups.keep * (experts / groups.count);
                self.value(top_k <= room, "K", "no more than the kept groups hold", format_args!("{top_k} of {room}"))?;
            }
            Selection::TopK { .. } | Selection::Table => {}
            Selection::SparseMixer { jitter } => {
                self.value(top_k == 2, "K", "2 for the sparse mixer", top_k)?;
                self.not_negative("selection.jitter", jitter)?;
            }
        }
        self.finite("weights.scale", rule.weights.scale)?;
        match rule.weights.normalize {
            Normalize::None => Ok(()),
            Normalize::Sum { eps } => self.not_negative("weights.normalize.eps", eps),
            Normalize::SumAtLeast { min } => self.not_negative("weights.normalize.min", min),
            Normalize::Lp { p } => self.positive("weights.normalize.p", p),
        }
    }

    /// Whether a layer's description makes sense by itself.
    fn config(self, config: &LayerConfig) -> Result<()> {
        self.value(config.hidden > 0, "H", "a size above zero", config.hidden)?;
        self.value(config.intermediate > 0, "I", "a size above zero", config.intermediate)?;
        self.value((1..=MAX_EXPERTS).contains(&config.experts), "E", "1 to 4096 experts", config.experts)?;
        self.rule(&config.routing, config.choices(), config.top_k)?;
        self.finite("gate.scale", config.gate.scale)?;
        if let Some(norm) = config.gate.norm {
            self.not_negative("gate.norm.eps", norm.eps)?;
        }
        if let Some(softcap) = config.gate.softcap {
            self.positive("gate.softcap", softcap)?;
        }
        self.finite("routed_scale", config.routed_scale)?;
        self.activation(ACTIVATION, config.activation)?;
        if let Some(shared) = config.shared {
            self.value(shared.intermediate > 0, "shared.intermediate", "a size above zero", shared.intermediate)?;
            self.finite("shared.scale", shared.scale)?;
            self.activation(SHARED_ACTIVATION, shared.activation)?;
        }
        self.around(config)
    }

    fn activation(self, names: [&'static str; 4], activation: Activation) -> Result<()> {
        let [limit_name, alpha_name, gate_cap_name, up_cap_name] = names;
        match activation {
            Activation::Gated(_) | Activation::Plain(_) => Ok(()),
            Activation::ClampedSilu { limit } | Activation::SiluThenClamp { limit } => self.positive(limit_name, limit),
            Activation::ClampedSwish { alpha, limit } => {
                self.finite(alpha_name, alpha)?;
                self.positive(limit_name, limit)
            }
            Activation::SoftcappedSilu { gate_cap, up_cap } => {
                self.positive(gate_cap_name, gate_cap)?;
                self.positive(up_cap_name, up_cap)
            }
        }
    }
}

impl LayerConfig {
    /// Checks the description alone: sizes, routing rule, activation.
    ///
    /// Errors: `Value`, naming what lies outside its range.
    pub fn check(&self) -> Result<()> {
        Check("layer").config(self)
    }
}
