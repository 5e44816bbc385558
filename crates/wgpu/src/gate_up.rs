use crate::activation::constants;
use crate::error::Result;
use crate::grouped::{Grouped, Groups, Product, Stage, grouped};
use crate::launch::Operand;
use crate::pack::{Experts, Table};
use crate::{Wgpu, WgpuStream};
use fused_moe_core::operation::{GateUp, GateUpOutput, Matrices, RowSource};
use fused_moe_core::problem::GateUpProblem;
use fused_moe_core::{Error, Shape, View};

/// Swallows the activation, where it is asked for.
pub(crate) fn gate_up(wgpu: &Wgpu, stream: &WgpuStream, operands: &GateUp<'_, Wgpu>) -> Result<()> {
    let permutation = &operands.permutation;
    let groups = Groups::Offsets {
        offsets: Operand::of(wgpu.device(), "gate_up", &permutation.offsets)?,
        row_slot: Some(Operand::of(wgpu.device(), "gate_up", &permutation.row_slot)?),
        schedule: None,
    };
    gate_up_of(wgpu, stream, operands, groups, false)
}

/// The same with rows that are grouped in another way than the permutation says, or `invariant`.
pub(crate) fn gate_up_of(
    wgpu: &Wgpu,
    stream: &WgpuStream,
    operands: &GateUp<'_, Wgpu>,
    groups: Groups<'_>,
    invariant: bool,
) -> Result<()> {
    let problem = operands.problem()?;
    let gated = problem.activation.is_gated();
    let table = match &operands.matrices {
        Matrices::Stack(view) => {
            Table::stack(wgpu, "gate_up", (view, operands.bias.as_ref()), (problem.experts, gated))?
        }
        Matrices::Packed(experts) => packed(wgpu, &problem, experts)?,
    };
    let activation = (problem.output == GateUpOutput::Activated).then_some(problem.activation);
    let input_weights = match &operands.input_weights {
        Some(weights) => Some((Operand::of(wgpu.device(), "gate_up", weights)?, View::cols(weights))),
        None => None,
    };
    grouped(
        wgpu,
        stream,
        &Grouped {
            product: Product { stage: Stage::GateUp, gated, activation: activation.map(Into::into) },
            groups,
            x: &operands.x,
            top_k: match operands.rows {
                RowSource::Tokens { top_k } => Some(top_k),
                RowSource::Rows => None,
            },
            input_weights,
            table,
            constants: constants(problem.activation),
            out: &operands.out,
            invariant,
        },
    )
}

fn packed<'a>(wgpu: &Wgpu, problem: &GateUpProblem, experts: &'a Experts) -> Result<Table<'a>> {
    experts.check("gate_up", Shape::from([problem.experts, problem.intermediate, problem.hidden]))?;
    if experts.is_gated() != problem.activation.is_gated() {
        return Err(Error::Value {
            operation: "gate_up",
            parameter: "activation",
            expected: "a gate exactly where the packed experts have one",
            actual: format!("{:?}", problem.activation),
        }
        .into());
    }
    experts.gate_up(wgpu)
}
