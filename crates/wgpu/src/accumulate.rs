use crate::error::Result;
use crate::kernel::Kernel;
use crate::launch::{Operand, Tensor, launch, params, tensor};
use crate::plan::{pairs, pieces};
use crate::{Wgpu, WgpuStream};
use fused_moe_core::operation::{Accumulate, Factor, Zero};

params! {
    ZeroParams { out: Tensor, rows: u32, width: u32 }
}

params! {
    AccumulateParams { acc: Tensor, weights: Tensor, y: Tensor, rows: u32, width: u32, weight: f32, per_column: u32 }
}

pub(crate) fn zero(wgpu: &Wgpu, stream: &WgpuStream, operands: Zero<'_, Wgpu>) -> Result<()> {
    let (problem, out) = (operands.problem()?, &operands.out);
    for rows in pieces(wgpu, problem.rows, out.row_stride() * out.dtype().size()) {
        let count = rows.len() as u32;
        let out = Operand::rows(wgpu.device(), "zero", out, rows)?;
        let params = ZeroParams { out: out.tensor, rows: count, width: problem.width as u32 };
        launch(wgpu, stream, Kernel::Zero, &[Some(out)], (pairs(count, problem.width), &params))?;
    }
    Ok(())
}

/// `acc += w * y`, or `acc = w * y` where it is assigned.
pub(crate) fn accumulate(wgpu: &Wgpu, stream: &WgpuStream, operands: Accumulate<'_, Wgpu>, assign: bool) -> Result<()> {
    let (problem, device) = (operands.problem()?, wgpu.device());
    let (weights, weight) = match &operands.weight {
        Factor::Value(weight) => (None, *weight),
        Factor::PerRow(weights) => (Some(Operand::column(device, "accumulate", weights)?), 0.0),
        Factor::PerColumn(weights) => (Some(Operand::of(device, "accumulate", weights)?), 0.0),
    };
    let per_column = matches!(operands.weight, Factor::PerColumn(_));
    let (y, acc) = (&operands.y, &operands.acc);
    for rows in pieces(wgpu, problem.rows, 4 * acc.row_stride().max(y.row_stride())) {
        let (count, mut place) = (rows.len() as u32, tensor(&weights));
        if !per_column {
            place.offset += rows.start as u32 * place.stride;
        }
        let y = Operand::rows(device, "accumulate", y, rows.clone())?;
        let acc = Operand::rows(device, "accumulate", acc, rows)?;
        let width = problem.hidden as u32;
        let (acc_place, y_place, per_column) = (acc.tensor, y.tensor, per_column.into());
        let params =
            AccumulateParams { acc: acc_place, weights: place, y: y_place, rows: count, width, weight, per_column };
        let operands = [weights, Some(y), Some(acc)];
        let kernel = Kernel::Accumulate { assign };
        launch(wgpu, stream, kernel, &operands, (pairs(count, problem.hidden), &params))?;
    }
    Ok(())
}
