use crate::error::Result;
use crate::gradient::{Part, Sums, TOLD, Target, told};
use crate::kernel::{BackwardKernel, Kernel};
use crate::launch::{Groups, Operand, Tensor, launch, params, tensor};
use crate::plan::{backward as plan, room};
use crate::{Wgpu, WgpuStream};
use fused_moe_core::operation::{GradientMode, NormBackward};
use fused_moe_core::problem::NormBackwardProblem;
use std::ops::Range;

params! {
    NormBackwardParams {
        x: Tensor, d_n: Tensor, weight: Tensor, factors: Tensor, out: Tensor, tokens: u32, hidden: u32, eps: f32,
        adds: u32,
    }
}

params! {
    WeightParams {
        x: Tensor, d_n: Tensor, factors: Tensor, before: Tensor, out: Tensor, tokens: u32, hidden: u32, adds: u32,
    }
}

const NAME: &str = "norm_backward";

/// Two launches for each window of the tokens: of the rows, and of what they add to the weight's gradient.
pub(crate) fn norm_backward(wgpu: &Wgpu, stream: &WgpuStream, operands: NormBackward<'_, Wgpu>) -> Result<()> {
    let problem = operands.problem()?;
    let NormBackward { x, d_n, d_x, d_weight, .. } = &operands;
    let widest = x.row_stride().max(d_n.row_stride()).max(d_x.as_ref().map_or(0, |d_x| d_x.view.row_stride()));
    let at_once = (room(wgpu) / (4 * widest.max(1))).clamp(1, TOLD);
    let launches = problem.tokens.div_ceil(at_once).max(1);
    // the factors of the rows, and the sums over them
    let sums = match d_weight {
        Some(to) => Some((stream.scratch()?, Sums::new((wgpu, stream), NAME, &to.view, launches)?)),
        None => None,
    };
    let factors = sums.as_ref().map(|(scratch, _)| told(scratch));
    for number in 0..launches {
        let tokens = number * at_once..problem.tokens.min((number + 1) * at_once);
        let part = Part { number, count: launches };
        rows(wgpu, stream, &operands, (&problem, tokens.clone()), factors)?;
        if let (Some(to), Some((_, sums)), Some(factors)) = (d_weight, &sums, factors) {
            let out = Operand::of(wgpu.device(), NAME, &to.view)?;
            let target = sums.target(out, (part, to.mode));
            weight(wgpu, stream, &operands, (&problem, tokens), (factors, &target))?;
        }
    }
    Ok(())
}

fn rows(
    wgpu: &Wgpu,
    stream: &WgpuStream,
    operands: &NormBackward<'_, Wgpu>,
    (problem, tokens): (&NormBackwardProblem, Range<usize>),
    factors: Option<Operand<'_>>,
) -> Result<()> {
    let device = wgpu.device();
    let x = Operand::rows(device, NAME, &operands.x, tokens.clone())?;
    let d_n = Operand::rows(device, NAME, &operands.d_n, tokens.clone())?;
    let weight = Operand::maybe(device, NAME, operands.weight.as_ref())?;
    let out = match &operands.d_x {
        Some(d_x) => Some(Operand::rows(device, NAME, &d_x.view, tokens.clone())?),
        None => None,
    };
    let params = NormBackwardParams {
        x: x.tensor,
        d_n: d_n.tensor,
        weight: tensor(&weight),
        factors: tensor(&factors),
        out: tensor(&out),
        tokens: tokens.len() as u32,
        hidden: problem.hidden as u32,
        eps: operands.eps,
        adds: operands.d_x.as_ref().is_some_and(|d_x| d_x.mode == GradientMode::Accumulate).into(),
    };
    let groups = Groups::Line(tokens.len() as u64);
    let bound = [Some(x), Some(d_n), weight, factors, out];
    launch(wgpu, stream, Kernel::Backward(BackwardKernel::Norm), &bound, (groups, &params))
}

fn weight(
    wgpu: &Wgpu,
    stream: &WgpuStream,
    operands: &NormBackward<'_, Wgpu>,
    (problem, tokens): (&NormBackwardProblem, Range<usize>),
    (factors, target): (Operand<'_>, &Target<'_>),
) -> Result<()> {
    let device = wgpu.device();
    let x = Operand::rows(device, NAME, &operands.x, tokens.clone())?;
    let d_n = Operand::rows(device, NAME, &operands.d_n, tokens.clone())?;
    let params = WeightParams {
        x: x.tensor,
        d_n: d_n.tensor,
        factors: factors.tensor,
        before: tensor(&target.before),
        out: target.out.tensor,
        tokens: tokens.len() as u32,
        hidden: problem.hidden as u32,
        adds: target.adds.into(),
    };
    let groups = Groups::Line(plan::column_sums(1, problem.hidden));
    let bound = [Some(x), Some(d_n), Some(factors), target.before, Some(target.out)];
    launch(wgpu, stream, Kernel::Backward(BackwardKernel::NormWeight), &bound, (groups, &params))
}
