//! What is added to a model's loss so that the router behaves.

use crate::accumulate::zero;
use crate::backward::Target;
use crate::error::Result;
use crate::launch::{Tensor, launch, params};
use crate::route::score_code;
use crate::{Cuda, CudaStream, plan};
use fused_moe_core::operation::{Gradient, GradientMode, LoadBalanceLoss, ZLoss, Zero};

params! {
    LoadBalanceLossParams {
        logits: Tensor, experts: Tensor, out: Tensor, sequences: u64, tokens: u64, sequence_count: u64,
        experts_total: u32, top_k: u32, score: u32, accumulate: u32, coefficient: f32,
    }
}

params! {
    ZLossParams { logits: Tensor, out: Tensor, tokens: u64, experts_total: u32, accumulate: u32, coefficient: f32 }
}

pub(crate) fn load_balance_loss(cuda: &Cuda, stream: &CudaStream, operands: LoadBalanceLoss<'_, Cuda>) -> Result<()> {
    let problem = operands.problem()?;
    let format = operands.logits.dtype();
    let params = LoadBalanceLossParams {
        logits: Tensor::of(&operands.logits)?,
        experts: Tensor::of(&operands.experts)?,
        sequences: Tensor::maybe(operands.sequences.as_ref())?.data,
        tokens: problem.tokens as u64,
        sequence_count: problem.sequences as u64,
        experts_total: problem.experts as u32,
        top_k: problem.top_k as u32,
        score: score_code(operands.score),
        coefficient: operands.coefficient,
        ..LoadBalanceLossParams::default()
    };
    if let Some(Target { out, accumulate }) = Target::maybe(&operands.loss)? {
        let plan = plan::backward::load_balance_loss(&problem, format);
        launch(cuda, stream, plan.kernel, plan.grid, &LoadBalanceLossParams { out, accumulate, ..params })?;
    }
    let Some(gradient) = operands.d_logits else { return Ok(()) };
    let out = Tensor::of(&gradient.view)?;
    // tokens of no sequence, or without probabilities, have zeros: what is there is added to
    if let Gradient { view, mode: GradientMode::Assign } = gradient {
        zero(cuda, stream, Zero { out: view })?;
    }
    let plan = plan::backward::load_balance_loss_logits(&problem, format);
    launch(cuda, stream, plan.kernel, plan.grid, &LoadBalanceLossParams { out, accumulate: 1, ..params })
}

pub(crate) fn z_loss(cuda: &Cuda, stream: &CudaStream, operands: &ZLoss<'_, Cuda>) -> Result<()> {
    let problem = operands.problem()?;
    let format = operands.logits.dtype();
    let params = ZLossParams {
        logits: Tensor::of(&operands.logits)?,
        tokens: problem.tokens as u64,
        experts_total: problem.experts as u32,
        coefficient: operands.coefficient,
        ..ZLossParams::default()
    };
    if let Some(Target { out, accumulate }) = Target::maybe(&operands.loss)? {
        let plan = plan::backward::z_loss(format);
        launch(cuda, stream, plan.kernel, plan.grid, &ZLossParams { out, accumulate, ..params })?;
    }
    match Target::maybe(&operands.d_logits)? {
        Some(Target { out, accumulate }) => {
            let plan = plan::backward::z_loss_logits(&problem, format);
            launch(cuda, stream, plan.kernel, plan.grid, &ZLossParams { out, accumulate, ..params })
        }
        None => Ok(()),
    }
}
