//! The losses on logits: a launch for each window of the tokens, and one that adds up.

use crate::error::Result;
use crate::gradient::{TOLD, told};
use crate::kernel::{BackwardKernel, Kernel};
use crate::launch::{Groups, Operand, Tensor, launch, params, tensor};
use crate::plan::{backward::tokens_of_loss, room, threads_of_token};
use crate::route::score_constant;
use crate::{Wgpu, WgpuStream};
use fused_moe_core::View;
use fused_moe_core::operation::{Gradient, GradientMode, LoadBalanceLoss, ZLoss};
use fused_moe_core::problem::LossProblem;
use std::ops::Range;

params! {
    LoadBalanceParams {
        logits: Tensor, experts: Tensor, sequences: Tensor, out: Tensor, shares: Tensor, tokens: u32,
        first_token: u32, all_tokens: u32, block: u32, experts_total: u32, top_k: u32, sequence_count: u32,
        factor: f32, adds: u32,
    }
}

params! {
    ZLossParams {
        logits: Tensor, out: Tensor, shares: Tensor, tokens: u32, block: u32, experts_total: u32, factor: f32,
        adds: u32,
    }
}

params! {
    LossSumParams { shares: Tensor, out: Tensor, count: u32, adds: u32 }
}

/// Windows of the tokens, and what their workgroups keep of the loss: `launch(tokens, block, first)` keeps a number for each
/// `block` tokens, from number `first` on.
fn blocks(
    wgpu: &Wgpu,
    tokens: usize,
    row_bytes: usize,
    mut launch: impl FnMut(Range<usize>, usize, usize) -> Result<()>,
) -> Result<usize> {
    let at_once = (room(wgpu) / row_bytes.max(1)).max(1);
    let windows = tokens.div_ceil(at_once);
    // each window may have one that is not full
    let block = tokens_of_loss(tokens, TOLD.saturating_sub(windows));
    let mut first = 0;
    for start in (0..tokens).step_by(at_once) {
        let some = start..tokens.min(start + at_once);
        let count = some.len().div_ceil(block);
        launch(some, block, first)?;
        first += count;
    }
    Ok(first)
}

fn is_added(gradient: &Option<Gradient<'_, Wgpu>>) -> u32 {
    gradient.as_ref().is_some_and(|gradient| gradient.mode == GradientMode::Accumulate).into()
}

/// Bytes from row to row.
fn row_bytes(logits: &View<crate::Ref<'_>>, d_logits: &Option<Gradient<'_, Wgpu>>) -> usize {
    4 * logits.row_stride().max(d_logits.as_ref().map_or(0, |to| to.view.row_stride()))
}

pub(crate) fn load_balance_loss(wgpu: &Wgpu, stream: &WgpuStream, operands: LoadBalanceLoss<'_, Wgpu>) -> Result<()> {
    const NAME: &str = "load_balance_loss";
    let (LossProblem { tokens, experts, top_k, sequences }, device) = (operands.problem()?, wgpu.device());
    let LoadBalanceLoss { logits, experts: ids, score, sequences: ends, coefficient, loss, d_logits } = &operands;
    let (ids, ends) = (Operand::of(device, NAME, ids)?, Operand::maybe(device, NAME, ends.as_ref())?);
    let (threads, keys) = threads_of_token(experts);
    let score = score_constant(*score);
    let kernel = Kernel::Backward(BackwardKernel::LoadBalance { score, threads, keys });
    let factor = f64::from(*coefficient) * experts as f64 / (top_k as f64 * sequences.max(1) as f64);
    let scratch = loss.as_ref().map(|_| stream.scratch()).transpose()?;
    let shares = scratch.as_ref().map(told);
    let kept = tensor(&shares);
    let count = blocks(wgpu, tokens, row_bytes(logits, d_logits), |some, block, first| {
        let logits = Operand::rows(device, NAME, logits, some.clone())?;
        let out = d_logits.as_ref().map(|to| Operand::rows(device, NAME, &to.view, some.clone())).transpose()?;
        let params = LoadBalanceParams {
            logits: logits.tensor,
            experts: ids.tensor,
            sequences: tensor(&ends),
            out: tensor(&out),
            shares: Tensor { offset: kept.offset + first as u32, ..kept },
            tokens: some.len() as u32,
            first_token: some.start as u32,
            all_tokens: tokens as u32,
            block: block as u32,
            experts_total: experts as u32,
            top_k: top_k as u32,
            sequence_count: sequences as u32,
            factor: factor as f32,
            adds: is_added(d_logits),
        };
        let groups = Groups::Line(some.len().div_ceil(block) as u64);
        launch(wgpu, stream, kernel, &[Some(logits), Some(ids), ends, out, shares], (groups, &params))
    })?;
    add_up((wgpu, stream, NAME), loss, (shares, count))
}

pub(crate) fn z_loss(wgpu: &Wgpu, stream: &WgpuStream, operands: ZLoss<'_, Wgpu>) -> Result<()> {
    const NAME: &str = "z_loss";
    let (LossProblem { tokens, experts, .. }, device) = (operands.problem()?, wgpu.device());
    let ZLoss { logits, coefficient, loss, d_logits } = &operands;
    let (threads, keys) = threads_of_token(experts);
    let kernel = Kernel::Backward(BackwardKernel::ZLoss { threads, keys });
    let scratch = loss.as_ref().map(|_| stream.scratch()).transpose()?;
    let shares = scratch.as_ref().map(told);
    let kept = tensor(&shares);
    let count = blocks(wgpu, tokens, row_bytes(logits, d_logits), |some, block, first| {
        let logits = Operand::rows(device, NAME, logits, some.clone())?;
        let out = d_logits.as_ref().map(|to| Operand::rows(device, NAME, &to.view, some.clone())).transpose()?;
        let params = ZLossParams {
            logits: logits.tensor,
            out: tensor(&out),
            shares: Tensor { offset: kept.offset + first as u32, ..kept },
            tokens: some.len() as u32,
            block: block as u32,
            experts_total: experts as u32,
            factor: (f64::from(*coefficient) / tokens as f64) as f32,
            adds: is_added(d_logits),
        };
        let groups = Groups::Line(some.len().div_ceil(block) as u64);
        launch(wgpu, stream, kernel, &[Some(logits), out, shares], (groups, &params))
    })?;
    add_up((wgpu, stream, NAME), loss, (shares, count))
}

/// The loss of so many workgroups.
fn add_up(
    (wgpu, stream, operation): (&Wgpu, &WgpuStream, &'static str),
    loss: &Option<Gradient<'_, Wgpu>>,
    (shares, count): (Option<Operand<'_>>, usize),
) -> Result<()> {
    let (Some(to), Some(shares)) = (loss, shares) else { return Ok(()) };
    let out = Operand::of(wgpu.device(), operation, &to.view)?;
    let (place, adds) = (shares.tensor, is_added(loss));
    let params = LossSumParams { shares: place, out: out.tensor, count: count as u32, adds };
    let kernel = Kernel::Backward(BackwardKernel::LossSum);
    launch(wgpu, stream, kernel, &[Some(shares), Some(out)], (Groups::Line(1), &params))
}
