//! route and permute of few tokens in one launch.

use crate::error::Result;
use crate::launch::{Tensor, launch, params};
use crate::memory::Mut;
use crate::permute::PermuteParams;
use crate::plan::Plan;
use crate::route::RouteParams;
use crate::{Cuda, CudaStream};
use fused_moe_core::operation::Route;
use fused_moe_core::{DType, View};

params! {
    RoutePermuteParams { route: RouteParams, permute: PermuteParams }
}

/// What [`route_permute`] writes besides the routes.
pub(crate) struct Grouped<'a> {
    /// u32 `[R]`.
    pub(crate) row_slot: View<Mut<'a>>,
    /// u32 `[R]`.
    pub(crate) slot_row: View<Mut<'a>>,
    /// u32 `[E+1]`, and the counters, which become 0.
    pub(crate) offsets: View<Mut<'a>>,
}

/// Tokens of a warp, at most.
pub(crate) const ROUNDS: usize = 2;
/// Blocks: the most that a cluster has everywhere.
pub(crate) const BLOCKS: usize = 8;

/// Warps of a block, at most: as many as have registers for so many logits of a lane.
pub(crate) const fn warps(lane_logits: u8) -> usize {
    if lane_logits > 8 { 16 } else { 32 }
}

/// What the kernel is specialised by.
pub(crate) fn defines(logits: DType, lane_logits: u8) -> Vec<(&'static str, String)> {
    vec![
        ("LOGITS_T", logits.to_string()),
        ("LANE_LOGITS", lane_logits.to_string()),
        ("WARPS", warps(lane_logits).to_string()),
        ("ROUNDS", ROUNDS.to_string()),
        ("MOST_BLOCKS", BLOCKS.to_string()),
        ("COUNTERS", crate::workspace::COUNTERS.to_string()),
    ]
}

/// The routes of tokens each of whose slots has an expert that is here, and their slots by expert, as `plan` says.
///
/// Errors: as `route`.
pub(crate) fn route_permute(
    cuda: &Cuda,
    stream: &CudaStream,
    operands: &Route<'_, Cuda>,
    grouped: &Grouped<'_>,
    plan: Plan,
) -> Result<()> {
    let problem = operands.problem()?;
    let params = RoutePermuteParams {
        route: RouteParams::new(&problem, operands, stream)?,
        permute: PermuteParams {
            row_slot: Tensor::of(&grouped.row_slot)?,
            slot_row: Tensor::of(&grouped.slot_row)?,
            offsets: Tensor::of(&grouped.offsets)?,
            ..PermuteParams::default()
        },
    };
    if let Some(recorder) = cuda.recorder() {
        recorder.explain(plan.why);
    }
    launch(cuda, stream, plan.kernel, plan.grid, &params)
}
