use crate::Cpu;
use crate::error::Result;
use crate::gate_up_backward::gather;
use crate::grouped::{Gather, Groups};
use crate::grouped_backward::{GroupedBackward, Source, grouped_backward};
use fused_moe_core::operation::{DownBackward, Gradient};

pub(crate) fn down_backward(cpu: &Cpu, operands: DownBackward<'_, Cpu>) -> Result<()> {
    let problem = operands.problem()?;
    let mut d = Source::new(&operands.d_out, gather(operands.rows, &operands.permutation)?, problem.rows)?;
    if let Some(weights) = operands.row_weights {
        d.weights = weights.weights.map(|weights| weights.typed()).transpose()?;
        d.scale = weights.scale;
    }
    let x = operands.a.map(|a| Source::new(&a, Gather::Rows, problem.rows)).transpose()?;
    grouped_backward(
        cpu,
        GroupedBackward {
            problem,
            groups: Groups::Offsets(operands.permutation.offsets.typed()?.row(0)),
            d,
            x,
            matrices: operands.matrices,
            d_rows: operands.d_a.map(Gradient::assign),
            d_matrices: operands.d_down,
            d_bias: operands.d_bias,
        },
    )
}
