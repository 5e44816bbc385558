//! One token whose slots are its rows: its experts in two launches, each of which finds the routes for itself.

use crate::activation::constants;
use crate::down_combine::{DownCombine, DownCombineParams};
use crate::error::Result;
use crate::grouped::{GroupedParams, Product, Stage};
use crate::kernel::Kernel;
use crate::launch::{Tensor, launch, params};
use crate::memory::{Mut, Ref};
use crate::pack::Experts;
use crate::plan::ring::RingPlan;
use crate::route::{ChoiceParams, RouteParams};
use crate::{Cuda, CudaStream};
use fused_moe_core::config::Activation;
use fused_moe_core::{DType, Routing, View};

params! {
    GateUpRingParams { gate_up: GroupedParams, route: RouteParams, write: u32, zero: u32 }
}

params! {
    DownCombineRingParams { combine: DownCombineParams, route: RouteParams }
}

/// What a block finds the routes by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Routes {
    pub(crate) params: RouteParams,
    pub(crate) logits: DType,
    /// Logits of a lane of the warp that chooses; 0: the routes are there already.
    pub(crate) lane_logits: u8,
}

impl Routes {
    /// Those that earlier launches than the one before wrote, or are sure to have written by its turn.
    pub(crate) fn there(routing: &Routing<'_, Cuda>) -> Result<Self> {
        let choice = ChoiceParams {
            experts: Tensor::of(&routing.experts)?,
            weights: Tensor::of(&routing.weights)?,
            top_k: routing.experts.cols() as u32,
            ..ChoiceParams::default()
        };
        let params = RouteParams { choice, tokens: 1, ..RouteParams::default() };
        Ok(Self { params, logits: DType::F32, lane_logits: 0 })
    }
}

/// Operands of [`gate_up_ring`], for one token, and of [`gate_up_few`](crate::few::gate_up_few).
pub(crate) struct GateUpRing<'a> {
    /// `[T, H]`.
    pub(crate) x: View<Ref<'a>>,
    pub(crate) routes: &'a Routes,
    pub(crate) matrices: &'a Experts,
    pub(crate) activation: Activation,
    /// Whether a slot's weight multiplies what its expert reads.
    pub(crate) on_input: bool,
    /// Written: `[T K, I]`, by slot.
    pub(crate) out: View<Mut<'a>>,
}

impl GateUpRing<'_> {
    /// Errors: `Misaligned`.
    pub(crate) fn params(&self) -> Result<GroupedParams> {
        let (limit, alpha) = constants(self.activation);
        let weights = Tensor { data: self.routes.params.choice.weights.data, ..Tensor::default() };
        Ok(GroupedParams {
            x: Tensor::of(&self.x)?,
            out: Tensor::of(&self.out)?,
            input_weights: if self.on_input { weights } else { Tensor::default() },
            rows: self.out.rows() as u64,
            // pairs and fours of outputs are aligned in rows of a multiple of 8
            neighbours: Tensor::of(&self.out)?.aligned(4).into(),
            limit,
            alpha,
            ..self.matrices.gate_up().params()
        })
    }

    pub(crate) fn product(&self) -> Product {
        let (gated, activation) = (self.activation.is_gated(), Some(self.activation.into()));
        Product { stage: Stage::GateUp, gather: true, gated, activation }
    }
}

/// `out[k] = act(gate_k . x) * (up_k . x)` for the experts that are chosen.
///
/// `write`: the routes are written where `routes` says, if they were not there; [`down_combine_ring`] does that too.
///
/// Errors: `Misaligned`.
pub(crate) fn gate_up_ring(
    cuda: &Cuda,
    stream: &CudaStream,
    operands: &GateUpRing<'_>,
    write: bool,
    plan: RingPlan,
) -> Result<()> {
    let (gate_up, product) = (operands.params()?, operands.product());
    let &Routes { params: route, logits, lane_logits } = operands.routes;
    let kernel =
        Kernel::GateUpRing { product, format: operands.x.dtype(), choice: (logits, lane_logits), ring: plan.ring() };
    if let Some(recorder) = cuda.recorder() {
        recorder.explain(plan.why);
    }
    launch(cuda, stream, kernel, plan.grid, &GateUpRingParams { gate_up, route, write: write.into(), zero: 0 })
}

/// [`down_combine`](crate::down_combine::down_combine) of the routes that [`gate_up_ring`] found, which are written to its
/// operands' experts and weights if they were not there. What `routes` reads was there when the launch before began.
///
/// Errors: `Misaligned`.
pub(crate) fn down_combine_ring(
    cuda: &Cuda,
    stream: &CudaStream,
    operands: &DownCombine<'_>,
    routes: &Routes,
    plan: RingPlan,
) -> Result<()> {
    let &Routes { params: route, logits, lane_logits } = routes;
    let params = DownCombineRingParams { combine: operands.params()?, route };
    let kernel =
        Kernel::DownCombineRing { format: operands.a.dtype(), choice: (logits, lane_logits), ring: plan.ring() };
    if let Some(recorder) = cuda.recorder() {
        recorder.explain(plan.why);
    }
    launch(cuda, stream, kernel, plan.grid, &params)
}
