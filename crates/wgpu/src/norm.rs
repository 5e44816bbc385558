//! RMSNorm on its own, by combine.

use crate::error::Result;
use crate::layer::{BETWEEN, In, Out, upload, vector};
use crate::memory::Memory;
use crate::workspace::Buffer;
use crate::{Wgpu, WgpuStream, accumulate};
use fused_moe_core::backend::{shorten_norm, shorten_residual};
use fused_moe_core::config::RmsNorm;
use fused_moe_core::operation::{Accumulate, Combine, Factor, NextNorm, Residual};
use fused_moe_core::weights::floats;
use fused_moe_core::{Backend, HostView};

/// The norm of rows, which is that of rows plus no slots at all; `out` gets, or has, the rows themselves. `wide` is anything
/// of their width.
pub(crate) fn norm(
    wgpu: &Wgpu,
    stream: &WgpuStream,
    wide: In<'_>,
    (rows, norm): (Residual<'_, Wgpu>, NextNorm<'_, Wgpu>),
    out: Out<'_>,
) -> Result<()> {
    let operands = Combine::residual_alone(
        wide.row_range(0, 0)?,
        shorten_residual::<Wgpu>(rows),
        Some(shorten_norm::<Wgpu>(norm)),
        out,
    );
    wgpu.combine(stream, operands)
}

/// The norm of the experts' outputs; weight f32 `[H]`, what is added to it included.
#[derive(Debug)]
pub(crate) struct ExpertNorm {
    weight: Option<Memory>,
    width: usize,
    config: RmsNorm,
}

impl ExpertNorm {
    pub(crate) fn of(wgpu: &Wgpu, norm: Option<RmsNorm>, weight: Option<HostView<'_>>) -> Result<Option<Self>> {
        let Some(config) = norm else { return Ok(None) };
        let offset = if config.unit_offset { 1.0 } else { 0.0 };
        let width = weight.map_or(0, |weight| weight.cols());
        let weight = match weight {
            Some(weight) => {
                let weight: Vec<f32> = floats(weight)?.into_iter().map(|w| w + offset).collect();
                Some(upload(wgpu, bytemuck::cast_slice(&weight))?)
            }
            None => None,
        };
        Ok(Some(Self { weight, width, config }))
    }

    pub(crate) fn bytes(&self) -> usize {
        self.weight.as_ref().map_or(0, Memory::bytes)
    }

    /// Of the rows y, with a second buffer of their size; returns which of the two has it. `wide` is anything of their width.
    pub(crate) fn run<'s>(
        &self,
        wgpu: &Wgpu,
        stream: &WgpuStream,
        wide: In<'_>,
        [y, other]: [&'s mut Buffer<'_>; 2],
        rows: usize,
    ) -> Result<In<'s>> {
        let (shape, eps, weight) = ([rows, wide.cols()], self.config.eps, vector(&self.weight, self.width)?);
        let (Some(weight), true) = (weight, self.config.scaled_first) else {
            let next = NextNorm { weight, eps, out: other.view_mut(BETWEEN, shape)? };
            norm(wgpu, stream, wide, (Residual::InPlace, next), y.view_mut(BETWEEN, shape)?)?;
            return other.view(BETWEEN, shape);
        };
        let (acc, weight) = (other.view_mut(BETWEEN, shape)?, Factor::PerColumn(weight));
        let scaled = Accumulate { acc, weight, y: y.view(BETWEEN, shape)? };
        accumulate::accumulate(wgpu, stream, scaled, true)?;
        let next = NextNorm { weight: None, eps, out: y.view_mut(BETWEEN, shape)? };
        norm(wgpu, stream, wide, (Residual::InPlace, next), other.view_mut(BETWEEN, shape)?)?;
        y.view(BETWEEN, shape)
    }
}
