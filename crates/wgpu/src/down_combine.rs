use crate::combine::{Bound, bind, parts};
use crate::error::Result;
use crate::grouped::widest;
use crate::kernel::Kernel;
use crate::launch::{Groups, Operand, Tensor, launch, params, tensor};
use crate::pack::Table;
use crate::plan;
use crate::{Wgpu, WgpuStream};
use fused_moe_core::View;
use fused_moe_core::operation::{Combine, Residual};

params! {
    DownCombineParams {
        a: Tensor, down: Tensor, bias: Tensor, experts: Tensor, weights: Tensor, shared_y: Tensor, gate: Tensor,
        residual: Tensor, out: Tensor, expert_stride: u32, inner: u32, hidden: u32, top_k: u32, logit: u32,
        routed_scale: f32, shared_scale: f32,
    }
}

/// down and combine of one token in one launch: the rows of `operands` are `[K, I]`, what down takes of each slot, and
/// `experts` `[K]` say whose they are, each in range. False: nothing was done, since no one launch can do both.
///
/// Errors: those of [`launch`] and of [`Operand::of`].
pub(crate) fn down_combine(
    wgpu: &Wgpu,
    stream: &WgpuStream,
    operands: &Combine<'_, Wgpu>,
    experts: &View<crate::Ref<'_>>,
    table: &Table<'_>,
) -> Result<bool> {
    const NAME: &str = "down_combine";
    let top_k = experts.cols();
    let [piece] = table.pieces.as_slice() else { return Ok(false) };
    let Some(plan) = plan::down_combine([table.outputs, top_k], &parts(operands), table.bias.is_some()) else {
        return Ok(false);
    };
    let Bound { y: a, weights, shared_y, gate, residual, out, .. } = bind(wgpu, operands, top_k, 0..1)?;
    let experts = Operand::of(wgpu.device(), NAME, experts)?;
    let (a, down) = (a.map(|a| widest(a, table.inner)), piece.rows);
    let bound = [a, Some(down), table.bias, Some(experts), weights, shared_y, gate, residual, out];
    let shared = operands.shared.as_ref();
    let params = DownCombineParams {
        a: tensor(&a),
        down: down.tensor,
        bias: tensor(&table.bias),
        experts: experts.tensor,
        weights: tensor(&weights),
        shared_y: tensor(&shared_y),
        gate: tensor(&gate),
        residual: tensor(&residual),
        out: tensor(&out),
        expert_stride: piece.expert_stride,
        inner: table.inner as u32,
        hidden: table.outputs as u32,
        top_k: top_k as u32,
        logit: shared.is_some_and(|shared| shared.logit.is_some()).into(),
        routed_scale: operands.routed_scale,
        shared_scale: shared.map_or(0.0, |shared| shared.scale),
    };
    if let Some(recorder) = wgpu.recorder() {
        recorder.explain(plan.why);
    }
    let in_place = matches!(operands.residual, Some(Residual::InPlace));
    let kernel = Kernel::DownCombine { slots: plan.slots, in_place };
    launch(wgpu, stream, kernel, &bound, (Groups::Line(plan.groups), &params))?;
    Ok(true)
}
