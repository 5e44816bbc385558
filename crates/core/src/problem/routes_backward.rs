use super::routes::SCALE_REASONS;
use super::{Check, MAX_EXPERTS};
use crate::backend::Backend;
use crate::config::{RoutingRule, Score};
use crate::dtype::DType;
use crate::error::Result;
use crate::operation::{GateBackward, LoadBalanceLoss, NormBackward, RouteBackward, ZLoss};

/// A checked [`RouteBackward`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RouteBackwardProblem {
    /// T.
    pub tokens: usize,
    /// E.
    pub experts: usize,
    /// K.
    pub top_k: usize,
    /// The rule.
    pub rule: RoutingRule,
}

/// A checked [`GateBackward`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GateBackwardProblem {
    /// T.
    pub tokens: usize,
    /// H.
    pub hidden: usize,
    /// E.
    pub experts: usize,
}

/// A checked [`NormBackward`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NormBackwardProblem {
    /// T.
    pub tokens: usize,
    /// H.
    pub hidden: usize,
}

/// A checked [`LoadBalanceLoss`] or [`ZLoss`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LossProblem {
    /// T.
    pub tokens: usize,
    /// E.
    pub experts: usize,
    /// K; 0 where no routes are read.
    pub top_k: usize,
    /// N, 1 for a batch that is one sequence.
    pub sequences: usize,
}

impl<B: Backend> RouteBackward<'_, B> {
    /// Checks shapes, formats and the rule.
    pub fn problem(&self) -> Result<RouteBackwardProblem> {
        let check = Check("route_backward");
        let (tokens, experts, top_k) = (self.logits.rows(), self.logits.cols(), self.experts.cols());
        check.float("logits", &self.logits)?;
        check.slots(tokens, top_k)?;
        check.rule(&self.rule, experts, top_k)?;
        check.only("experts", &self.experts, DType::U32)?;
        check.rows("experts", &self.experts, "[T, K]", [tokens, top_k])?;
        check.only("d_weights", &self.d_weights, DType::F32)?;
        check.rows("d_weights", &self.d_weights, "[T, K]", [tokens, top_k])?;
        let scaled = self.rule.weights.expert_scale.is_some();
        check.matches("expert_scale", &self.expert_scale, scaled, SCALE_REASONS)?;
        if let Some(scale) = &self.expert_scale {
            check.vector("expert_scale", scale, "[E]", experts)?;
        }
        check.gradient_f32("d_logits", &self.d_logits, "[T, E]", [tokens, experts])?;
        if let Some(gradient) = &self.d_expert_scale {
            check.value(scaled, "d_expert_scale", SCALE_REASONS[0], SCALE_REASONS[1])?;
            check.vector("d_expert_scale", &gradient.view, "[E]", experts)?;
        }
        Ok(RouteBackwardProblem { tokens, experts, top_k, rule: self.rule })
    }
}

impl<B: Backend> GateBackward<'_, B> {
    /// Checks shapes, formats and numbers.
    pub fn problem(&self) -> Result<GateBackwardProblem> {
        let check = Check("gate_backward");
        let (tokens, hidden, experts) = (self.d_logits.rows(), self.router.cols(), self.router.rows());
        check.float("router", &self.router)?;
        check.shape("router", &self.router, "[E, H]", [experts, hidden])?;
        check.value((1..=MAX_EXPERTS).contains(&experts), "E", "1 to 4096 experts", experts)?;
        check.value(hidden > 0, "H", "a size above zero", hidden)?;
        check.only("d_logits", &self.d_logits, DType::F32)?;
        check.rows("d_logits", &self.d_logits, "[T, E]", [tokens, experts])?;
        check.finite("scale", self.scale)?;
        if let Some(softcap) = self.softcap {
            check.positive("softcap", softcap)?;
            check.present("logits", self.logits.as_ref(), "there is a soft-cap")?;
        }
        if let Some(logits) = &self.logits {
            check.only("logits", logits, DType::F32)?;
            check.rows("logits", logits, "[T, E]", [tokens, experts])?;
        }
        if let Some(n) = &self.n {
            check.float("n", n)?;
            check.rows("n", n, "[T, H]", [tokens, hidden])?;
        }
        if self.d_router.is_some() {
            check.present("n", self.n.as_ref(), "d_router is asked for")?;
        }
        if let Some(gradient) = &self.d_n {
            check.float("d_n", &gradient.view)?;
            check.rows("d_n", &gradient.view, "[T, H]", [tokens, hidden])?;
        }
        check.gradient("d_router", &self.d_router, "[E, H]", [experts, hidden])?;
        if let Some(gradient) = &self.d_bias {
            check.vector("d_bias", &gradient.view, "[E]", experts)?;
        }
        Ok(GateBackwardProblem { tokens, hidden, experts })
    }
}

impl<B: Backend> NormBackward<'_, B> {
    /// Checks shapes and formats.
    pub fn problem(&self) -> Result<NormBackwardProblem> {
        let check = Check("norm_backward");
        let (tokens, hidden) = (self.x.rows(), self.x.cols());
        check.value(hidden > 0, "H", "a size above zero", hidden)?;
        check.not_negative("eps", self.eps)?;
        check.float("x", &self.x)?;
        check.float("d_n", &self.d_n)?;
        check.rows("d_n", &self.d_n, "[T, H]", [tokens, hidden])?;
        if let Some(weight) = &self.weight {
            check.vector("weight", weight, "[H]", hidden)?;
        }
        if let Some(gradient) = &self.d_x {
            check.float("d_x", &gradient.view)?;
            check.rows("d_x", &gradient.view, "[T, H]", [tokens, hidden])?;
        }
        if let Some(gradient) = &self.d_weight {
            check.vector("d_weight", &gradient.view, "[H]", hidden)?;
        }
        Ok(NormBackwardProblem { tokens, hidden })
    }
}

impl<B: Backend> LoadBalanceLoss<'_, B> {
    /// Checks shapes, formats and the score.
    pub fn problem(&self) -> Result<LossProblem> {
        let check = Check("load_balance_loss");
        let (tokens, experts, top_k) = (self.logits.rows(), self.logits.cols(), self.experts.cols());
        check.float("logits", &self.logits)?;
        check.slots(tokens, top_k)?;
        check.experts(experts, top_k)?;
        check.only("experts", &self.experts, DType::U32)?;
        check.rows("experts", &self.experts, "[T, K]", [tokens, top_k])?;
        let positive = self.score != Score::Logit;
        check.value(positive, "score", "one that is not negative", format_args!("{:?}", self.score))?;
        check.finite("coefficient", self.coefficient)?;
        let mut sequences = 1;
        if let Some(ends) = &self.sequences {
            sequences = ends.cols().saturating_sub(1);
            check.only("sequences", ends, DType::U32)?;
            check.shape("sequences", ends, "[N+1]", [sequences + 1])?;
        }
        check.gradient_f32("loss", &self.loss, "[1]", [1, 1])?;
        check.gradient_f32("d_logits", &self.d_logits, "[T, E]", [tokens, experts])?;
        Ok(LossProblem { tokens, experts, top_k, sequences })
    }
}

impl<B: Backend> ZLoss<'_, B> {
    /// Checks shapes and formats.
    pub fn problem(&self) -> Result<LossProblem> {
        let check = Check("z_loss");
        let (tokens, experts) = (self.logits.rows(), self.logits.cols());
        check.float("logits", &self.logits)?;
        check.value((1..=MAX_EXPERTS).contains(&experts), "E", "1 to 4096 experts", experts)?;
        check.finite("coefficient", self.coefficient)?;
        check.gradient_f32("loss", &self.loss, "[1]", [1, 1])?;
        check.gradient_f32("d_logits", &self.d_logits, "[T, E]", [tokens, experts])?;
        Ok(LossProblem { tokens, experts, top_k: 0, sequences: 1 })
    }
}
