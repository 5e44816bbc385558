use crate::backward::Target;
use crate::error::Result;
use crate::kernel::Kernel;
use crate::kernel::backward::BackwardKernel;
use crate::launch::{Tensor, launch, params};
use crate::plan::pieces::Pieces;
use crate::{Cuda, CudaStream, plan};
use fused_moe_core::operation::{
    CombineBackward, DownBias, RowsGradient, SharedBackward, SlotRows, WeightsFrom, WeightsGradient,
};
use fused_moe_core::problem::CombineBackwardProblem;

params! {
    CombineBackwardRowsParams {
        d_out: Tensor, d_rows: Tensor, weights: Tensor, slot_row: u64, slots: u64, width: u64, top_k: u32,
        lanes: u32, routed_scale: f32,
    }
}

params! {
    CombineBackwardWeightsParams {
        y: Tensor, d: Tensor, bias: Tensor, experts: Tensor, d_out: Tensor, out: Tensor, slot_row: u64, slots: u64,
        width: u64, hidden: u64, top_k: u32, experts_total: u32, d_of_token: u32, accumulate: u32, routed_scale: f32,
    }
}

params! {
    CombineBackwardSharedParams {
        d_out: Tensor, y: Tensor, factor: Tensor, logit: Tensor, d_y: Tensor, d_gate: Tensor, tokens: u64, hidden: u64,
        accumulate: u32, scale: f32,
    }
}

pub(crate) fn combine_backward(cuda: &Cuda, stream: &CudaStream, operands: CombineBackward<'_, Cuda>) -> Result<()> {
    let problem = operands.problem()?;
    let call = Call { cuda, stream, problem, d_out: Tensor::of(&operands.d_out)?, scale: operands.routed_scale };
    if let Some(to) = &operands.d_rows {
        call.rows(to, Tensor::maybe(operands.weights.as_ref())?)?;
    }
    if let Some(weights) = &operands.d_weights {
        call.weights(weights)?;
    }
    match &operands.shared {
        Some(shared) => call.shared(shared),
        None => Ok(()),
    }
}

/// What the three have in common.
struct Call<'a> {
    cuda: &'a Cuda,
    stream: &'a CudaStream,
    problem: CombineBackwardProblem,
    d_out: Tensor,
    scale: f32,
}

impl Call<'_> {
    fn slots(&self) -> usize {
        self.problem.tokens * self.problem.top_k
    }

    fn rows(&self, to: &RowsGradient<'_, Cuda>, weights: Tensor) -> Result<()> {
        let (d_rows, slot_row) = match to {
            RowsGradient::Slots(view) => (Tensor::of(view)?, Tensor::default()),
            RowsGradient::Permuted { d_y, slot_row } => (Tensor::of(d_y)?, Tensor::of(slot_row)?),
        };
        let CombineBackwardProblem { top_k, hidden, .. } = self.problem;
        let pieces = Pieces::of(&[self.d_out, d_rows], hidden, true);
        let (grid, lanes) = pieces.grid_of_groups(self.slots(), hidden);
        let params = CombineBackwardRowsParams {
            d_out: self.d_out,
            d_rows,
            weights,
            slot_row: slot_row.data,
            slots: self.slots() as u64,
            width: hidden as u64,
            top_k: top_k as u32,
            lanes,
            routed_scale: self.scale,
        };
        let kernel = Kernel::Backward(BackwardKernel::CombineRows { pieces });
        launch(self.cuda, self.stream, kernel, grid, &params)
    }

    fn weights(&self, weights: &WeightsGradient<'_, Cuda>) -> Result<()> {
        let CombineBackwardProblem { top_k, hidden, intermediate, experts, .. } = self.problem;
        let to = Target::of(&weights.out)?;
        let mut params = CombineBackwardWeightsParams {
            d_out: self.d_out,
            out: to.out,
            slots: self.slots() as u64,
            width: hidden as u64,
            hidden: hidden as u64,
            top_k: top_k as u32,
            experts_total: experts as u32,
            accumulate: to.accumulate,
            routed_scale: self.scale,
            ..CombineBackwardWeightsParams::default()
        };
        match &weights.from {
            WeightsFrom::Rows(rows) => {
                let (y, slot_row) = match rows {
                    SlotRows::Slots(y) => (y, None),
                    SlotRows::Permuted { y, slot_row } => (y, Some(slot_row)),
                };
                (params.y, params.slot_row) = (Tensor::of(y)?, Tensor::maybe(slot_row)?.data);
                (params.d, params.d_of_token) = (self.d_out, 1);
            }
            WeightsFrom::Intermediate { a, d_a, slot_row, bias } => {
                (params.y, params.d, params.slot_row) = (Tensor::of(a)?, Tensor::of(d_a)?, Tensor::of(slot_row)?.data);
                params.width = intermediate as u64;
                if let Some(DownBias { bias, experts }) = bias {
                    (params.bias, params.experts) = (Tensor::of(bias)?, Tensor::of(experts)?);
                }
            }
        }
        let aligned = |n: u64| params.width.is_multiple_of(n) && params.y.aligned(n) && params.d.aligned(n);
        let plan = plan::backward::combine_weights(self.slots(), aligned);
        launch(self.cuda, self.stream, plan.kernel, plan.grid, &params)
    }

    fn shared(&self, shared: &SharedBackward<'_, Cuda>) -> Result<()> {
        let column = |view: Option<_>| view.map_or(Ok(Tensor::default()), Tensor::column);
        let d_gate = shared.d_gate.as_ref().map(Target::column).transpose()?.unwrap_or_default();
        let params = CombineBackwardSharedParams {
            d_out: self.d_out,
            y: Tensor::maybe(shared.y.as_ref())?,
            factor: column(shared.factor.as_ref())?,
            logit: column(shared.logit.as_ref())?,
            d_y: Tensor::maybe(shared.d_y.as_ref())?,
            d_gate: d_gate.out,
            tokens: self.problem.tokens as u64,
            hidden: self.problem.hidden as u64,
            accumulate: d_gate.accumulate,
            scale: shared.scale,
        };
        let aligned = |n: u64| [params.d_out, params.y, params.d_y].iter().all(|operand| operand.aligned(n));
        let plan = plan::backward::combine_shared(&self.problem, aligned);
        launch(self.cuda, self.stream, plan.kernel, plan.grid, &params)
    }
}
