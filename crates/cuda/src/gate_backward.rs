//! The gradients of the router's product, and of an RMSNorm.

use crate::backward::Target;
use crate::error::Result;
use crate::grouped_backward::{GroupedBackward, Source, Stage, grouped_backward};
use crate::launch::{Tensor, launch, params};
use crate::{Cuda, CudaStream, plan};
use fused_moe_core::operation::{GateBackward, NormBackward};
use fused_moe_core::problem::{GateBackwardProblem, GroupedBackwardProblem};

params! {
    NormBackwardParams {
        x: Tensor, weight: Tensor, d_n: Tensor, d: Tensor, tokens: u64, hidden: u64, accumulate: u32, eps: f32,
    }
}

/// The grouped product with one expert.
pub(crate) fn gate_backward(cuda: &Cuda, stream: &CudaStream, operands: &GateBackward<'_, Cuda>) -> Result<()> {
    let GateBackwardProblem { tokens: rows, hidden: inputs, experts: outputs } = operands.problem()?;
    let n = match &operands.n {
        Some(n) => Some(Source { rows: Tensor::of(n)?, format: n.dtype(), top_k: None }),
        None => None,
    };
    let softcap = match (operands.softcap, &operands.logits) {
        (Some(limit), Some(logits)) => Some((Tensor::of(logits)?, limit)),
        _ => None,
    };
    let product = GroupedBackward {
        stage: Stage::Gate,
        problem: GroupedBackwardProblem { rows, experts: 1, outputs, inputs, matrices: operands.router.dtype() },
        groups: [Tensor::default(); 2],
        d: Source { rows: Tensor::of(&operands.d_logits)?, format: operands.d_logits.dtype(), top_k: None },
        x: n,
        weights: (Tensor::default(), 1),
        weights_are_ds: false,
        scale: operands.scale,
        softcap,
        matrices: (Tensor::of(&operands.router)?, 0),
        d_rows: Target::maybe(&operands.d_n)?,
        d_matrices: Target::maybe(&operands.d_router)?,
        d_bias: None,
    };
    grouped_backward(cuda, stream, &product)?;
    // the bias is added after the scale
    let d_bias = Target::maybe(&operands.d_bias)?;
    let bias = GroupedBackward { scale: 1.0, d_rows: None, d_matrices: None, d_bias, ..product };
    grouped_backward(cuda, stream, &bias)
}

pub(crate) fn norm_backward(cuda: &Cuda, stream: &CudaStream, operands: &NormBackward<'_, Cuda>) -> Result<()> {
    let problem = operands.problem()?;
    let params = NormBackwardParams {
        x: Tensor::of(&operands.x)?,
        weight: Tensor::maybe(operands.weight.as_ref())?,
        d_n: Tensor::of(&operands.d_n)?,
        tokens: problem.tokens as u64,
        hidden: problem.hidden as u64,
        eps: operands.eps,
        ..NormBackwardParams::default()
    };
    if let Some(Target { out, accumulate }) = Target::maybe(&operands.d_x)? {
        let plan = plan::backward::norm(&problem);
        launch(cuda, stream, plan.kernel, plan.grid, &NormBackwardParams { d: out, accumulate, ..params })?;
    }
    match Target::maybe(&operands.d_weight)? {
        Some(Target { out, accumulate }) => {
            let plan = plan::backward::norm_weight(&problem, |n| params.x.aligned(n));
            launch(cuda, stream, plan.kernel, plan.grid, &NormBackwardParams { d: out, accumulate, ..params })
        }
        None => Ok(()),
    }
}
