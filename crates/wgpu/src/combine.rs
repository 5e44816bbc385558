use crate::error::Result;
use crate::kernel::Kernel;
use crate::launch::{Operand, Tensor, launch, params, tensor};
use crate::memory::Ref;
use crate::plan::{self, CombineParts, CombinePlan, CombineStep, pieces};
use crate::stream::SCRATCH;
use crate::{Wgpu, WgpuStream};
use fused_moe_core::DType::F32;
use fused_moe_core::View;
use fused_moe_core::operation::{Combine, Residual, SlotRows};
use fused_moe_core::problem::CombineProblem;
use std::ops::Range;

params! {
    CombineParams {
        y: Tensor, slot_row: Tensor, weights: Tensor, x: Tensor, experts: Tensor, shared_y: Tensor, gate: Tensor,
        residual: Tensor, norm_weight: Tensor, normed: Tensor, out: Tensor, tokens: u32, hidden: u32, rows: u32,
        top_k: u32, first: u32, end: u32, logit: u32, routed_scale: f32, shared_scale: f32, eps: f32,
    }
}

const COMBINE: &str = "combine";

/// `sums`, f32 `[T, H]`: where the sums over the slots lie between two launches; without it in the stream's scratch.
pub(crate) fn combine(
    wgpu: &Wgpu,
    stream: &WgpuStream,
    operands: Combine<'_, Wgpu>,
    sums: Option<&View<Ref<'_>>>,
) -> Result<()> {
    let (problem, device) = (operands.problem()?, wgpu.device());
    let plans = plan::combine(&problem, &parts(&operands), wgpu.numbers());
    let in_two = plans.iter().flatten().any(|plan| plan.step == CombineStep::Rows);
    let scratch = if in_two && sums.is_none() { Some(stream.scratch()?) } else { None };
    let (sums, at_once) = match (&scratch, sums.filter(|_| in_two)) {
        (Some(scratch), _) => {
            let format = (F32, problem.hidden as u32);
            (Some(Operand::matrix(device, COMBINE, scratch, format)?), SCRATCH / problem.hidden.max(1))
        }
        (None, Some(sums)) => (Some(Operand::of(device, COMBINE, sums)?), sums.rows().max(1)),
        (None, None) => (None, usize::MAX),
    };
    if at_once == 0 {
        let part = "copies and all other parts of rows of more than 65536 elements together";
        return Err(fused_moe_core::Error::Unsupported { operation: COMBINE, part, backend: "wgpu" }.into());
    }
    for tokens in pieces(wgpu, problem.tokens, row_bytes(&operands, problem.top_k)) {
        for first in tokens.clone().step_by(at_once) {
            let tokens = first..tokens.end.min(first.saturating_add(at_once));
            some(wgpu, stream, &operands, (&problem, tokens), (plans, sums))?;
        }
    }
    Ok(())
}

/// What there is of operands.
pub(crate) fn parts(operands: &Combine<'_, Wgpu>) -> CombineParts {
    let Combine { rows, weights, copies, shared, residual, norm, .. } = operands;
    let grouped = matches!(rows, SlotRows::Permuted { .. });
    let gated = shared.as_ref().is_some_and(|shared| shared.factor.is_some() || shared.logit.is_some());
    CombineParts {
        rows: 1 + usize::from(grouped) + usize::from(weights.is_some()) + 2 * usize::from(copies.is_some()),
        beside: usize::from(shared.is_some())
            + usize::from(gated)
            + usize::from(matches!(residual, Some(Residual::Of(_)))),
        norm: norm.as_ref().map_or(0, |norm| 1 + usize::from(norm.weight.is_some())),
        in_place: matches!(residual, Some(Residual::InPlace)),
    }
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
    let copies = operands.copies.as_ref();
    let copies = copies.map_or(0, |copies| bytes(copies.x.row_stride().max(copies.experts.row_stride()), 4));
    let shared = operands.shared.as_ref().map_or(0, |shared| bytes(shared.y.row_stride(), 4));
    let normed = operands.norm.as_ref().map_or(0, |norm| bytes(norm.out.row_stride(), 4));
    let residual = match &operands.residual {
        Some(Residual::Of(residual)) => bytes(residual.row_stride(), 4),
        _ => 0,
    };
    [slots, out, weights, copies, shared, normed, residual].into_iter().fold(0, usize::max)
}

/// The same of some of the tokens.
fn some(
    wgpu: &Wgpu,
    stream: &WgpuStream,
    operands: &Combine<'_, Wgpu>,
    (problem, tokens): (&CombineProblem, Range<usize>),
    (plans, sums): ([Option<CombinePlan>; 2], Option<Operand<'_>>),
) -> Result<()> {
    let in_place = matches!(operands.residual, Some(Residual::InPlace));
    let rows = match &operands.rows {
        SlotRows::Slots(_) => tokens.len() * problem.top_k,
        SlotRows::Permuted { y, .. } => y.rows(),
    };
    let problem = CombineProblem { tokens: tokens.len(), ..*problem };
    let all = bind(wgpu, operands, problem.top_k, tokens)?;
    for plan in plans.into_iter().flatten() {
        let (bound, rows, top_k, routed_scale) = match plan.step {
            CombineStep::Sum => (all.without_norm(), rows, problem.top_k, operands.routed_scale),
            CombineStep::SumAndNorm => (all, rows, problem.top_k, operands.routed_scale),
            CombineStep::Norm => (all.without_out(in_place), rows, problem.top_k, operands.routed_scale),
            CombineStep::Rows => (all.rows_alone(sums), rows, problem.top_k, operands.routed_scale),
            CombineStep::Rest => (all.with_sums(sums), problem.tokens, 1, 1.0),
        };
        let copies = operands.copies.as_ref();
        let shared = operands.shared.as_ref();
        let params = CombineParams {
            rows: rows as u32,
            top_k: top_k as u32,
            first: copies.map_or(0, |copies| copies.first as u32),
            end: copies.map_or(0, |copies| copies.end as u32),
            logit: shared.is_some_and(|shared| shared.logit.is_some()).into(),
            routed_scale,
            shared_scale: shared.map_or(0.0, |shared| shared.scale),
            eps: operands.norm.as_ref().map_or(0.0, |norm| norm.eps),
            ..bound.params(&problem)
        };
        if let Some(recorder) = wgpu.recorder() {
            recorder.explain(plan.why);
        }
        let groups = plan.groups(problem.tokens, problem.hidden);
        launch(wgpu, stream, Kernel::Combine(plan.kernel), &bound.in_order(), (groups, &params))?;
    }
    Ok(())
}

/// The operands of a launch; the gate is a factor or a logit.
#[derive(Clone, Copy)]
pub(crate) struct Bound<'a> {
    pub(crate) y: Option<Operand<'a>>,
    slot_row: Option<Operand<'a>>,
    pub(crate) weights: Option<Operand<'a>>,
    /// x and experts of copies.
    copies: Option<[Operand<'a>; 2]>,
    pub(crate) shared_y: Option<Operand<'a>>,
    pub(crate) gate: Option<Operand<'a>>,
    pub(crate) residual: Option<Operand<'a>>,
    norm_weight: Option<Operand<'a>>,
    normed: Option<Operand<'a>>,
    pub(crate) out: Option<Operand<'a>>,
}

/// The operands of some of the tokens.
pub(crate) fn bind<'a>(
    wgpu: &Wgpu,
    operands: &'a Combine<'_, Wgpu>,
    top_k: usize,
    tokens: Range<usize>,
) -> Result<Bound<'a>> {
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
    let copies = match &operands.copies {
        Some(copies) => Some([rows(&copies.x)?, rows(&copies.experts)?]),
        None => None,
    };
    Ok(Bound {
        y: Some(y),
        slot_row,
        weights: operands.weights.as_ref().map(rows).transpose()?,
        copies,
        shared_y: shared.map(|shared| rows(&shared.y)).transpose()?,
        gate,
        residual,
        norm_weight: Operand::maybe(device, COMBINE, norm.and_then(|norm| norm.weight.as_ref()))?,
        normed: norm.map(|norm| Operand::rows(device, COMBINE, &norm.out, tokens.clone())).transpose()?,
        out: Some(Operand::rows(device, COMBINE, &operands.out, tokens.clone())?),
    })
}

impl<'a> Bound<'a> {
    fn without_norm(self) -> Self {
        Self { norm_weight: None, normed: None, ..self }
    }

    /// While out still holds what the sum is added to.
    fn without_out(self, in_place: bool) -> Self {
        Self { residual: if in_place { self.out } else { self.residual }, out: None, ..self }
    }

    /// The sum over the slots, and nothing else.
    fn rows_alone(self, sums: Option<Operand<'a>>) -> Self {
        let Self { y, slot_row, weights, copies, .. } = self;
        let (shared_y, gate, residual, norm_weight, normed) = (None, None, None, None, None);
        Self { y, slot_row, weights, copies, shared_y, gate, residual, norm_weight, normed, out: sums }
    }

    /// All that is added to such a sum.
    fn with_sums(self, sums: Option<Operand<'a>>) -> Self {
        Self { y: sums, slot_row: None, weights: None, copies: None, ..self }
    }

    /// Where they lie.
    fn params(&self, problem: &CombineProblem) -> CombineParams {
        let [y, slot_row, weights, x, experts, shared_y, gate, residual, norm_weight, normed, out] =
            self.in_order().map(|operand| tensor(&operand));
        CombineParams {
            y,
            slot_row,
            weights,
            x,
            experts,
            shared_y,
            gate,
            residual,
            norm_weight,
            normed,
            out,
            tokens: problem.tokens as u32,
            hidden: problem.hidden as u32,
            ..CombineParams::default()
        }
    }

    /// In the order of the kernel's bindings.
    fn in_order(self) -> [Option<Operand<'a>>; 11] {
        let (x, experts) = self.copies.map(|[x, experts]| (x, experts)).unzip();
        let Self { y, slot_row, weights, shared_y, gate, residual, norm_weight, normed, out, .. } = self;
        [y, slot_row, weights, x, experts, shared_y, gate, residual, norm_weight, normed, out]
    }
}
