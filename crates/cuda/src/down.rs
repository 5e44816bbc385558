use crate::error::Result;
use crate::grouped::{Grouped, Groups, Product, grouped};
use crate::launch::Tensor;
use crate::pack::Table;
use crate::{Cuda, CudaStream};
use fused_moe_core::Shape;
use fused_moe_core::operation::{Down, Matrices};

pub(crate) fn down(cuda: &Cuda, stream: &CudaStream, operands: &Down<'_, Cuda>) -> Result<()> {
    let offsets = Tensor::of(&operands.offsets)?;
    let groups = Groups::Offsets { offsets, row_slot: Tensor::default(), counter: 0 };
    down_of(cuda, stream, operands, groups, Manner::default())
}

/// How a down product is to be carried out; see [`Grouped`].
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Manner {
    pub(crate) invariant: bool,
    pub(crate) early: bool,
}

/// The same with rows that are grouped in another way than the offsets say, or in another manner.
pub(crate) fn down_of(
    cuda: &Cuda,
    stream: &CudaStream,
    operands: &Down<'_, Cuda>,
    groups: Groups,
    Manner { invariant, early }: Manner,
) -> Result<()> {
    let problem = operands.problem()?;
    let table = match operands.matrices {
        Matrices::Stack(view) => Table::stack(&view, operands.bias.as_ref(), problem.experts, problem.hidden)?,
        Matrices::Packed(experts) => {
            experts.check(cuda, "down", Shape::from([problem.experts, problem.intermediate, problem.hidden]))?;
            experts.down()
        }
    };
    grouped(
        cuda,
        stream,
        &Grouped {
            product: Product::DOWN,
            rows: problem.rows,
            groups,
            x: (Tensor::of(&operands.a)?, problem.a),
            top_k: 1,
            input_weights: (Tensor::default(), 1),
            table,
            constants: (0.0, 0.0),
            out: Tensor::of(&operands.out)?,
            invariant,
            early,
        },
    )
}
