//! Every kernel of every plan, or one of each kind where plans differ in sizes alone.

use super::Kernel;
use super::backward::BackwardKernel;
use crate::combine::CombineKernel;
use crate::grouped::{self, Product};
use crate::plan::few::FewTile;
use crate::plan::pieces::Pieces;
use fused_moe_core::DType;
use fused_moe_core::config::{Activation, Function};

impl Kernel {
    /// Every kernel of every plan, or one of each kind where plans differ in sizes alone.
    pub(crate) fn all() -> Vec<Self> {
        let mut all = vec![
            Self::Permute,
            Self::PermuteCount,
            Self::PermuteScan,
            Self::PermuteScatter,
            Self::DropOverflow,
            Self::TileSchedule,
            Self::Zero,
            Self::Accumulate,
            Self::Copy,
            Self::Counts,
            Self::ReadAll,
        ];
        all.extend(crate::plan::grouped::all().into_iter().map(Self::Grouped));
        all.extend(BackwardKernel::all().into_iter().map(Self::Backward));
        for tile in crate::plan::SPLIT_TILES {
            all.extend([DType::F16, DType::BF16].map(|format| Self::LinearMma { format, tile }));
            all.extend([DType::F16, DType::BF16].map(|format| Self::GateMma { format, weighted: false, tile }));
            all.push(Self::GateMma { format: DType::BF16, weighted: true, tile });
        }
        for x in FLOATS {
            all.extend([32, 256].map(|threads| Self::Route { logits: x, threads, lane_logits: 0 }));
            for lane_logits in crate::plan::LANE_LOGITS {
                all.push(Self::Route { logits: x, threads: 32, lane_logits });
                all.push(Self::RoutePermute { logits: x, lane_logits });
                all.extend(rings(Activation::default(), DType::BF16, x, lane_logits));
                all.extend(fews(Activation::default(), DType::BF16, x, lane_logits));
            }
            all.push(Self::GatherWeights { scores: x });
            all.extend(CombineKernel::all(x).into_iter().map(Self::Combine));
            for w in FLOATS {
                for vector in [1, crate::plan::dot_vector(x, w)] {
                    all.extend([1, 2, 4].map(|tokens| Self::Gate { x, router: w, vector, tokens }));
                    all.push(Self::GateRoute { x, router: w, vector });
                    all.push(Self::DownCombine { x, weight: w, vector, slots: 4, unroll: 3 });
                    all.push(Self::Linear { x, weight: w, vector });
                }
                for vector in [1, 4] {
                    all.push(Self::GateTiled { x, router: w, vector });
                    all.push(Self::LinearTiled { x, weight: w, vector });
                }
            }
        }
        for pieces in Pieces::all() {
            all.extend(activations().map(|activation| Self::Activation { activation: activation.into(), pieces }));
        }
        for format in [DType::F16, DType::BF16] {
            all.extend(activations().flat_map(|activation| rings(activation, format, DType::F32, 0)));
            all.extend(activations().flat_map(|activation| fews(activation, format, DType::F32, 0)));
        }
        all
    }
}

pub(super) const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// The kernels for one token.
fn rings(activation: Activation, format: DType, logits: DType, lane_logits: u8) -> [Kernel; 2] {
    let (gated, activation) = (activation.is_gated(), Some(activation.into()));
    let product = Product { stage: grouped::Stage::GateUp, gather: true, gated, activation };
    let (choice, ring) = ((logits, lane_logits), [12, 4]);
    [Kernel::GateUpRing { product, format, choice, ring }, Kernel::DownCombineRing { format, choice, ring: [8, 4] }]
}

/// The kernels for a few tokens.
fn fews(activation: Activation, format: DType, logits: DType, lane_logits: u8) -> [Kernel; 3] {
    let (gated, activation) = (activation.is_gated(), Some(activation.into()));
    let product = Product { stage: grouped::Stage::GateUp, gather: true, gated, activation };
    let (choice, tile) = ((logits, lane_logits), |warps, groups| FewTile { warps, chunks: 4, stages: 4, groups });
    [
        Kernel::GateUpFew { product, format, choice, tile: tile(8, 2) },
        Kernel::DownCombineFew { format, choice, tile: tile(12, 2) },
        Kernel::DownCombineFew { format, choice, tile: tile(12, 3) },
    ]
}

/// One activation of every kind.
pub(super) fn activations() -> impl Iterator<Item = Activation> {
    let functions = [
        Function::Silu,
        Function::GeluTanh,
        Function::GeluErf,
        Function::Relu,
        Function::ReluSquared,
        Function::Identity,
    ];
    let (alpha, limit) = (1.0, 1.0);
    let clamped = [
        Activation::ClampedSilu { limit },
        Activation::ClampedSwish { alpha, limit },
        Activation::SiluThenClamp { limit },
        Activation::SoftcappedSilu { gate_cap: 1.0, up_cap: 1.0 },
    ];
    let plain = functions.into_iter().flat_map(|f| [Activation::Gated(f), Activation::Plain(f)]);
    clamped.into_iter().chain(plain)
}
