use crate::error::Result;
use crate::launch::{Tensor, launch, params};
use crate::{Cuda, CudaStream, plan};
use fused_moe_core::config::{CapacityLimit, CapacityOrder};
use fused_moe_core::operation::DropOverflow;

params! {
    DropOverflowParams {
        row_slot: Tensor, slot_row: Tensor, offsets: Tensor, importance: Tensor, sequences: Tensor,
        experts: Tensor, weights: Tensor, tokens: u64, slots: u64,
        top_k: u32, experts_total: u32, sequence_count: u32, limit_kind: u32, limit: u32, fraction: f64,
        by_score: u32, renormalize: u32, least_sum: f32,
    }
}

pub(crate) fn drop_overflow(cuda: &Cuda, stream: &CudaStream, operands: &DropOverflow<'_, Cuda>) -> Result<()> {
    let problem = operands.problem()?;
    // a number of slots or a factor that u32 cannot hold is as good as any larger than their count
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let (limit_kind, limit, fraction) = match problem.capacity.limit {
        CapacityLimit::Slots(slots) => (0, number(slots), 0.0),
        CapacityLimit::Fraction(fraction) => (1, 0, fraction),
        CapacityLimit::EvenShare { factor } => (2, number(factor), 0.0),
    };
    let importance = operands.importance.as_ref();
    let params = DropOverflowParams {
        row_slot: Tensor::of(&operands.permutation.row_slot)?,
        slot_row: Tensor::of(&operands.permutation.slot_row)?,
        offsets: Tensor::of(&operands.permutation.offsets)?,
        importance: importance.map_or(Ok(Tensor::default()), Tensor::column)?,
        sequences: Tensor::maybe(operands.sequences.as_ref())?,
        experts: Tensor::of(&operands.experts)?,
        weights: Tensor::of(&operands.weights)?,
        tokens: problem.tokens as u64,
        slots: (problem.tokens * problem.top_k) as u64,
        top_k: problem.top_k as u32,
        experts_total: problem.experts as u32,
        sequence_count: number(problem.sequences),
        limit_kind,
        limit,
        fraction,
        by_score: (problem.capacity.order == CapacityOrder::Score).into(),
        renormalize: problem.capacity.renormalize.is_some().into(),
        least_sum: problem.capacity.renormalize.unwrap_or(0.0),
    };
    let plan = plan::drop_overflow(&problem);
    launch(cuda, stream, plan.kernel, plan.grid, &params)
}
