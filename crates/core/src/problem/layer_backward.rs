//! What has to fit together in a call of a layer that is trained, as far as no stage of it sees it.

use super::Check;
use super::layer::GATED_REASONS;
use super::routes::{BIAS_REASONS, SCALE_REASONS, TABLE_REASONS};
use crate::backend::{Backend, In};
use crate::config::{LayerConfig, Selection};
use crate::dtype::DType;
use crate::error::Result;
use crate::operation::{
    ForwardSaving, Gradient, LayerBackward, LayerGradients, LayerParameters, RoutesFrom, SharedGradients, Source,
};

impl<B: Backend> ForwardSaving<'_, '_, B> {
    /// Checks the parts of a call of this layer against each other; returns T.
    pub fn problem(&self, config: &LayerConfig) -> Result<usize> {
        let check = Check("forward");
        let tokens = check.trained_layer(config, &self.x, self.parameters)?;
        let routed = !matches!(self.source, Source::Routes(_));
        match &self.source {
            Source::Router => {
                check.present("parameters.router", self.parameters.router, ROUTER_REASON)?;
            }
            Source::Logits(logits) => check.rows("source.logits", logits, "[T, E]", [tokens, config.experts])?,
            Source::Routes(routing) => {
                let views = (&routing.experts, &routing.weights);
                check.routes(["source.experts", "source.weights"], views, [tokens, config.top_k])?;
                check.absent("routes", &self.routes, ROUTES_REASON)?;
            }
        }
        if let Some(routes) = &self.routes {
            let views = (&routes.experts, &routes.weights);
            check.routes(["routes.experts", "routes.weights"], views, [tokens, config.top_k])?;
        }
        let by_id = routed && config.routing.selection == Selection::Table;
        if by_id {
            check.present("parameters.table", self.parameters.table, TABLE_REASONS[0])?;
        }
        check.matches("token_ids", &self.token_ids, by_id, TABLE_REASONS)?;
        if let Some(ids) = &self.token_ids {
            check.only("token_ids", ids, DType::U32)?;
            check.shape("token_ids", ids, "[T]", [tokens])?;
        }
        let shared = config.shared.is_some();
        check.matches("shared_pre_activation", &self.shared_pre_activation, shared, SHARED_REASONS)?;
        Ok(tokens)
    }
}

impl<B: Backend> LayerBackward<'_, '_, B> {
    /// Checks the parts of a call of this layer against each other, and that no gradient is asked for that there is not;
    /// returns T.
    pub fn problem(&self, config: &LayerConfig) -> Result<usize> {
        let check = Check("backward");
        let tokens = check.trained_layer(config, &self.x, self.parameters)?;
        match &self.source {
            RoutesFrom::Router => {
                check.present("parameters.router", self.parameters.router, ROUTER_REASON)?;
            }
            RoutesFrom::Logits(logits) => check.rows("source.logits", logits, "[T, E]", [tokens, config.experts])?,
            RoutesFrom::Routes => check.absent("d_logits", &self.d_logits, ROUTES_REASON)?,
        }
        let views = (&self.routing.experts, &self.routing.weights);
        check.routes(["routing.experts", "routing.weights"], views, [tokens, config.top_k])?;
        let shared = config.shared.is_some();
        check.matches("shared_pre_activation", &self.shared_pre_activation, shared, SHARED_REASONS)?;
        self.gradients_have_operands(check, config)?;
        Ok(tokens)
    }

    fn gradients_have_operands(&self, check: Check, config: &LayerConfig) -> Result<()> {
        let (p, from_router) = (self.parameters, matches!(self.source, RoutesFrom::Router));
        let routed = !matches!(self.source, RoutesFrom::Routes);
        let normed = config.gate.norm.is_some_and(|norm| norm.feeds_experts || from_router);
        let LayerGradients { logits, router, router_bias, router_norm, expert_scale, .. } = &self.gradients;
        let LayerGradients { gate_up_bias, down_bias, shared: of_shared, .. } = &self.gradients;
        let SharedGradients { gate_up, gate_up_bias: shared_bias, down, down_bias: shared_down_bias, gate } = of_shared;
        let shared = p.shared.as_ref();
        // a gradient, whether there is what it is of, and whether this call reads that
        let all: [(_, &Option<Gradient<'_, B>>, bool, bool); 12] = [
            ("gradients.logits", logits, true, routed),
            ("gradients.router", router, true, from_router),
            ("gradients.router_bias", router_bias, p.router_bias.is_some(), from_router),
            ("gradients.router_norm", router_norm, p.router_norm.is_some(), normed),
            ("gradients.expert_scale", expert_scale, p.expert_scale.is_some(), routed),
            ("gradients.gate_up_bias", gate_up_bias, p.gate_up_bias.is_some(), true),
            ("gradients.down_bias", down_bias, p.down_bias.is_some(), true),
            ("gradients.shared.gate_up", gate_up, shared.is_some(), true),
            ("gradients.shared.gate_up_bias", shared_bias, shared.is_some_and(|of| of.gate_up_bias.is_some()), true),
            ("gradients.shared.down", down, shared.is_some(), true),
            ("gradients.shared.down_bias", shared_down_bias, shared.is_some_and(|of| of.down_bias.is_some()), true),
            ("gradients.shared.gate", gate, shared.is_some_and(|of| of.gate.is_some()), true),
        ];
        for (operand, gradient, is_there, is_read) in all {
            if !is_there {
                check.absent(operand, gradient, "what it is the gradient of is absent")?;
            }
            if !is_read {
                check.absent(
                    operand,
                    gradient,
                    "what it is the gradient of is not read: the routes come from elsewhere",
                )?;
            }
        }
        Ok(())
    }
}

const ROUTER_REASON: &str = "the routes come from the layer's router";
const ROUTES_REASON: &str = "the routes are the caller's";
const SHARED_REASONS: [&str; 2] = ["the layer has a shared expert", "the layer has no shared expert"];

impl Check {
    /// What both passes read: x, and the parameters that the description asks for, and no others; returns T.
    fn trained_layer<B: Backend>(
        self,
        config: &LayerConfig,
        x: &In<'_, B>,
        parameters: &LayerParameters<'_, B>,
    ) -> Result<usize> {
        let &LayerConfig { hidden, intermediate, experts, top_k, .. } = config;
        let tokens = x.rows();
        self.slots(tokens, top_k)?;
        self.rows("x", x, "[T, H]", [tokens, hidden])?;
        // no sizes overflow: what they saturate to is no matrix's
        let [gate_up, down] = [config.gate_up_rows(), hidden].map(|rows| experts.saturating_mul(rows));
        self.rows("parameters.gate_up", &parameters.gate_up, "[E * N, H]", [gate_up, hidden])?;
        self.rows("parameters.down", &parameters.down, "[E * H, I]", [down, intermediate])?;
        if parameters.router.is_none() {
            self.absent("parameters.router_bias", &parameters.router_bias, "the layer has no router")?;
        }
        if config.gate.norm.is_none() {
            self.absent("parameters.router_norm", &parameters.router_norm, "the gate has no norm")?;
        }
        if !matches!(config.routing.selection, Selection::TopK { bias: true, .. }) {
            self.absent("parameters.correction_bias", &parameters.correction_bias, BIAS_REASONS[1])?;
        }
        if config.routing.weights.expert_scale.is_none() {
            self.absent("parameters.expert_scale", &parameters.expert_scale, SCALE_REASONS[1])?;
        }
        if config.routing.selection != Selection::Table {
            self.absent("parameters.table", &parameters.table, TABLE_REASONS[1])?;
        }
        self.matches("parameters.shared", &parameters.shared, config.shared.is_some(), SHARED_REASONS)?;
        if let (Some(shared), Some(parameters)) = (&config.shared, &parameters.shared) {
            self.matches("parameters.shared.gate", &parameters.gate, shared.gated, GATED_REASONS)?;
        }
        Ok(tokens)
    }
}
