use crate::error::Result;
use crate::launch::{Tensor, launch, params};
use crate::{Cuda, CudaStream, plan};
use fused_moe_core::operation::Linear;

params! {
    LinearParams { x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, rows: u64, inner: u64, outer: u64 }
}

pub(crate) fn linear(cuda: &Cuda, stream: &CudaStream, operands: Linear<'_, Cuda>) -> Result<()> {
    let problem = operands.problem()?;
    let out = if problem.outer == 1 { Tensor::column(&operands.out)? } else { Tensor::of(&operands.out)? };
    let params = LinearParams {
        x: Tensor::of(&operands.x)?,
        weight: Tensor::of(&operands.weight)?,
        bias: Tensor::maybe(operands.bias.as_ref())?,
        out,
        rows: problem.rows as u64,
        inner: problem.inner as u64,
        outer: problem.outer as u64,
    };
    let plan = plan::linear(&problem, |n| params.x.aligned(n) && params.weight.aligned(n), cuda.numbers());
    launch(cuda, stream, plan.kernel, plan.grid, &params)
}
