use crate::error::Result;
use crate::gradient::wanted;
use crate::grouped_backward::{GroupedBackward, Source, grouped_backward};
use crate::{Wgpu, WgpuStream};
use fused_moe_core::operation::GateBackward;
use fused_moe_core::problem::GroupedBackwardProblem;

/// The gradients of the grouped product with one expert.
pub(crate) fn gate_backward(wgpu: &Wgpu, stream: &WgpuStream, operands: GateBackward<'_, Wgpu>) -> Result<()> {
    let problem = operands.problem()?;
    let product = |scale| GroupedBackward {
        operation: "gate_backward",
        problem: GroupedBackwardProblem {
            rows: problem.tokens,
            experts: 1,
            outputs: problem.experts,
            inputs: problem.hidden,
            matrices: operands.router.dtype(),
        },
        offsets: None,
        d: Source { scale, ..Source::rows(&operands.d_logits) },
        capped: operands.logits.as_ref().zip(operands.softcap),
        x: operands.n.as_ref().map(Source::rows),
        matrices: &operands.router,
        d_rows: None,
        d_matrices: None,
        d_bias: None,
    };
    // the bias is added after the scale
    grouped_backward(wgpu, stream, &GroupedBackward { d_bias: wanted(&operands.d_bias), ..product(1.0) })?;
    let d_rows = wanted(&operands.d_n);
    let d_matrices = wanted(&operands.d_router);
    grouped_backward(wgpu, stream, &GroupedBackward { d_rows, d_matrices, ..product(operands.scale) })
}
