use crate::backward::Target;
use crate::error::Result;
use crate::grouped_backward::{GroupedBackward, Source, Stage, grouped_backward};
use crate::launch::Tensor;
use crate::memory::Ref;
use crate::{Cuda, CudaStream};
use fused_moe_core::View;
use fused_moe_core::operation::{GateUpBackward, RowSource};

pub(crate) fn gate_up_backward(cuda: &Cuda, stream: &CudaStream, operands: &GateUpBackward<'_, Cuda>) -> Result<()> {
    let problem = operands.problem()?;
    let top_k = match operands.rows {
        RowSource::Tokens { top_k } => Some(top_k),
        RowSource::Rows => None,
    };
    let weights = operands.input_weights.as_ref();
    let x = match &operands.x {
        Some(x) => Some(Source { rows: Tensor::of(x)?, format: x.dtype(), top_k }),
        None => None,
    };
    let product = GroupedBackward {
        stage: Stage::GateUp,
        problem,
        groups: [Tensor::of(&operands.permutation.offsets)?, Tensor::of(&operands.permutation.row_slot)?],
        d: Source { rows: Tensor::of(&operands.d_z)?, format: operands.d_z.dtype(), top_k: None },
        x,
        weights: (Tensor::maybe(weights)?, weights.map_or(1, View::cols).max(1)),
        weights_are_ds: false,
        scale: 1.0,
        softcap: None,
        matrices: matrices(&operands.matrices, problem.experts)?,
        d_rows: operands.d_rows.as_ref().map(Tensor::of).transpose()?.map(Target::assign),
        d_matrices: Target::maybe(&operands.d_gate_up)?,
        d_bias: Target::maybe(&operands.d_bias)?,
    };
    grouped_backward(cuda, stream, &product)
}

/// A stack, and the distance of its experts.
pub(crate) fn matrices(view: &View<Ref<'_>>, experts: usize) -> Result<(Tensor, usize)> {
    Ok((Tensor::of(view)?, view.rows() / experts.max(1) * view.row_stride()))
}
