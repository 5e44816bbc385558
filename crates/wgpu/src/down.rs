use crate::error::Result;
use crate::grouped::{Grouped, Groups, Product, grouped};
use crate::launch::Operand;
use crate::pack::Table;
use crate::{Wgpu, WgpuStream};
use fused_moe_core::Shape;
use fused_moe_core::operation::{Down, Matrices};

pub(crate) fn down(wgpu: &Wgpu, stream: &WgpuStream, operands: &Down<'_, Wgpu>) -> Result<()> {
    let offsets = Operand::of(wgpu.device(), "down", &operands.offsets)?;
    down_of(wgpu, stream, operands, Groups::Offsets { offsets, row_slot: None, schedule: None }, false)
}

/// The same with rows that are grouped in another way than the offsets say, or `invariant`.
pub(crate) fn down_of(
    wgpu: &Wgpu,
    stream: &WgpuStream,
    operands: &Down<'_, Wgpu>,
    groups: Groups<'_>,
    invariant: bool,
) -> Result<()> {
    let problem = operands.problem()?;
    let table = match &operands.matrices {
        Matrices::Stack(view) => Table::stack(wgpu, "down", (view, operands.bias.as_ref()), (problem.experts, false))?,
        Matrices::Packed(experts) => {
            experts.check("down", Shape::from([problem.experts, problem.intermediate, problem.hidden]))?;
            experts.down(wgpu)?
        }
    };
    grouped(
        wgpu,
        stream,
        &Grouped {
            product: Product::DOWN,
            groups,
            x: &operands.a,
            top_k: None,
            input_weights: None,
            table,
            constants: (0.0, 0.0),
            out: &operands.out,
            invariant,
        },
    )
}
