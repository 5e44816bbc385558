use crate::Cpu;
use crate::error::Result;
use crate::grouped::{Gather, Groups};
use crate::grouped_backward::{GroupedBackward, Source, grouped_backward};
use fused_moe_core::Permutation;
use fused_moe_core::operation::{GateUpBackward, Gradient, RowSource};

pub(crate) fn gate_up_backward(cpu: &Cpu, operands: GateUpBackward<'_, Cpu>) -> Result<()> {
    let problem = operands.problem()?;
    let from = gather(operands.rows, &operands.permutation)?;
    let weights = operands.input_weights.map(|weights| weights.typed()).transpose()?;
    let x = match operands.x {
        Some(x) => Some(Source { weights, ..Source::new(&x, from, problem.rows)? }),
        None => None,
    };
    grouped_backward(
        cpu,
        GroupedBackward {
            problem,
            groups: Groups::Offsets(operands.permutation.offsets.typed()?.row(0)),
            d: Source::new(&operands.d_z, Gather::Rows, problem.rows)?,
            x,
            matrices: operands.matrices,
            d_rows: operands.d_rows.map(Gradient::assign),
            d_matrices: operands.d_gate_up,
            d_bias: operands.d_bias,
        },
    )
}

/// Which row of an operand a row reads.
pub(crate) fn gather<'a>(rows: RowSource, permutation: &Permutation<'a, Cpu>) -> Result<Gather<'a>> {
    Ok(match rows {
        RowSource::Tokens { top_k } => Gather::Tokens { row_slot: permutation.row_slot.typed()?.row(0), top_k },
        RowSource::Rows => Gather::Rows,
    })
}
