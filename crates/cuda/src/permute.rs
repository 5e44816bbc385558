use crate::error::Result;
use crate::launch::{Grid, Tensor, launch, params};
use crate::{Cuda, CudaStream, kernel::Kernel, plan};
use fused_moe_core::operation::{Permute, TileSchedule};

params! {
    PermuteParams {
        experts: Tensor, row_slot: Tensor, slot_row: Tensor, offsets: Tensor, slots: u64, slots_per_block: u64,
        blocks: u64, status: u64, experts_total: u32, top_k: u32, first: u32, end: u32, parts: u32,
        zero: u32, counters: u64,
    }
}

params! {
    TileScheduleParams {
        offsets: Tensor, tiles: Tensor, count: Tensor, capacity: u64, experts_total: u32, tile_rows: u32,
    }
}

pub(crate) fn permute(cuda: &Cuda, stream: &CudaStream, operands: Permute<'_, Cuda>) -> Result<()> {
    permute_counted(cuda, stream, operands, 0)
}

/// The same, and the counters at this address, if it is not 0, become 0.
pub(crate) fn permute_counted(
    cuda: &Cuda,
    stream: &CudaStream,
    operands: Permute<'_, Cuda>,
    counters: u64,
) -> Result<()> {
    let problem = operands.problem()?;
    let plan = plan::permute(&problem, cuda.numbers());
    let params = PermuteParams {
        experts: Tensor::of(&operands.experts)?,
        row_slot: Tensor::of(&operands.row_slot)?,
        slot_row: Tensor::of(&operands.slot_row)?,
        offsets: Tensor::of(&operands.offsets)?,
        slots: problem.slots as u64,
        slots_per_block: plan.slots_per_block as u64,
        blocks: plan.blocks as u64,
        status: stream.status_address(),
        experts_total: problem.experts as u32,
        top_k: operands.experts.cols() as u32,
        first: problem.first as u32,
        end: problem.end as u32,
        parts: plan.parts as u32,
        zero: 0,
        counters,
    };
    plan.launches.iter().flatten().try_for_each(|plan| launch(cuda, stream, plan.kernel, plan.grid, &params))
}

pub(crate) fn tile_schedule(cuda: &Cuda, stream: &CudaStream, operands: TileSchedule<'_, Cuda>) -> Result<()> {
    let experts = operands.problem()?;
    let params = TileScheduleParams {
        offsets: Tensor::of(&operands.offsets)?,
        tiles: Tensor::of(&operands.tiles)?,
        count: Tensor::of(&operands.count)?,
        capacity: operands.tiles.rows() as u64,
        experts_total: experts as u32,
        tile_rows: u32::try_from(operands.tile_rows).unwrap_or(u32::MAX),
    };
    launch(cuda, stream, Kernel::TileSchedule, Grid::line(1, 1024).with_shared(4 * (experts + 1)), &params)
}
