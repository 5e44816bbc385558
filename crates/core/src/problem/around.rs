//! Checks of what stands around the experts, and of the rules that few layers have.

use super::Check;
use crate::backend::Options;
use crate::config::{Capacity, CapacityLimit, LayerConfig, Norms, RouterMlp, WeightOn, ZeroOutput};
use crate::error::Result;
use crate::tensor::HostView;
use crate::weights::LayerWeights;

impl LayerConfig {
    /// Whether anything but a shared expert stands around the experts, so that the stages alone do not make the layer.
    pub fn has_surroundings(&self) -> bool {
        let Norms { experts_in, expert_out: _, routed_out, shared_in, shared_out, out } = self.norms;
        let normed = [experts_in, routed_out, shared_in, shared_out, out].iter().any(Option::is_some);
        normed || self.latent.is_some() || self.router_mlp.is_some()
    }

    /// What the stages from router to combine compute of it, where there are surroundings: a layer as wide as the experts,
    /// without shared expert.
    pub fn core(&self) -> Self {
        if !self.has_surroundings() {
            return self.clone();
        }
        Self {
            hidden: self.expert_width(),
            shared: None,
            latent: None,
            norms: Norms { expert_out: self.norms.expert_out, ..Norms::default() },
            router_mlp: None,
            ..self.clone()
        }
    }
}

impl Check {
    pub(super) fn around(self, config: &LayerConfig) -> Result<()> {
        if let Some(zero) = config.zero_experts {
            self.value(zero.count > 0, "zero_experts.count", "at least 1", zero.count)?;
            let weighed = zero.output != ZeroOutput::Copy || config.weight_on == WeightOn::Output;
            self.value(weighed, "weight_on", "the output, where experts copy the token", "the input")?;
            self.value(
                config.routing.always == 0,
                "always",
                "0 beside experts without weights",
                config.routing.always,
            )?;
        }
        config.capacity.map_or(Ok(()), |capacity| self.capacity(capacity))?;
        if let Some(width) = config.latent {
            self.value(width > 0, "latent", "a size above zero", width)?;
        }
        let Norms { experts_in, expert_out, routed_out, shared_in, shared_out, out } = config.norms;
        for (name, norm) in [
            ("norms.experts_in.eps", experts_in),
            ("norms.expert_out.eps", expert_out),
            ("norms.routed_out.eps", routed_out),
            ("norms.shared_in.eps", shared_in),
            ("norms.shared_out.eps", shared_out),
            ("norms.out.eps", out),
        ] {
            if let Some(norm) = norm {
                self.not_negative(name, norm.eps)?;
                let possible = !norm.scaled_first || name == "norms.expert_out.eps";
                self.value(possible, "norms.scaled_first", "false but for norms.expert_out", norm.scaled_first)?;
            }
        }
        let beside = shared_in.is_none() && shared_out.is_none() || config.shared.is_some();
        self.value(beside, "norms.shared_in, shared_out", "a shared expert", "none")?;
        let fed = config.gate.norm.is_some_and(|norm| norm.feeds_experts);
        self.value(
            !fed || !config.has_surroundings(),
            "gate.norm.feeds_experts",
            "no norms or projections besides",
            fed,
        )?;
        if let Some(mlp) = config.router_mlp {
            self.value(mlp.width > 0, "router_mlp.width", "a size above zero", mlp.width)?;
            self.not_negative("router_mlp.eps", mlp.eps)?;
        }
        Ok(())
    }

    pub(super) fn capacity(self, capacity: Capacity) -> Result<()> {
        if let CapacityLimit::Fraction(fraction) = capacity.limit {
            let sensible = fraction.is_finite() && fraction >= 0.0;
            self.value(sensible, "capacity.limit", "a number not below zero", fraction)?;
        }
        capacity.renormalize.map_or(Ok(()), |min| self.not_negative("capacity.renormalize", min))
    }

    /// Whether the weights around the experts are there, with the right shapes.
    pub(super) fn around_weights(
        self,
        config: &LayerConfig,
        weights: &LayerWeights<'_>,
        options: &Options,
    ) -> Result<()> {
        let (hidden, width) = (config.hidden, config.expert_width());
        self.matches("latent", &weights.latent, config.latent.is_some(), LATENT_REASONS)?;
        if let Some(latent) = &weights.latent {
            self.matrix("latent.down", &latent.down, "[L, H]", [width, hidden])?;
            self.matrix("latent.up", &latent.up, "[H, L]", [hidden, width])?;
        }
        let (norms, given) = (&config.norms, &weights.norms);
        for (name, norm, weight, length) in [
            ("norms.experts_in", norms.experts_in, &given.experts_in, width),
            ("norms.expert_out", norms.expert_out, &given.expert_out, width),
            ("norms.routed_out", norms.routed_out, &given.routed_out, hidden),
            ("norms.shared_in", norms.shared_in, &given.shared_in, hidden),
            ("norms.shared_out", norms.shared_out, &given.shared_out, hidden),
            ("norms.out", norms.out, &given.out, hidden),
        ] {
            match norm {
                None => self.absent(name, weight, "the layer has no such norm")?,
                Some(_) => self.optional_vector(name, weight, "[H]", length)?,
            }
        }
        self.matches("router_mlp", &weights.router_mlp, config.router_mlp.is_some(), MLP_REASONS)?;
        if let (Some(RouterMlp { width, .. }), Some(mlp)) = (config.router_mlp, &weights.router_mlp) {
            self.matrix("router_mlp.down", &mlp.down, "[M, H]", [width, hidden])?;
            self.matrix("router_mlp.fc1", &mlp.fc1, "[M, M]", [width, width])?;
            self.matrix("router_mlp.fc2", &mlp.fc2, "[M, M]", [width, width])?;
            self.optional_vector("router_mlp.down_bias", &mlp.down_bias, "[M]", width)?;
            self.optional_vector("router_mlp.norm", &mlp.norm, "[M]", width)?;
            self.optional_vector("router_mlp.fc1_bias", &mlp.fc1_bias, "[M]", width)?;
            self.optional_vector("router_mlp.fc2_bias", &mlp.fc2_bias, "[M]", width)?;
            if let Some(scale) = mlp.state_scale.as_ref().filter(|scale| scale.shape().dims() != [1]) {
                self.vector("router_mlp.state_scale", scale, "[M]", width)?;
            }
        }
        let whole = norms.routed_out.is_none() && norms.out.is_none();
        let all = options.local_experts.as_ref().is_none_or(|local| *local == (0..config.experts));
        self.value(whole || all, "local_experts", "all of them, since a norm follows their sum", "some")
    }

    pub(super) fn matrix(
        self,
        operand: &'static str,
        view: &HostView<'_>,
        layout: &'static str,
        dims: [usize; 2],
    ) -> Result<()> {
        self.float(operand, view)?;
        self.shape(operand, view, layout, dims)
    }

    pub(super) fn optional_vector(
        self,
        operand: &'static str,
        view: &Option<HostView<'_>>,
        layout: &'static str,
        n: usize,
    ) -> Result<()> {
        match view {
            Some(view) => self.vector(operand, view, layout, n),
            None => Ok(()),
        }
    }
}

const LATENT_REASONS: [&str; 2] = ["the experts work in a width of their own", "the experts work in the layer's width"];
const MLP_REASONS: [&str; 2] = ["the router has layers of its own", "the router is one matrix"];
