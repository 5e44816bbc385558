use crate::error::Result;
use crate::kernel::Kernel;
use crate::launch::{Groups, Operand, Tensor, launch, params};
use crate::memory::{Mut, Ref};
use crate::plan::{pairs, pieces};
use crate::{Wgpu, WgpuStream};
use fused_moe_core::View;

params! {
    CopyParams { source: Tensor, out: Tensor, rows: u32, width: u32 }
}

params! {
    CountsParams { offsets: Tensor, out: Tensor, experts: u32, add: u32 }
}

/// `out = from`, both of 4-byte elements and of one shape.
pub(crate) fn copy(wgpu: &Wgpu, stream: &WgpuStream, from: View<Ref<'_>>, out: View<Mut<'_>>) -> Result<()> {
    let (device, width) = (wgpu.device(), from.cols());
    for rows in pieces(wgpu, from.rows(), 4 * from.row_stride().max(out.row_stride())) {
        let count = rows.len() as u32;
        let source = Operand::rows(device, "copy", &from, rows.clone())?;
        let out = Operand::rows(device, "copy", &out, rows)?;
        let params = CopyParams { source: source.tensor, out: out.tensor, rows: count, width: width as u32 };
        launch(wgpu, stream, Kernel::Copy, &[Some(source), Some(out)], (pairs(count, width), &params))?;
    }
    Ok(())
}

/// Rows of each expert `[E]`, from offsets `[E+1]`, or so many more.
pub(crate) fn counts(
    wgpu: &Wgpu,
    stream: &WgpuStream,
    offsets: View<Ref<'_>>,
    out: View<Mut<'_>>,
    add: bool,
) -> Result<()> {
    let experts = out.cols();
    let offsets = Operand::of(wgpu.device(), "counts", &offsets)?;
    let out = Operand::of(wgpu.device(), "counts", &out)?;
    let params = CountsParams { offsets: offsets.tensor, out: out.tensor, experts: experts as u32, add: add.into() };
    let groups = Groups::Line(experts.div_ceil(256) as u64);
    launch(wgpu, stream, Kernel::Counts, &[Some(offsets), Some(out)], (groups, &params))
}
