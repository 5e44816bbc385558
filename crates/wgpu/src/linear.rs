use crate::error::Result;
use crate::launch::{Groups, Operand, Tensor, launch, params, tensor};
use crate::plan::{self, pieces};
use crate::{Wgpu, WgpuStream};
use fused_moe_core::operation::Linear;

params! {
    LinearParams { x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, rows: u32, columns: u32, width: u32 }
}

/// `invariant`: the bits of a row do not depend on how many there are.
pub(crate) fn linear(wgpu: &Wgpu, stream: &WgpuStream, operands: &Linear<'_, Wgpu>, invariant: bool) -> Result<()> {
    let (problem, device) = (operands.problem()?, wgpu.device());
    let Linear { x, weight, bias, out } = operands;
    let bias = Operand::maybe(device, "linear", bias.as_ref())?;
    // a vector of T is a row to a view
    let vector = out.shape().dims().len() == 1;
    let plan = plan::linear([problem.rows, problem.inner, problem.outer], invariant);
    for columns in pieces(wgpu, problem.outer, weight.row_stride() * weight.dtype().size()) {
        let weight = Operand::rows(device, "linear", weight, columns.clone())?.widest();
        let first = columns.start as u32;
        let mut bias_place = tensor(&bias);
        bias_place.offset += first;
        for rows in pieces(wgpu, problem.rows, 4 * x.row_stride().max(out.row_stride())) {
            let x = Operand::rows(device, "linear", x, rows.clone())?.widest();
            let (out, out_place) = if vector {
                let out = Operand::column(device, "linear", out)?;
                (out, Tensor { offset: out.tensor.offset + rows.start as u32, ..out.tensor })
            } else {
                let out = Operand::rows(device, "linear", out, rows.clone())?;
                (out, Tensor { offset: out.tensor.offset + first, ..out.tensor })
            };
            let params = LinearParams {
                x: x.tensor,
                weight: weight.tensor,
                bias: bias_place,
                out: out_place,
                rows: rows.len() as u32,
                columns: columns.len() as u32,
                width: problem.inner as u32,
            };
            let groups = Groups::Line(plan.groups(rows.len(), columns.len()));
            plan.explain(wgpu);
            launch(wgpu, stream, plan.kernel, &[Some(x), Some(weight), bias, Some(out)], (groups, &params))?;
        }
    }
    Ok(())
}
