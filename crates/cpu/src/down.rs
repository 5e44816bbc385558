use crate::Cpu;
use crate::error::Result;
use crate::grouped::{Epilogue, Gather, Grouped, Groups, grouped};
use crate::panels::grouped_panels;
use crate::plan::{GroupedPlan, PanelPlan};
use crate::table::{RowOrder, Table};
use fused_moe_core::Shape;
use fused_moe_core::operation::{Down, Matrices};

pub(crate) fn down(cpu: &Cpu, operands: Down<'_, Cpu>) -> Result<()> {
    let problem = operands.problem()?;
    let Down { a, offsets, matrices, bias, out } = operands;
    let operands = Grouped {
        rows: problem.rows,
        groups: Groups::Offsets(offsets.typed()?.row(0)),
        x: a,
        gather: Gather::Rows,
        input_weights: None,
        epilogue: Epilogue::Store,
        out,
    };
    match matrices {
        Matrices::Stack(matrices) => {
            let table = Table { matrices, height: problem.hidden, bias, order: RowOrder::Single };
            grouped(cpu, &GroupedPlan::down(&problem, table.dtype(), &cpu.device()), table, operands)
        }
        Matrices::Packed(experts) => {
            experts.check("down", Shape::from([problem.experts, problem.intermediate, problem.hidden]))?;
            let panels = experts.down();
            grouped_panels(cpu, &PanelPlan::down(&problem, panels.dtype(), &cpu.device()), panels, operands)
        }
    }
}
