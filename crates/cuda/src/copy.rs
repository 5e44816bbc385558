//! Small copies on the device.

use crate::error::Result;
use crate::kernel::Kernel;
use crate::launch::{Grid, Tensor, launch, params};
use crate::memory::{Mut, Ref};
use crate::{Cuda, CudaStream, plan};
use fused_moe_core::View;

params! {
    CopyParams { from: Tensor, out: Tensor, rows: u64, width: u64 }
}

params! {
    CountsParams { offsets: Tensor, counts: Tensor, experts_total: u32 }
}

/// `out = from`, both of 4-byte elements and of one shape.
pub(crate) fn copy(cuda: &Cuda, stream: &CudaStream, from: View<Ref<'_>>, out: View<Mut<'_>>) -> Result<()> {
    let (rows, width) = (from.rows(), from.cols());
    let params =
        CopyParams { from: Tensor::of(&from)?, out: Tensor::of(&out)?, rows: rows as u64, width: width as u64 };
    launch(cuda, stream, Kernel::Copy, plan::elementwise(rows, width), &params)
}

/// Rows of each expert `[E]`, from offsets `[E+1]`.
pub(crate) fn counts(cuda: &Cuda, stream: &CudaStream, offsets: View<Ref<'_>>, counts: View<Mut<'_>>) -> Result<()> {
    let experts = counts.cols();
    let params =
        CountsParams { offsets: Tensor::of(&offsets)?, counts: Tensor::of(&counts)?, experts_total: experts as u32 };
    launch(cuda, stream, Kernel::Counts, Grid::line(experts.div_ceil(256), 256), &params)
}
