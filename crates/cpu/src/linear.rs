use crate::Cpu;
use crate::error::Result;
use crate::grouped::{Epilogue, Gather, Grouped, Groups, grouped};
use crate::plan::GroupedPlan;
use crate::table::{RowOrder, Table};
use fused_moe_core::operation::Linear;

/// The grouped product with one expert.
pub(crate) fn linear(cpu: &Cpu, operands: Linear<'_, Cpu>) -> Result<()> {
    let problem = operands.problem()?;
    let Linear { x, weight, bias, out } = operands;
    let table = Table { matrices: weight, height: problem.outer, bias, order: RowOrder::Single };
    // One output a token may come as [T].
    let out = if out.cols() == problem.outer { out } else { out.reshape([problem.rows, problem.outer])? };
    grouped(
        cpu,
        &GroupedPlan::linear(&problem, &cpu.device()),
        table,
        Grouped {
            rows: problem.rows,
            groups: Groups::One,
            x,
            gather: Gather::Rows,
            input_weights: None,
            epilogue: Epilogue::Store,
            out,
        },
    )
}
