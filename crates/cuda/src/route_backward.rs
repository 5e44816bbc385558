use crate::backward::Target;
use crate::error::Result;
use crate::launch::{Tensor, launch, params};
use crate::route::{normalize_code, scale_code, score_code};
use crate::{Cuda, CudaStream, plan};
use fused_moe_core::config::{Selection, WeightValue};
use fused_moe_core::operation::RouteBackward;

params! {
    RouteBackwardParams {
        logits: Tensor, experts: Tensor, d_weights: Tensor, scale: Tensor, out: Tensor, tokens: u64,
        experts_total: u32, top_k: u32, score: u32, sparse_mixer: u32, softmax_of_chosen: u32, scale_when: u32,
        normalize: u32, accumulate: u32, jitter: f32, normalize_by: f32, weight_scale: f32,
    }
}

pub(crate) fn route_backward(cuda: &Cuda, stream: &CudaStream, operands: &RouteBackward<'_, Cuda>) -> Result<()> {
    let problem = operands.problem()?;
    let rule = problem.rule;
    let (normalize, normalize_by) = normalize_code(rule.weights.normalize);
    let jitter = match rule.selection {
        Selection::SparseMixer { jitter } => Some(jitter),
        _ => None,
    };
    let params = RouteBackwardParams {
        logits: Tensor::of(&operands.logits)?,
        experts: Tensor::of(&operands.experts)?,
        d_weights: Tensor::of(&operands.d_weights)?,
        scale: Tensor::maybe(operands.expert_scale.as_ref())?,
        tokens: problem.tokens as u64,
        experts_total: problem.experts as u32,
        top_k: problem.top_k as u32,
        score: score_code(rule.score),
        sparse_mixer: jitter.is_some().into(),
        softmax_of_chosen: (rule.weights.value == WeightValue::SoftmaxOfChosen).into(),
        scale_when: scale_code(rule.weights.expert_scale),
        normalize,
        normalize_by,
        jitter: jitter.unwrap_or_default(),
        weight_scale: rule.weights.scale,
        ..RouteBackwardParams::default()
    };
    if let Some(Target { out, accumulate }) = Target::maybe(&operands.d_logits)? {
        let plan = plan::backward::route(&problem, operands.logits.dtype());
        launch(cuda, stream, plan.kernel, plan.grid, &RouteBackwardParams { out, accumulate, ..params })?;
    }
    match Target::maybe(&operands.d_expert_scale)? {
        Some(Target { out, accumulate }) => {
            let plan = plan::backward::route_scale(&problem, operands.logits.dtype());
            launch(cuda, stream, plan.kernel, plan.grid, &RouteBackwardParams { out, accumulate, ..params })
        }
        None => Ok(()),
    }
}
