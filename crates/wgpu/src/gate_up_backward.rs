use crate::down_backward::{by_slot, gather};
use crate::error::Result;
use crate::gradient::wanted;
use crate::grouped_backward::{GroupedBackward, Source, grouped_backward};
use crate::launch::Operand;
use crate::{Wgpu, WgpuStream};
use fused_moe_core::operation::{GateUpBackward, GradientMode};

pub(crate) fn gate_up_backward(wgpu: &Wgpu, stream: &WgpuStream, operands: GateUpBackward<'_, Wgpu>) -> Result<()> {
    const NAME: &str = "gate_up_backward";
    let (problem, device) = (operands.problem()?, wgpu.device());
    let x = match &operands.x {
        Some(view) => Some(Source {
            view,
            gather: gather(wgpu, NAME, operands.rows, &operands.permutation.row_slot)?,
            weights: by_slot(wgpu, NAME, operands.input_weights.as_ref())?,
            scale: 1.0,
        }),
        None => None,
    };
    grouped_backward(
        wgpu,
        stream,
        &GroupedBackward {
            operation: NAME,
            problem,
            offsets: Some(Operand::of(device, NAME, &operands.permutation.offsets)?),
            d: Source::rows(&operands.d_z),
            capped: None,
            x,
            matrices: &operands.matrices,
            d_rows: operands.d_rows.as_ref().map(|d_rows| (d_rows, GradientMode::Assign)),
            d_matrices: wanted(&operands.d_gate_up),
            d_bias: wanted(&operands.d_bias),
        },
    )
}
