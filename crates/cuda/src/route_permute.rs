//! route and permute of few tokens in one launch.

use crate::error::Result;
use crate::launch::{Tensor, launch, params};
use crate::memory::Mut;
use crate::permute::PermuteParams;
use crate::plan::Plan;
use crate::route::RouteParams;
use crate::{Cuda, CudaStream};
use fused_moe_core::View;
use fused_moe_core::operation::Route;

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
