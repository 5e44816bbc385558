use crate::error::Result;
use crate::gradient::{Part, Sums, TOLD, Target, told};
use crate::kernel::{BackwardKernel, Kernel};
use crate::launch::{Groups, Operand, Tensor, launch, params, tensor};
use crate::plan::{room, threads_of_token};
use crate::route::normalize_by;
use crate::{Wgpu, WgpuStream};
use fused_moe_core::config::{RoutingRule, Selection};
use fused_moe_core::operation::{GradientMode, RouteBackward};
use fused_moe_core::problem::RouteBackwardProblem;
use std::ops::Range;

params! {
    RouteBackwardParams {
        logits: Tensor, experts: Tensor, d_weights: Tensor, scale: Tensor, out: Tensor, shares: Tensor,
        tokens: u32, experts_total: u32, top_k: u32, jitter: f32, normalize_by: f32, weight_scale: f32, adds: u32,
    }
}

params! {
    ScaleParams {
        experts: Tensor, shares: Tensor, before: Tensor, out: Tensor, slots: u32, experts_total: u32, top_k: u32,
        adds: u32,
    }
}

const NAME: &str = "route_backward";
/// Experts of a workgroup that adds up what slots add to their scales.
pub(crate) const SCALES: usize = 256;

/// A launch for each window of the tokens; and one for what they add to the scales, which goes by the scratch.
pub(crate) fn route_backward(wgpu: &Wgpu, stream: &WgpuStream, operands: RouteBackward<'_, Wgpu>) -> Result<()> {
    let problem = operands.problem()?;
    let RouteBackward { logits, experts, d_weights, d_logits, d_expert_scale, .. } = &operands;
    let to = d_logits.as_ref().map_or(0, |to| to.view.row_stride());
    let stride = logits.row_stride().max(experts.row_stride()).max(d_weights.row_stride()).max(to);
    let mut at_once = (room(wgpu) / (4 * stride.max(1))).max(1);
    if d_expert_scale.is_some() {
        at_once = at_once.min(TOLD / problem.top_k.max(1)).max(1);
    }
    let launches = problem.tokens.div_ceil(at_once).max(1);
    // what each slot adds to its expert's scale, and the sums of that
    let sums = match d_expert_scale {
        Some(to) => Some((stream.scratch()?, Sums::new((wgpu, stream), NAME, &to.view, launches)?)),
        None => None,
    };
    let shares = sums.as_ref().map(|(scratch, _)| told(scratch));
    for number in 0..launches {
        let tokens = number * at_once..problem.tokens.min((number + 1) * at_once);
        let part = Part { number, count: launches };
        logits_of(wgpu, stream, &operands, (&problem, tokens.clone()), shares)?;
        if let (Some(to), Some((_, sums)), Some(shares)) = (d_expert_scale, &sums, shares) {
            let out = Operand::of(wgpu.device(), NAME, &to.view)?;
            let target = sums.target(out, (part, to.mode));
            scales(wgpu, stream, &operands, (&problem, tokens), (shares, &target))?;
        }
    }
    Ok(())
}

/// The same rule where all selections are alike that have the same gradient.
fn without_selection(rule: RoutingRule) -> RoutingRule {
    let selection = match rule.selection {
        Selection::SparseMixer { .. } => rule.selection,
        Selection::TopK { .. } | Selection::Table => Selection::default(),
    };
    RoutingRule { selection, ..rule }
}

fn logits_of(
    wgpu: &Wgpu,
    stream: &WgpuStream,
    operands: &RouteBackward<'_, Wgpu>,
    (problem, tokens): (&RouteBackwardProblem, Range<usize>),
    shares: Option<Operand<'_>>,
) -> Result<()> {
    let device = wgpu.device();
    let logits = Operand::rows(device, NAME, &operands.logits, tokens.clone())?;
    let experts = Operand::rows(device, NAME, &operands.experts, tokens.clone())?;
    let d_weights = Operand::rows(device, NAME, &operands.d_weights, tokens.clone())?;
    let scale = Operand::maybe(device, NAME, operands.expert_scale.as_ref())?;
    let out = match &operands.d_logits {
        Some(to) => Some(Operand::rows(device, NAME, &to.view, tokens.clone())?),
        None => None,
    };
    let rule = without_selection(problem.rule);
    let params = RouteBackwardParams {
        logits: logits.tensor,
        experts: experts.tensor,
        d_weights: d_weights.tensor,
        scale: tensor(&scale),
        out: tensor(&out),
        shares: tensor(&shares),
        tokens: tokens.len() as u32,
        experts_total: problem.experts as u32,
        top_k: problem.top_k as u32,
        jitter: if let Selection::SparseMixer { jitter } = rule.selection { jitter } else { 0.0 },
        normalize_by: normalize_by(&rule),
        weight_scale: rule.weights.scale,
        adds: operands.d_logits.as_ref().is_some_and(|to| to.mode == GradientMode::Accumulate).into(),
    };
    let (threads, keys) = threads_of_token(problem.experts);
    let kernel = Kernel::Backward(BackwardKernel::Route { rule: (&rule).into(), threads, keys });
    let bound = [Some(logits), Some(experts), Some(d_weights), scale, out, shares];
    launch(wgpu, stream, kernel, &bound, (Groups::Line(tokens.len() as u64), &params))
}

fn scales(
    wgpu: &Wgpu,
    stream: &WgpuStream,
    operands: &RouteBackward<'_, Wgpu>,
    (problem, tokens): (&RouteBackwardProblem, Range<usize>),
    (shares, target): (Operand<'_>, &Target<'_>),
) -> Result<()> {
    let experts = Operand::rows(wgpu.device(), NAME, &operands.experts, tokens.clone())?;
    let params = ScaleParams {
        experts: experts.tensor,
        shares: shares.tensor,
        before: tensor(&target.before),
        out: target.out.tensor,
        slots: (tokens.len() * problem.top_k) as u32,
        experts_total: problem.experts as u32,
        top_k: problem.top_k as u32,
        adds: target.adds.into(),
    };
    let groups = Groups::Line(problem.experts.div_ceil(SCALES) as u64);
    let bound = [Some(experts), Some(shares), target.before, Some(target.out)];
    launch(wgpu, stream, Kernel::Backward(BackwardKernel::RouteScale), &bound, (groups, &params))
}
