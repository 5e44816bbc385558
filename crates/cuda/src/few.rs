//! A few tokens whose slots all have experts that are here: their experts in two launches, each of which finds the routes
//! for itself.

use crate::down_combine::{DownCombine, DownCombineParams};
use crate::error::Result;
use crate::grouped::GroupedParams;
use crate::kernel::Kernel;
use crate::launch::{launch, params};
use crate::plan::few::FewPlan;
use crate::ring::{GateUpRing, Routes};
use crate::route::{ChoiceParams, RouteParams};
use crate::{Cuda, CudaStream};

params! {
    GateUpFewParams { gate_up: GroupedParams, route: RouteParams, rehearse: u32, zero: u32 }
}

params! {
    DownCombineFewParams { combine: DownCombineParams, route: RouteParams }
}

impl Routes {
    /// Those of so many tokens, of so many experts.
    pub(crate) fn of(self, tokens: usize, experts: usize) -> Self {
        let choice = ChoiceParams { experts_total: experts as u32, ..self.params.choice };
        Self { params: RouteParams { choice, tokens: tokens as u64, ..self.params }, ..self }
    }
}

/// [`gate_up_ring`](crate::ring::gate_up_ring) of x `[T, H]`; out is `[T K, I]`, by slot, its columns in the order that
/// [`down_combine_few`] reads (`place_of` in `include/few.cuh`).
///
/// `rehearse`: the launch is to go once through what comes before its first products while it waits for its turn.
///
/// Errors: `Misaligned`.
pub(crate) fn gate_up_few(
    cuda: &Cuda,
    stream: &CudaStream,
    operands: &GateUpRing<'_>,
    rehearse: bool,
    plan: FewPlan,
) -> Result<()> {
    let (gate_up, product) = (operands.params()?, operands.product());
    let &Routes { params: route, logits, lane_logits } = operands.routes;
    let kernel =
        Kernel::GateUpFew { product, format: operands.x.dtype(), choice: (logits, lane_logits), tile: plan.tile };
    if let Some(recorder) = cuda.recorder() {
        recorder.explain(plan.why);
    }
    launch(cuda, stream, kernel, plan.grid, &GateUpFewParams { gate_up, route, rehearse: rehearse.into(), zero: 0 })
}

/// [`down_combine_ring`](crate::ring::down_combine_ring) of the slots of all tokens, in order.
///
/// Errors: `Misaligned`.
pub(crate) fn down_combine_few(
    cuda: &Cuda,
    stream: &CudaStream,
    operands: &DownCombine<'_>,
    routes: &Routes,
    plan: FewPlan,
) -> Result<()> {
    let &Routes { params: route, logits, lane_logits } = routes;
    let params = DownCombineFewParams { combine: operands.params()?, route };
    let kernel = Kernel::DownCombineFew { format: operands.a.dtype(), choice: (logits, lane_logits), tile: plan.tile };
    if let Some(recorder) = cuda.recorder() {
        recorder.explain(plan.why);
    }
    launch(cuda, stream, kernel, plan.grid, &params)
}
