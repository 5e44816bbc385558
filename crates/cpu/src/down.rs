use crate::Cpu;
use crate::error::Result;
use crate::grouped::{Epilogue, Gather, Grouped, Groups, grouped};
use crate::plan::GroupedPlan;
use crate::table::{RowOrder, Table};
use fused_moe_core::Shape;
use fused_moe_core::operation::{Down, Matrices};

pub(crate) fn down(cpu: &Cpu, operands: Down<'_, Cpu>) -> Result<()> {
    let problem = operands.problem()?;
    let table = match operands.matrices {
        Matrices::Stack(matrices) => {
            Table { matrices, height: problem.hidden, places: None, bias: operands.bias, order: RowOrder::Single }
        }
        Matrices::Packed(experts) => {
            experts.check("down", Shape::from([problem.experts, problem.intermediate, problem.hidden]))?;
            experts.down()?
        }
    };
    grouped(
        cpu,
        &GroupedPlan::down(&problem, table.dtype(), &cpu.device()),
        Grouped {
            rows: problem.rows,
            groups: Groups::Offsets(operands.offsets.typed()?.row(0)),
            x: operands.a,
            gather: Gather::Rows,
            input_weights: None,
            table,
            epilogue: Epilogue::Store,
            out: operands.out,
        },
    )
}
