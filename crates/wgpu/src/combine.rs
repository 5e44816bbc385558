use crate::error::Result;
use crate::kernel::Kernel;
use crate::launch::{Operand, Tensor, launch, params, tensor};
use crate::plan::{self, CombineStep, pieces};
use crate::{Wgpu, WgpuStream};
use fused_moe_core::operation::{Combine, Residual, SlotRows};
use fused_moe_core::problem::CombineProblem;
use std::ops::Range;

params! {
    CombineParams {
        y: Tensor, slot_row: Tensor, weights: Tensor, shared_y: Tensor, gate: Tensor, residual: Tensor,
        norm_weight: Tensor, normed: Tensor, out: Tensor, tokens: u32, hidden: u32, rows: u32, top_k: u32, logit: u32,
        routed_scale: f32, shared_scale: f32, eps: f32,
    }
}

const COMBINE: &str = "combine";

pub(crate) fn combine(wgpu: &Wgpu, stream: &WgpuStream, operands: Combine<'_, Wgpu>) -> Result<()> {
    let problem = operands.problem()?;
    pieces(wgpu, problem.tokens, row_bytes(&operands, problem.top_k))
        .try_for_each(|tokens| some(wgpu, stream, &operands, (&problem, tokens)))
}

/// Bytes from token to token, of the operand where that is most. Permuted rows are bound as they are.
fn row_bytes(operands: &Combine<'_, Wgpu>, top_k: usize) -> usize {
    let bytes = |stride: usize, size: usize| stride.saturating_mul(size);
    let slots = match &operands.rows {
        SlotRows::Slots(y) => bytes(top_k.saturating_mul(y.row_stride()), y.dtype().size()),
        SlotRows::Permuted { .. } => 4,
    };
    let out = bytes(operands.out.row_stride(), 4);
    let weights = operands.weights.as_ref().map_or(0, |weights| bytes(weights.row_stride(), 4));
    let shared = operands.shared.as_ref().map_or(0, |shared| bytes(shared.y.row_stride(), 4));
    let normed = operands.norm.as_ref().map_or(0, |norm| bytes(norm.out.row_stride(), 4));
    let residual = match &operands.residual {
        Some(Residual::Of(residual)) => bytes(residual.row_stride(), 4),
        _ => 0,
    };
    [slots, out, weights, shared, normed, residual].into_iter().fold(0, usize::max)
}

/// The same of some of the tokens.
fn some(
    wgpu: &Wgpu,
    stream: &WgpuStream,
    operands: &Combine<'_, Wgpu>,
    (problem, tokens): (&CombineProblem, Range<usize>),
) -> Result<()> {
    let in_place = matches!(operands.residual, Some(Residual::InPlace));
    let shared = operands.shared.as_ref();
    let rows = match &operands.rows {
        SlotRows::Slots(_) => tokens.len() * problem.top_k,
        SlotRows::Permuted { y, .. } => y.rows(),
    };
    let count = tokens.len();
    let bound = bind(wgpu, operands, problem.top_k, tokens)?;
    let there = bound.iter().flatten().count();
    let problem = CombineProblem { tokens: count, ..*problem };
    for plan in
        plan::combine(&problem, (operands.norm.is_some(), in_place, there), wgpu.numbers()).into_iter().flatten()
    {
        let [y, slot_row, weights, shared_y, gate, mut residual, mut norm_weight, mut normed, mut out] = bound;
        match plan.step {
            CombineStep::Sum => (norm_weight, normed) = (None, None),
            CombineStep::SumAndNorm => {}
            // before out is written
            CombineStep::Norm => (residual, out) = (if in_place { out } else { residual }, None),
        }
        let params = CombineParams {
            y: tensor(&y),
            slot_row: tensor(&slot_row),
            weights: tensor(&weights),
            shared_y: tensor(&shared_y),
            gate: tensor(&gate),
            residual: tensor(&residual),
            norm_weight: tensor(&norm_weight),
            normed: tensor(&normed),
            out: tensor(&out),
            tokens: count as u32,
            hidden: problem.hidden as u32,
            rows: rows as u32,
            top_k: problem.top_k as u32,
            logit: shared.is_some_and(|shared| shared.logit.is_some()).into(),
            routed_scale: operands.routed_scale,
            shared_scale: shared.map_or(0.0, |shared| shared.scale),
            eps: operands.norm.as_ref().map_or(0.0, |norm| norm.eps),
        };
        if let Some(recorder) = wgpu.recorder() {
            recorder.explain(plan.why);
        }
        let taken = [y, slot_row, weights, shared_y, gate, residual, norm_weight, normed, out];
        launch(wgpu, stream, Kernel::Combine(plan.kernel), &taken, (plan.groups, &params))?;
    }
    Ok(())
}

/// The operands of some of the tokens, in the order of the bindings; the gate is a factor or a logit.
pub(crate) fn bind<'a>(
    wgpu: &Wgpu,
    operands: &'a Combine<'_, Wgpu>,
    top_k: usize,
    tokens: Range<usize>,
) -> Result<[Option<Operand<'a>>; 9]> {
    let device = wgpu.device();
    let rows = |view| Operand::rows(device, COMBINE, view, tokens.clone());
    let slots = tokens.start * top_k..tokens.end * top_k;
    let (y, slot_row) = match &operands.rows {
        SlotRows::Slots(y) => (Operand::rows(device, COMBINE, y, slots)?, None),
        SlotRows::Permuted { y, slot_row } => {
            let mut slot_row = Operand::of(device, COMBINE, slot_row)?;
            slot_row.tensor.offset += slots.start as u32;
            (Operand::of(device, COMBINE, y)?, Some(slot_row))
        }
    };
    let (shared, norm) = (operands.shared.as_ref(), operands.norm.as_ref());
    let gate = shared.and_then(|shared| shared.factor.as_ref().or(shared.logit.as_ref()));
    let mut gate = gate.map(|gate| Operand::column(device, COMBINE, gate)).transpose()?;
    if let Some(gate) = &mut gate {
        gate.tensor.offset += tokens.start as u32 * gate.tensor.stride;
    }
    let residual = match &operands.residual {
        Some(Residual::Of(residual)) => Some(rows(residual)?),
        _ => None,
    };
    Ok([
        Some(y),
        slot_row,
        operands.weights.as_ref().map(rows).transpose()?,
        shared.map(|shared| rows(&shared.y)).transpose()?,
        gate,
        residual,
        Operand::maybe(device, COMBINE, norm.and_then(|norm| norm.weight.as_ref()))?,
        norm.map(|norm| Operand::rows(device, COMBINE, &norm.out, tokens.clone())).transpose()?,
        Some(Operand::rows(device, COMBINE, &operands.out, tokens.clone())?),
    ])
}
