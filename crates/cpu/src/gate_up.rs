use crate::Cpu;
use crate::error::Result;
use crate::grouped::{Epilogue, Gather, Grouped, Groups, grouped};
use crate::pack::Experts;
use crate::plan::GroupedPlan;
use crate::table::{RowOrder, Table};
use fused_moe_core::operation::{GateUp, GateUpOutput, Matrices, RowSource};
use fused_moe_core::problem::GateUpProblem;
use fused_moe_core::{Error, HostView, Shape};

/// Swallows the activation, where it is asked for.
pub(crate) fn gate_up(cpu: &Cpu, operands: GateUp<'_, Cpu>) -> Result<()> {
    let problem = operands.problem()?;
    let table = match operands.matrices {
        Matrices::Stack(view) => stack(&problem, view, operands.bias),
        Matrices::Packed(experts) => packed(&problem, experts)?,
    };
    let row_slot = operands.permutation.row_slot.typed()?.row(0);
    grouped(
        cpu,
        &GroupedPlan::gate_up(&problem, table.dtype(), &cpu.device()),
        Grouped {
            rows: problem.rows,
            groups: Groups::Offsets(operands.permutation.offsets.typed()?.row(0)),
            x: operands.x,
            gather: match operands.rows {
                RowSource::Tokens { top_k } => Gather::Tokens { row_slot, top_k },
                RowSource::Rows => Gather::Rows,
            },
            input_weights: operands.input_weights,
            table,
            epilogue: match operands.output {
                GateUpOutput::Activated => Epilogue::Activate(operands.activation),
                GateUpOutput::PreActivation => Epilogue::Store,
            },
            out: operands.out,
        },
    )
}

fn stack<'a>(problem: &GateUpProblem, matrices: HostView<'a>, bias: Option<HostView<'a>>) -> Table<'a> {
    let order = if problem.activation.is_gated() { RowOrder::Halves } else { RowOrder::Single };
    let height = problem.activation.gate_up_rows(problem.intermediate);
    Table { matrices, height, places: None, bias, order }
}

fn packed<'a>(problem: &GateUpProblem, experts: &'a Experts) -> Result<Table<'a>> {
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
    experts.gate_up()
}
