//! The list of cases: data that tests, `fmoe check` and `fmoe bench` share.

use crate::image::Placement;
use crate::stage;
use fused_moe_core::DType;
use serde::Serialize;
use std::fmt;

/// How many cases, of what sizes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scale {
    /// Every kind of case, at small sizes.
    #[default]
    Quick,
    /// More formats for every size, and sizes at which a backend takes its fast roads.
    Full,
}

/// An operation of the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// x to logits.
    Gate,
    /// Logits to routes.
    Route,
    /// The two in one.
    GateRoute,
    /// Weights of given routes.
    GatherWeights,
    /// Slots grouped by expert.
    Permute,
    /// Slots beyond a capacity taken out.
    DropOverflow,
    /// Rows of each expert in tiles.
    TileSchedule,
    /// The first matrix.
    GateUp,
    /// The activation alone.
    Activation,
    /// The second matrix.
    Down,
    /// Rows to tokens.
    Combine,
    /// A dense product.
    Linear,
    /// Zeros.
    Zero,
    /// A multiple added.
    Accumulate,
    /// Expert by expert.
    ExpertLoop,
    /// Everything.
    Layer,
    /// Tokens to rows.
    CombineBackward,
    /// Through the second matrix.
    DownBackward,
    /// Through the activation.
    ActivationBackward,
    /// Through the first matrix.
    GateUpBackward,
    /// Weights to logits.
    RouteBackward,
    /// Through the router's product.
    GateBackward,
    /// Through a norm.
    NormBackward,
    /// The load-balancing loss.
    LoadBalanceLoss,
    /// The router z-loss.
    ZLoss,
    /// Everything, forward and back.
    LayerBackward,
}

impl Stage {
    /// As in the name of a case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gate => "gate",
            Self::Route => "route",
            Self::GateRoute => "gate_route",
            Self::GatherWeights => "gather_weights",
            Self::Permute => "permute",
            Self::DropOverflow => "drop_overflow",
            Self::TileSchedule => "tile_schedule",
            Self::GateUp => "gate_up",
            Self::Activation => "activation",
            Self::Down => "down",
            Self::Combine => "combine",
            Self::Linear => "linear",
            Self::Zero => "zero",
            Self::Accumulate => "accumulate",
            Self::ExpertLoop => "expert_loop",
            Self::Layer => "layer",
            Self::CombineBackward => "combine_backward",
            Self::DownBackward => "down_backward",
            Self::ActivationBackward => "activation_backward",
            Self::GateUpBackward => "gate_up_backward",
            Self::RouteBackward => "route_backward",
            Self::GateBackward => "gate_backward",
            Self::NormBackward => "norm_backward",
            Self::LoadBalanceLoss => "load_balance_loss",
            Self::ZLoss => "z_loss",
            Self::LayerBackward => "layer_backward",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One case.
#[derive(Clone, Debug)]
pub struct Case {
    /// The operation.
    pub stage: Stage,
    /// What is special about it, and its sizes.
    pub name: String,
    /// Formats of its operands.
    pub dtype: String,
    /// How its operands lie in memory.
    pub placement: Placement,
    /// What is to be done.
    pub operation: Operation,
}

/// `stage/case/dtypes`.
pub(crate) fn id(stage: Stage, name: &str, dtype: &str) -> String {
    format!("{stage}/{name}/{dtype}")
}

impl Case {
    /// `stage/case/dtypes`, unique.
    pub fn id(&self) -> String {
        id(self.stage, &self.name, &self.dtype)
    }

    /// The same with operands that are all of their buffers.
    fn tight(self) -> Self {
        Self { name: format!("tight {}", self.name), placement: Placement::Tight, ..self }
    }

    /// The same with operands at odd offsets, their rows apart.
    pub(crate) fn strided(self) -> Self {
        Self { name: format!("strided {}", self.name), placement: Placement::Strided, ..self }
    }
}

/// What a case does.
#[derive(Clone, Debug)]
pub enum Operation {
    /// [`stage::gate`].
    Gate(stage::gate::Gate),
    /// [`stage::route`].
    Route(stage::route::Route),
    /// [`stage::gate_route`].
    GateRoute(stage::gate_route::GateRoute),
    /// [`stage::gather_weights`].
    GatherWeights(stage::gather_weights::GatherWeights),
    /// [`stage::permute`].
    Permute(stage::permute::Permute),
    /// [`stage::drop_overflow`].
    DropOverflow(stage::drop_overflow::DropOverflow),
    /// [`stage::permute`].
    TileSchedule(stage::permute::TileSchedule),
    /// [`stage::gate_up`].
    GateUp(stage::gate_up::GateUp),
    /// [`stage::activation`].
    Activation(stage::activation::Activate),
    /// [`stage::down`].
    Down(stage::down::Down),
    /// [`stage::combine`].
    Combine(stage::combine::Combine),
    /// [`stage::linear`].
    Linear(stage::linear::Linear),
    /// [`stage::linear`].
    Zero(stage::linear::Zero),
    /// [`stage::linear`].
    Accumulate(stage::linear::Accumulate),
    /// [`stage::expert_loop`].
    ExpertLoop(stage::expert_loop::ExpertLoop),
    /// [`stage::layer`].
    Layer(Box<stage::layer::LayerCase>),
}

/// All cases of all stages.
pub fn cases(scale: Scale) -> Vec<Case> {
    let mut cases = stage::gate::cases(scale);
    cases.extend(stage::route::cases(scale));
    cases.extend(stage::gate_route::cases(scale));
    cases.extend(stage::gather_weights::cases(scale));
    cases.extend(stage::permute::cases(scale));
    cases.extend(stage::drop_overflow::cases(scale));
    cases.extend(stage::gate_up::cases(scale));
    cases.extend(stage::activation::cases(scale));
    cases.extend(stage::down::cases(scale));
    cases.extend(stage::combine::cases(scale));
    cases.extend(stage::linear::cases(scale));
    cases.extend(stage::expert_loop::cases(scale));
    cases.extend(stage::layer::cases(scale));
    let mut seen = Vec::new();
    let tight: Vec<Case> = cases
        .iter()
        .filter(|case| {
            let kind = (case.stage, case.dtype.clone());
            let first = !seen.contains(&kind);
            seen.push(kind);
            let small = case.name.contains("T=0 ") || case.name.contains("T=5 ");
            case.placement == Placement::Plain && (first || small)
        })
        .cloned()
        .map(Case::tight)
        .collect();
    cases.extend(tight);
    cases
}

/// The floating-point formats.
pub(crate) const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Formats of three operands, as a case is named: one if they are the same.
pub(crate) fn dtype_name<const N: usize>(dtypes: [DType; N]) -> String {
    if dtypes.iter().all(|&dtype| dtype == dtypes[0]) {
        return dtypes[0].to_string();
    }
    dtypes.map(|dtype| dtype.to_string()).join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique() {
        for scale in [Scale::Quick, Scale::Full] {
            let mut seen = HashSet::new();
            for case in cases(scale) {
                assert!(seen.insert(case.id()), "{} twice", case.id());
            }
            assert!(seen.len() > 300, "{}", seen.len());
        }
    }
}
