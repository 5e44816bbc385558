use crate::error::Result;
use crate::launch::{Tensor, launch, params};
use crate::{Cuda, CudaStream, kernel::Kernel, plan};
use fused_moe_core::operation::{Accumulate, Factor, Zero};

params! {
    ZeroParams { out: Tensor, rows: u64, width: u64 }
}

params! {
    AccumulateParams { acc: Tensor, weights: Tensor, y: Tensor, rows: u64, width: u64, weight: f32, per_column: u32 }
}

pub(crate) fn zero(cuda: &Cuda, stream: &CudaStream, operands: Zero<'_, Cuda>) -> Result<()> {
    let problem = operands.problem()?;
    let (rows, width) = (problem.rows, problem.width);
    let params = ZeroParams { out: Tensor::of(&operands.out)?, rows: rows as u64, width: width as u64 };
    launch(cuda, stream, Kernel::Zero, plan::elementwise(rows, width), &params)
}

pub(crate) fn accumulate(cuda: &Cuda, stream: &CudaStream, operands: Accumulate<'_, Cuda>) -> Result<()> {
    let problem = operands.problem()?;
    let (weights, weight) = match &operands.weight {
        Factor::Value(weight) => (Tensor::default(), *weight),
        Factor::PerRow(weights) => (Tensor::column(weights)?, 0.0),
        Factor::PerColumn(weights) => (Tensor::of(weights)?, 0.0),
    };
    let params = AccumulateParams {
        acc: Tensor::of(&operands.acc)?,
        weights,
        y: Tensor::of(&operands.y)?,
        rows: problem.rows as u64,
        width: problem.hidden as u64,
        weight,
        per_column: matches!(operands.weight, Factor::PerColumn(_)).into(),
    };
    launch(cuda, stream, Kernel::Accumulate, plan::elementwise(problem.rows, problem.hidden), &params)
}
