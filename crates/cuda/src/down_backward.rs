use crate::backward::Target;
use crate::error::Result;
use crate::gate_up_backward::matrices;
use crate::grouped_backward::{GroupedBackward, Source, Stage, grouped_backward};
use crate::launch::Tensor;
use crate::{Cuda, CudaStream};
use fused_moe_core::View;
use fused_moe_core::operation::{DownBackward, RowSource};

pub(crate) fn down_backward(cuda: &Cuda, stream: &CudaStream, operands: &DownBackward<'_, Cuda>) -> Result<()> {
    let problem = operands.problem()?;
    let top_k = match operands.rows {
        RowSource::Tokens { top_k } => Some(top_k),
        RowSource::Rows => None,
    };
    let weights = operands.row_weights.as_ref().and_then(|weights| weights.weights.as_ref());
    let a = match &operands.a {
        Some(a) => Some(Source { rows: Tensor::of(a)?, format: a.dtype(), top_k: None }),
        None => None,
    };
    let product = GroupedBackward {
        stage: Stage::Down,
        problem,
        groups: [Tensor::of(&operands.permutation.offsets)?, Tensor::of(&operands.permutation.row_slot)?],
        d: Source { rows: Tensor::of(&operands.d_out)?, format: operands.d_out.dtype(), top_k },
        x: a,
        weights: (Tensor::maybe(weights)?, weights.map_or(1, View::cols).max(1)),
        weights_are_ds: true,
        scale: operands.row_weights.as_ref().map_or(1.0, |weights| weights.scale),
        softcap: None,
        matrices: matrices(&operands.matrices, problem.experts)?,
        d_rows: operands.d_a.as_ref().map(Tensor::of).transpose()?.map(Target::assign),
        d_matrices: Target::maybe(&operands.d_down)?,
        d_bias: Target::maybe(&operands.d_bias)?,
    };
    grouped_backward(cuda, stream, &product)
}
