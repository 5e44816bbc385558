use crate::error::Result;
use crate::grouped::widest;
use crate::kernel::{BackwardKernel, Kernel};
use crate::launch::{Groups, Operand, Tensor, launch, params, tensor};
use crate::memory::Ref;
use crate::plan::{pairs, pieces};
use crate::{Wgpu, WgpuStream};
use fused_moe_core::View;
use fused_moe_core::operation::{
    CombineBackward, DownBias, GradientMode, RowsGradient, SharedBackward, SlotRows, WeightsFrom, WeightsGradient,
};
use fused_moe_core::problem::CombineBackwardProblem;
use std::ops::Range;

params! {
    RowsParams {
        d_out: Tensor, weights: Tensor, out: Tensor, slots: u32, hidden: u32, top_k: u32, slot_row: u32,
        row_begin: u32, rows: u32, scale: f32,
    }
}

params! {
    WeightsParams {
        y: Tensor, d_a: Tensor, bias: Tensor, experts: Tensor, d_out: Tensor, out: Tensor, slots: u32, top_k: u32,
        hidden: u32, inner: u32, slot_row: u32, row_begin: u32, rows: u32, all_rows: u32, experts_total: u32,
        scale: f32, adds: u32,
    }
}

params! {
    SharedParams {
        d_out: Tensor, y: Tensor, gate: Tensor, d_y: Tensor, out: Tensor, tokens: u32, hidden: u32, logit: u32,
        scale: f32, adds: u32,
    }
}

const NAME: &str = "combine_backward";
/// Slots of a workgroup.
pub(crate) const SLOTS: usize = 8;

/// A launch for each gradient, and for each window of the tokens and of the rows.
pub(crate) fn combine_backward(wgpu: &Wgpu, stream: &WgpuStream, operands: CombineBackward<'_, Wgpu>) -> Result<()> {
    let call = Call { wgpu, stream, problem: operands.problem()?, operands: &operands };
    if let Some(rows) = &operands.d_rows {
        call.rows(rows)?;
    }
    if let Some(weights) = &operands.d_weights {
        call.weights(weights)?;
    }
    match &operands.shared {
        Some(shared) => call.shared(shared),
        None => Ok(()),
    }
}

struct Call<'a, 'o> {
    wgpu: &'a Wgpu,
    stream: &'a WgpuStream,
    problem: CombineBackwardProblem,
    operands: &'a CombineBackward<'o, Wgpu>,
}

/// Tokens of a launch, and the rows that it knows of.
struct Window {
    tokens: Range<usize>,
    rows: Range<usize>,
}

impl Call<'_, '_> {
    /// Windows where tokens, and rows by slot, take at the most so many bytes each, and rows by expert so many.
    fn windows(&self, token_bytes: usize, row_bytes: Option<usize>) -> Vec<Window> {
        let CombineBackwardProblem { tokens, top_k, .. } = self.problem;
        let mut windows = Vec::new();
        for tokens in pieces(self.wgpu, tokens, token_bytes) {
            match row_bytes {
                None => {
                    let rows = tokens.start * top_k..tokens.end * top_k;
                    windows.push(Window { tokens, rows });
                }
                Some(bytes) => {
                    let rows = pieces(self.wgpu, self.problem.tokens * top_k, bytes);
                    windows.extend(rows.map(|rows| Window { tokens: tokens.clone(), rows }));
                }
            }
        }
        windows
    }

    /// The row of each slot, from that of the first token on.
    fn slot_row<'v>(&self, view: Option<&'v View<Ref<'v>>>, tokens: &Range<usize>) -> Result<Option<Operand<'v>>> {
        let mut slot_row = Operand::maybe(self.wgpu.device(), NAME, view)?;
        if let Some(slot_row) = &mut slot_row {
            slot_row.tensor.offset += (tokens.start * self.problem.top_k) as u32;
        }
        Ok(slot_row)
    }

    fn rows(&self, gradient: &RowsGradient<'_, Wgpu>) -> Result<()> {
        let CombineBackward { d_out, weights, routed_scale, .. } = self.operands;
        let CombineBackwardProblem { hidden, top_k, .. } = self.problem;
        let (to, slot_row) = match gradient {
            RowsGradient::Slots(to) => (to, None),
            RowsGradient::Permuted { d_y, slot_row } => (d_y, Some(slot_row)),
        };
        let (device, to_bytes) = (self.wgpu.device(), row_bytes(to));
        let of_rows = if slot_row.is_some() { 0 } else { top_k.saturating_mul(to_bytes) };
        for Window { tokens, rows } in
            self.windows(row_bytes(d_out).max(of_rows), slot_row.is_some().then_some(to_bytes))
        {
            let d_out = Operand::rows(device, NAME, d_out, tokens.clone())?;
            let weights = match weights {
                Some(weights) => Some(Operand::rows(device, NAME, weights, tokens.clone())?),
                None => None,
            };
            let slot_row = self.slot_row(slot_row, &tokens)?;
            let out = Operand::rows(device, NAME, to, rows.clone())?;
            let slots = (tokens.len() * top_k) as u32;
            let params = RowsParams {
                d_out: d_out.tensor,
                weights: tensor(&weights),
                out: out.tensor,
                slots,
                hidden: hidden as u32,
                top_k: top_k as u32,
                slot_row: tensor(&slot_row).offset,
                row_begin: rows.start as u32,
                rows: rows.len() as u32,
                scale: *routed_scale,
            };
            let kernel = Kernel::Backward(BackwardKernel::CombineRows);
            let bound = [Some(d_out), weights, slot_row, Some(out)];
            launch(self.wgpu, self.stream, kernel, &bound, (pairs(slots, hidden), &params))?;
        }
        Ok(())
    }

    fn weights(&self, gradient: &WeightsGradient<'_, Wgpu>) -> Result<()> {
        let WeightsGradient { from, out } = gradient;
        let CombineBackwardProblem { hidden, top_k, intermediate, experts: experts_total, .. } = self.problem;
        let (y, d_a, slot_row, bias) = match from {
            WeightsFrom::Rows(SlotRows::Slots(y)) => (y, None, None, None),
            WeightsFrom::Rows(SlotRows::Permuted { y, slot_row }) => (y, None, Some(slot_row), None),
            WeightsFrom::Intermediate { a, d_a, slot_row, bias } => (a, Some(d_a), Some(slot_row), bias.as_ref()),
        };
        let inner = if d_a.is_some() { intermediate } else { hidden };
        let (device, all_rows) = (self.wgpu.device(), y.rows());
        let y_bytes = row_bytes(y).max(d_a.map_or(0, row_bytes));
        let of_rows = if slot_row.is_some() { 0 } else { top_k.saturating_mul(y_bytes) };
        let bias_operand = Operand::maybe(device, NAME, bias.map(|DownBias { bias, .. }| bias))?;
        let bias_operand = bias_operand.map(|bias| widest(bias, hidden));
        for Window { tokens, rows } in
            self.windows(row_bytes(&self.operands.d_out).max(of_rows), slot_row.is_some().then_some(y_bytes))
        {
            let y = widest(Operand::rows(device, NAME, y, rows.clone())?, inner);
            let d_a = match d_a {
                Some(d_a) => Some(widest(Operand::rows(device, NAME, d_a, rows.clone())?, inner)),
                None => None,
            };
            let slot_row = self.slot_row(slot_row, &tokens)?;
            let experts = match bias {
                Some(DownBias { experts, .. }) => Some(Operand::rows(device, NAME, experts, tokens.clone())?),
                None => None,
            };
            let d_out = widest(Operand::rows(device, NAME, &self.operands.d_out, tokens.clone())?, hidden);
            let to = Operand::rows(device, NAME, &out.view, tokens.clone())?;
            let slots = tokens.len() * top_k;
            let params = WeightsParams {
                y: y.tensor,
                d_a: tensor(&d_a),
                bias: tensor(&bias_operand),
                experts: tensor(&experts),
                d_out: d_out.tensor,
                out: to.tensor,
                slots: slots as u32,
                top_k: top_k as u32,
                hidden: hidden as u32,
                inner: inner as u32,
                slot_row: tensor(&slot_row).offset,
                // rows by slot begin with those of the window's first token
                row_begin: if slot_row.is_some() { rows.start as u32 } else { 0 },
                rows: rows.len() as u32,
                all_rows: all_rows as u32,
                experts_total: experts_total as u32,
                scale: self.operands.routed_scale,
                adds: (out.mode == GradientMode::Accumulate).into(),
            };
            let groups = Groups::Line(slots.div_ceil(SLOTS) as u64);
            let kernel = Kernel::Backward(BackwardKernel::CombineWeights);
            let bound = [Some(y), d_a, slot_row, bias_operand, experts, Some(d_out), Some(to)];
            launch(self.wgpu, self.stream, kernel, &bound, (groups, &params))?;
        }
        Ok(())
    }

    fn shared(&self, shared: &SharedBackward<'_, Wgpu>) -> Result<()> {
        let device = self.wgpu.device();
        let d_out = &self.operands.d_out;
        let gate = shared.factor.as_ref().or(shared.logit.as_ref());
        let gate = gate.map(|gate| Operand::column(device, NAME, gate)).transpose()?;
        let d_gate = shared.d_gate.as_ref();
        let to = d_gate.map(|gradient| Operand::column(device, NAME, &gradient.view)).transpose()?;
        let bytes = [shared.y.as_ref().map(row_bytes), shared.d_y.as_ref().map(row_bytes)];
        let most = bytes.into_iter().flatten().fold(row_bytes(d_out), usize::max);
        for tokens in pieces(self.wgpu, self.problem.tokens, most) {
            let of_first =
                |place: Tensor| Tensor { offset: place.offset + tokens.start as u32 * place.stride, ..place };
            let d_out = Operand::rows(device, NAME, d_out, tokens.clone())?;
            let y = match &shared.y {
                Some(y) => Some(Operand::rows(device, NAME, y, tokens.clone())?),
                None => None,
            };
            let d_y = match &shared.d_y {
                Some(d_y) => Some(Operand::rows(device, NAME, d_y, tokens.clone())?),
                None => None,
            };
            let params = SharedParams {
                d_out: d_out.tensor,
                y: tensor(&y),
                gate: of_first(tensor(&gate)),
                d_y: tensor(&d_y),
                out: of_first(tensor(&to)),
                tokens: tokens.len() as u32,
                hidden: self.problem.hidden as u32,
                logit: shared.logit.is_some().into(),
                scale: shared.scale,
                adds: d_gate.is_some_and(|gradient| gradient.mode == GradientMode::Accumulate).into(),
            };
            let groups = Groups::Line(tokens.len() as u64);
            let kernel = Kernel::Backward(BackwardKernel::CombineShared);
            launch(self.wgpu, self.stream, kernel, &[Some(d_out), y, gate, d_y, to], (groups, &params))?;
        }
        Ok(())
    }
}

fn row_bytes<S>(view: &View<S>) -> usize {
    view.row_stride().saturating_mul(view.dtype().size())
}
