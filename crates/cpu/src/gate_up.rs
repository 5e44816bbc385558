use crate::Cpu;
use crate::error::Result;
use crate::grouped::{Epilogue, Gather, Grouped, Groups, grouped};
use crate::pack::Experts;
use crate::panels::{Panels, grouped_panels};
use crate::plan::{GroupedPlan, PanelPlan};
use crate::table::{RowOrder, Table};
use fused_moe_core::operation::{GateUp, GateUpOutput, Matrices, RowSource};
use fused_moe_core::problem::GateUpProblem;
use fused_moe_core::{Error, HostView, Shape};

/// Swallows the activation, where it is asked for.
pub(crate) fn gate_up(cpu: &Cpu, operands: GateUp<'_, Cpu>) -> Result<()> {
    let problem = operands.problem()?;
    let GateUp { x, rows, permutation, input_weights, matrices, bias, activation, output, out } = operands;
    let row_slot = permutation.row_slot.typed()?.row(0);
    let operands = Grouped {
        rows: problem.rows,
        groups: Groups::Offsets(permutation.offsets.typed()?.row(0)),
        x,
        gather: match rows {
            RowSource::Tokens { top_k } => Gather::Tokens { row_slot, top_k },
            RowSource::Rows => Gather::Rows,
        },
        input_weights,
        epilogue: match output {
            GateUpOutput::Activated => Epilogue::Activate(activation),
            GateUpOutput::PreActivation => Epilogue::Store,
        },
        out,
    };
    match matrices {
        Matrices::Stack(view) => {
            let table = stack(&problem, view, bias);
            grouped(cpu, &GroupedPlan::gate_up(&problem, table.dtype(), &cpu.device()), table, operands)
        }
        Matrices::Packed(experts) => {
            let panels = packed(&problem, experts)?;
            grouped_panels(cpu, &PanelPlan::gate_up(&problem, panels.dtype(), &cpu.device()), panels, operands)
        }
    }
}

fn stack<'a>(problem: &GateUpProblem, matrices: HostView<'a>, bias: Option<HostView<'a>>) -> Table<'a> {
    let order = if problem.activation.is_gated() { RowOrder::Halves } else { RowOrder::Single };
    let height = problem.activation.gate_up_rows(problem.intermediate);
    Table { matrices, height, bias, order }
}

fn packed<'a>(problem: &GateUpProblem, experts: &'a Experts) -> Result<Panels<'a>> {
    let expected = Shape::from([problem.experts, problem.intermediate, problem.hidden]);
    experts.check("gate_up", expected)?;
    if experts.is_gated() != problem.activation.is_gated() {
        return Err(Error::Value {
            operation: "gate_up",
            parameter: "activation",
            expected: "a gate exactly where the packed experts have one",
            actual: format!("{:?}", problem.activation),
        }
        .into());
    }
    Ok(experts.gate_up())
}
