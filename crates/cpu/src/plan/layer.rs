use super::{Device, GatePlan, GroupedPlan, PanelPlan, PermutePlan, RoutePlan, RowsPlan, operand};
use fused_moe_core::DType::{self, F32};
use fused_moe_core::config::{Activation, LayerConfig, SharedConfig};
use fused_moe_core::operation::GateUpOutput;
use fused_moe_core::problem::{DownProblem, GateUpProblem, LayerProblem, LinearProblem};
use std::fmt;

/// How a layer is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LayerPlan {
    tokens: usize,
    device: Device,
    gate: Option<GatePlan>,
    route: RoutePlan,
    permute: PermutePlan,
    /// Experts to a thread, where there is a capacity.
    overflow: Option<RowsPlan>,
    gate_up: PanelPlan,
    down: PanelPlan,
    shared: Option<SharedPlan>,
    combine: RowsPlan,
    surroundings: bool,
}

/// How a layer's shared expert is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct SharedPlan {
    gate_up: PanelPlan,
    down: PanelPlan,
    gate: Option<GroupedPlan>,
}

impl LayerPlan {
    /// For the router's routes and x in the format of gate_up; the stages make the same plans of their operands.
    pub(crate) fn new(layer: &LayerProblem, tokens: usize, device: &Device) -> Self {
        let (core, choices) = (&layer.core, layer.core.choices());
        let LayerConfig { hidden, intermediate, experts, top_k, activation, .. } = *core;
        let rows = tokens.saturating_mul(top_k);
        let expert = ExpertSizes { rows, experts, hidden, intermediate, activation };
        let shared = core.shared.zip(layer.shared).map(|(shared, [up, down])| {
            let SharedConfig { intermediate, activation, gated, .. } = shared;
            let expert = ExpertSizes { rows: tokens, experts: 1, hidden, intermediate, activation };
            let gate = LinearProblem { rows: tokens, inner: hidden, outer: 1, x: F32, weight: F32, out: F32 };
            SharedPlan {
                gate_up: PanelPlan::gate_up(&expert.gate_up(up), up, device),
                down: PanelPlan::down(&expert.down(operand(up, down, device.isa)), down, device),
                gate: gated.then(|| GroupedPlan::linear(&gate, device)),
            }
        });
        let normed = core.gate.norm.is_some();
        Self {
            tokens,
            device: *device,
            gate: layer.router.map(|_| GatePlan::new([tokens, layer.config.router_width()], normed)),
            route: RoutePlan::new(choices, top_k),
            permute: PermutePlan::new(rows, choices, device),
            overflow: core.capacity.map(|_| RowsPlan::overflow(rows, choices)),
            gate_up: PanelPlan::gate_up(&expert.gate_up(layer.gate_up), layer.gate_up, device),
            down: PanelPlan::down(&expert.down(operand(layer.gate_up, layer.down, device.isa)), layer.down, device),
            shared,
            combine: RowsPlan::combine(hidden, top_k),
            surroundings: layer.config.has_surroundings(),
        }
    }
}

/// The experts of a layer.
struct ExpertSizes {
    rows: usize,
    experts: usize,
    hidden: usize,
    intermediate: usize,
    activation: Activation,
}

impl ExpertSizes {
    fn gate_up(&self, x: DType) -> GateUpProblem {
        let Self { rows, experts, hidden, intermediate, activation } = *self;
        let (stack, out, output) = (None, F32, GateUpOutput::Activated);
        GateUpProblem { rows, hidden, intermediate, experts, x, stack, out, activation, output }
    }

    fn down(&self, a: DType) -> DownProblem {
        let Self { rows, experts, hidden, intermediate, .. } = *self;
        DownProblem { rows, hidden, intermediate, experts, a, stack: None, out: F32 }
    }
}

impl fmt::Display for LayerPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tokens, device, gate, route, permute, overflow, gate_up, down, shared, combine, surroundings } =
            self;
        writeln!(
            f,
            "{tokens} tokens on {} threads with {}; sums in one order for any batch",
            device.threads, device.isa
        )?;
        if let Some(gate) = gate {
            writeln!(f, "gate: {gate}")?;
        }
        writeln!(f, "route: {route}")?;
        if let Some(RowsPlan { grain }) = overflow {
            writeln!(f, "overflow: permuted, then {grain} experts to a thread at a time, each by a radix search")?;
        }
        writeln!(f, "permute: {permute}")?;
        writeln!(f, "gate_up: {gate_up}; with the activation")?;
        writeln!(f, "down: {down}")?;
        if let Some(SharedPlan { gate_up, down, gate }) = shared {
            writeln!(f, "shared gate_up: {gate_up}; with the activation")?;
            writeln!(f, "shared down: {down}")?;
            if let Some(gate) = gate {
                writeln!(f, "shared gate: {gate}")?;
            }
        }
        write!(f, "combine: {combine}")?;
        if *surroundings {
            write!(f, "\nsurroundings: dense products of all tokens and norms, in f32 between each other")?;
        }
        Ok(())
    }
}
