use crate::error::Result;
use crate::gradient::wanted;
use crate::grouped_backward::{GroupedBackward, Source, grouped_backward};
use crate::launch::Operand;
use crate::memory::Ref;
use crate::{Wgpu, WgpuStream};
use fused_moe_core::View;
use fused_moe_core::operation::{DownBackward, GradientMode, RowSource};

pub(crate) fn down_backward(wgpu: &Wgpu, stream: &WgpuStream, operands: DownBackward<'_, Wgpu>) -> Result<()> {
    const NAME: &str = "down_backward";
    let (problem, device) = (operands.problem()?, wgpu.device());
    let row_weights = operands.row_weights.as_ref();
    let weights = row_weights.and_then(|weights| weights.weights.as_ref());
    let d = Source {
        view: &operands.d_out,
        gather: gather(wgpu, NAME, operands.rows, &operands.permutation.row_slot)?,
        weights: by_slot(wgpu, NAME, weights)?,
        scale: row_weights.map_or(1.0, |weights| weights.scale),
    };
    grouped_backward(
        wgpu,
        stream,
        &GroupedBackward {
            operation: NAME,
            problem,
            offsets: Some(Operand::of(device, NAME, &operands.permutation.offsets)?),
            d,
            capped: None,
            x: operands.a.as_ref().map(Source::rows),
            matrices: &operands.matrices,
            d_rows: operands.d_a.as_ref().map(|d_a| (d_a, GradientMode::Assign)),
            d_matrices: wanted(&operands.d_down),
            d_bias: wanted(&operands.d_bias),
        },
    )
}

/// The slots of the rows and K, where a row is that of a token.
pub(crate) fn gather<'a>(
    wgpu: &Wgpu,
    operation: &'static str,
    rows: RowSource,
    row_slot: &'a View<Ref<'a>>,
) -> Result<Option<(Operand<'a>, usize)>> {
    Ok(match rows {
        RowSource::Tokens { top_k } => Some((Operand::of(wgpu.device(), operation, row_slot)?, top_k)),
        RowSource::Rows => None,
    })
}

/// Weights, one a slot, and how many make a row.
pub(crate) fn by_slot<'a>(
    wgpu: &Wgpu,
    operation: &'static str,
    weights: Option<&'a View<Ref<'a>>>,
) -> Result<Option<(Operand<'a>, usize)>> {
    Ok(match weights {
        Some(weights) => Some((Operand::of(wgpu.device(), operation, weights)?, weights.cols())),
        None => None,
    })
}
