//! The kernels of the gradients.

use super::all::{FLOATS, activations};
use super::{ACTIVATION, ActivationKind, PIECES, REDUCE};
use crate::grouped::{GROUPED, GroupedParams};
use crate::grouped_backward::GroupedBackwardKernel;
use crate::launch::Params;
use crate::plan::pieces::Pieces;
use crate::{activation_backward, combine_backward, gate_backward, losses, plan, route_backward};
use fused_moe_core::DType;

/// A kernel of a gradient and what it is specialised by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum BackwardKernel {
    Grouped(GroupedBackwardKernel),
    Activation { activation: ActivationKind, pieces: Pieces },
    ActivationWeights { activation: ActivationKind, pieces: Pieces },
    CombineRows { pieces: Pieces },
    CombineWeights { vector: u8 },
    CombineShared { vector: u8 },
    Route { logits: DType, threads: u16 },
    RouteScale { logits: DType },
    Norm,
    NormWeight { vector: u8 },
    LoadBalanceLoss { logits: DType },
    LoadBalanceLossLogits { logits: DType },
    ZLoss { logits: DType },
    ZLossLogits { logits: DType },
}

/// Threads of a loss that one block adds up.
pub(crate) const ONE_BLOCK: u32 = 1024;

const GRADIENT: &str = include_str!("../include/gradient.cuh");
const SLOPES: &str = include_str!("../include/activation_backward.cuh");
const SCORES: &str = include_str!("../include/scores.cuh");
const ROUTE: &str = include_str!("../include/route_backward.cuh");
const LOAD_BALANCE: &str = include_str!("../include/load_balance_loss.cuh");
const Z: &str = include_str!("../include/z_loss.cuh");

impl BackwardKernel {
    pub(crate) fn entry(self) -> &'static str {
        match self {
            Self::Grouped(kernel) => kernel.entry(),
            Self::Activation { .. } => "activation_backward",
            Self::ActivationWeights { .. } => "activation_weights_backward",
            Self::CombineRows { .. } => "combine_backward_rows",
            Self::CombineWeights { .. } => "combine_backward_weights",
            Self::CombineShared { .. } => "combine_backward_shared",
            Self::Route { .. } => "route_backward",
            Self::RouteScale { .. } => "route_backward_scale",
            Self::Norm => "norm_backward",
            Self::NormWeight { .. } => "norm_backward_weight",
            Self::LoadBalanceLoss { .. } => "load_balance_loss",
            Self::LoadBalanceLossLogits { .. } => "load_balance_loss_logits",
            Self::ZLoss { .. } => "z_loss",
            Self::ZLossLogits { .. } => "z_loss_logits",
        }
    }

    pub(crate) fn params(self) -> &'static str {
        match self {
            Self::Grouped(kernel) => kernel.params(),
            Self::Activation { .. } => activation_backward::ActivationBackwardParams::DEFINITION,
            Self::ActivationWeights { .. } => activation_backward::ActivationWeightsBackwardParams::DEFINITION,
            Self::CombineRows { .. } => combine_backward::CombineBackwardRowsParams::DEFINITION,
            Self::CombineWeights { .. } => combine_backward::CombineBackwardWeightsParams::DEFINITION,
            Self::CombineShared { .. } => combine_backward::CombineBackwardSharedParams::DEFINITION,
            Self::Route { .. } | Self::RouteScale { .. } => route_backward::RouteBackwardParams::DEFINITION,
            Self::Norm | Self::NormWeight { .. } => gate_backward::NormBackwardParams::DEFINITION,
            Self::LoadBalanceLoss { .. } | Self::LoadBalanceLossLogits { .. } => {
                losses::LoadBalanceLossParams::DEFINITION
            }
            Self::ZLoss { .. } | Self::ZLossLogits { .. } => losses::ZLossParams::DEFINITION,
        }
    }

    /// Headers, definitions and the kernel's own file, in order.
    pub(super) fn parts(self) -> Vec<&'static str> {
        let own = self.params();
        match self {
            Self::Grouped(kernel) => {
                let shared = vec![REDUCE, GRADIENT, ACTIVATION, GroupedParams::DEFINITION, GROUPED];
                [shared, kernel.parts()].concat()
            }
            Self::Activation { .. } => {
                vec![PIECES, ACTIVATION, SLOPES, own, include_str!("../activation_backward.cu")]
            }
            Self::ActivationWeights { .. } => {
                let activation = activation_backward::ActivationBackwardParams::DEFINITION;
                let text = include_str!("../activation_weights_backward.cu");
                vec![REDUCE, PIECES, ACTIVATION, SLOPES, activation, own, text]
            }
            Self::CombineRows { .. } => vec![PIECES, own, include_str!("../combine_backward_rows.cu")],
            Self::CombineWeights { .. } => vec![REDUCE, GRADIENT, own, include_str!("../combine_backward_weights.cu")],
            Self::CombineShared { .. } => vec![REDUCE, GRADIENT, own, include_str!("../combine_backward_shared.cu")],
            Self::Route { .. } => {
                vec![REDUCE, GRADIENT, SCORES, own, ROUTE, include_str!("../route_backward.cu")]
            }
            Self::RouteScale { .. } => {
                vec![REDUCE, GRADIENT, SCORES, own, ROUTE, include_str!("../route_backward_scale.cu")]
            }
            Self::Norm => vec![REDUCE, GRADIENT, own, include_str!("../norm_backward.cu")],
            Self::NormWeight { .. } => vec![REDUCE, GRADIENT, own, include_str!("../norm_backward_weight.cu")],
            Self::LoadBalanceLoss { .. } => loss(own, LOAD_BALANCE, include_str!("../load_balance_loss.cu")),
            Self::LoadBalanceLossLogits { .. } => {
                loss(own, LOAD_BALANCE, include_str!("../load_balance_loss_logits.cu"))
            }
            Self::ZLoss { .. } => loss(own, Z, include_str!("../z_loss.cu")),
            Self::ZLossLogits { .. } => loss(own, Z, include_str!("../z_loss_logits.cu")),
        }
    }

    /// Whether it may use more shared memory than a launch gives unasked.
    pub(super) fn asks_for_shared(self) -> bool {
        matches!(self, Self::Grouped(_) | Self::Route { .. })
    }

    /// Whether it multiplies on warpgroup tensor cores.
    pub(super) fn has_warpgroups(self) -> bool {
        matches!(
            self,
            Self::Grouped(GroupedBackwardKernel::MatricesWgmma { .. } | GroupedBackwardKernel::RowsWgmma { .. })
        )
    }

    /// What the text is specialised by.
    pub(super) fn defines(self) -> Vec<(&'static str, String)> {
        let vector = |vector: u8| vec![("VEC", vector.to_string())];
        let token =
            |logits: DType, threads: u32| vec![("LOGITS_T", logits.to_string()), ("THREADS", threads.to_string())];
        match self {
            Self::Grouped(kernel) => kernel.defines(),
            Self::Activation { activation, pieces } | Self::ActivationWeights { activation, pieces } => {
                let own = [("SIGMOID", pieces.sigmoid().to_string()), ("BRIEF", pieces.is_narrow().to_string())];
                [&activation.defines()[..], &pieces.defines(), &own].concat()
            }
            Self::CombineRows { pieces } => pieces.defines().to_vec(),
            Self::CombineWeights { vector: n } | Self::CombineShared { vector: n } => vector(n),
            Self::NormWeight { vector: n } => vector(n),
            Self::Route { logits, threads } => token(logits, threads.into()),
            Self::LoadBalanceLoss { logits } => token(logits, ONE_BLOCK),
            Self::LoadBalanceLossLogits { logits } => token(logits, 256),
            Self::RouteScale { logits } | Self::ZLoss { logits } | Self::ZLossLogits { logits } => {
                vec![("LOGITS_T", logits.to_string())]
            }
            Self::Norm => vec![],
        }
    }

    /// Every kernel of every plan.
    pub(super) fn all() -> Vec<Self> {
        let mut all: Vec<_> = plan::backward::all().into_iter().map(Self::Grouped).collect();
        all.push(Self::Norm);
        for pieces in Pieces::all() {
            all.extend(activations().map(|activation| Self::Activation { activation: activation.into(), pieces }));
            all.push(Self::CombineRows { pieces });
        }
        for format in [DType::F16, DType::BF16] {
            let pieces = Pieces { format: Some(format), vector: plan::backward::VECTOR };
            all.extend(
                activations().map(|activation| Self::ActivationWeights { activation: activation.into(), pieces }),
            );
        }
        for vector in [1, plan::backward::VECTOR] {
            all.extend([Self::CombineWeights { vector }, Self::CombineShared { vector }, Self::NormWeight { vector }]);
        }
        for logits in FLOATS {
            all.extend([32, 256].map(|threads| Self::Route { logits, threads }));
            all.extend([Self::RouteScale { logits }, Self::LoadBalanceLoss { logits }]);
            all.extend([Self::LoadBalanceLossLogits { logits }, Self::ZLoss { logits }, Self::ZLossLogits { logits }]);
        }
        all
    }
}

fn loss(own: &'static str, token: &'static str, file: &'static str) -> Vec<&'static str> {
    vec![REDUCE, GRADIENT, SCORES, own, token, file]
}
