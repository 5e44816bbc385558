use crate::activation::constants;
use crate::error::Result;
use crate::grouped::{Grouped, Groups, Product, Stage, grouped};
use crate::launch::Tensor;
use crate::pack::{Experts, Table};
use crate::{Cuda, CudaStream};
use fused_moe_core::operation::{GateUp, GateUpOutput, Matrices, RowSource};
use fused_moe_core::problem::GateUpProblem;
use fused_moe_core::{Error, Shape, View};

/// Swallows the activation, where it is asked for.
pub(crate) fn gate_up(cuda: &Cuda, stream: &CudaStream, operands: &GateUp<'_, Cuda>) -> Result<()> {
    let groups = Groups::Offsets {
        offsets: Tensor::of(&operands.permutation.offsets)?,
        row_slot: Tensor::of(&operands.permutation.row_slot)?,
        counter: 0,
    };
    gate_up_of(cuda, stream, operands, groups, false)
}

/// The same with rows that are grouped in another way than the permutation says, or `invariant`.
pub(crate) fn gate_up_of(
    cuda: &Cuda,
    stream: &CudaStream,
    operands: &GateUp<'_, Cuda>,
    groups: Groups,
    invariant: bool,
) -> Result<()> {
    let problem = operands.problem()?;
    let table = match operands.matrices {
        Matrices::Stack(view) => Table::stack(&view, operands.bias.as_ref(), problem.experts, problem.intermediate)?,
        Matrices::Packed(experts) => packed(cuda, &problem, experts)?,
    };
    let (gather, top_k) = match operands.rows {
        RowSource::Tokens { top_k } => (true, top_k),
        RowSource::Rows => (false, 1),
    };
    let activation = (problem.output == GateUpOutput::Activated).then_some(problem.activation);
    let product = Product {
        stage: Stage::GateUp,
        gather,
        gated: problem.activation.is_gated(),
        activation: activation.map(Into::into),
    };
    let weights = operands.input_weights.as_ref();
    grouped(
        cuda,
        stream,
        &Grouped {
            product,
            rows: problem.rows,
            groups,
            x: (Tensor::of(&operands.x)?, problem.x),
            top_k,
            input_weights: (Tensor::maybe(weights)?, weights.map_or(1, View::cols).max(1)),
            table,
            constants: constants(problem.activation),
            out: Tensor::of(&operands.out)?,
            invariant,
            early: false,
        },
    )
}

fn packed(cuda: &Cuda, problem: &GateUpProblem, experts: &Experts) -> Result<Table> {
    experts.check(cuda, "gate_up", Shape::from([problem.experts, problem.intermediate, problem.hidden]))?;
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
