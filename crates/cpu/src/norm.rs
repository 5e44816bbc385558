use crate::Cpu;
use crate::error::Result;
use crate::plan::{CHUNK, RowsPlan};
use crate::rows::{Part, norm_factor, share_rows};
use fused_moe_core::HostViewMut;
use fused_moe_core::config::RmsNorm;

/// The first `count` rows, f32, become their norm, as [`RmsNorm`] has it; `weight` has its offset already.
pub(crate) fn rms_norm(
    cpu: &Cpu,
    rows: HostViewMut<'_>,
    count: usize,
    (norm, weight): (RmsNorm, Option<&[f32]>),
) -> Result<()> {
    let (kernels, width) = (cpu.kernels, rows.cols());
    share_rows(&cpu.pool, Part::<f32>::new(rows)?, count, RowsPlan::elements(width), |range, mut rows| {
        let mut before = [0.0; CHUNK];
        for i in 0..range.len() {
            let row = rows.row(i);
            if let Some(weight) = weight.filter(|_| norm.scaled_first) {
                row.iter_mut().zip(weight).for_each(|(x, w)| *x *= w);
            }
            let squares = row.chunks(CHUNK).map(|chunk| f64::from(kernels.sum_squares(chunk))).sum();
            let factor = norm_factor(squares, width, norm.eps);
            for (chunk, col) in row.chunks_mut(CHUNK).zip((0..).step_by(CHUNK)) {
                let before = &mut before[..chunk.len()];
                before.copy_from_slice(chunk);
                let weight = weight.filter(|_| !norm.scaled_first);
                let weight = weight.and_then(|weight| weight.get(col..col + chunk.len()));
                kernels.scale(before, factor, weight, chunk);
            }
        }
    });
    Ok(())
}
