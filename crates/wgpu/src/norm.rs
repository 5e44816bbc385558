//! RMSNorm on its own, by combine.

use crate::error::Result;
use crate::layer::{In, Out, shorten_norm, shorten_residual, upload, vector};
use crate::memory::Memory;
use crate::pack::floats;
use crate::{Wgpu, WgpuStream};
use fused_moe_core::config::RmsNorm;
use fused_moe_core::operation::{Combine, NextNorm, Residual, SlotRows};
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
    wgpu.combine(
        stream,
        Combine {
            rows: SlotRows::Slots(wide.row_range(0, 0)?),
            weights: None,
            copies: None,
            routed_scale: 1.0,
            shared: None,
            residual: Some(shorten_residual(rows)),
            norm: Some(shorten_norm(norm)),
            out,
        },
    )
}

/// The norm of the experts' outputs; weight f32 `[H]`, what is added to it included.
#[derive(Debug)]
pub(crate) struct ExpertNorm {
    weight: Option<Memory>,
    width: usize,
    eps: f32,
}

impl ExpertNorm {
    pub(crate) fn of(wgpu: &Wgpu, norm: Option<RmsNorm>, weight: Option<HostView<'_>>) -> Result<Option<Self>> {
        let Some(RmsNorm { eps, unit_offset }) = norm else { return Ok(None) };
        let offset = if unit_offset { 1.0 } else { 0.0 };
        let width = weight.map_or(0, |weight| weight.cols());
        let weight = match weight {
            Some(weight) => {
                let weight: Vec<f32> = floats(weight)?.into_iter().map(|w| w + offset).collect();
                Some(upload(wgpu, bytemuck::cast_slice(&weight))?)
            }
            None => None,
        };
        Ok(Some(Self { weight, width, eps }))
    }

    pub(crate) fn bytes(&self) -> usize {
        self.weight.as_ref().map_or(0, Memory::bytes)
    }

    /// Of rows, into `out`.
    pub(crate) fn next<'s>(&'s self, out: Out<'s>) -> Result<NextNorm<'s, Wgpu>> {
        Ok(NextNorm { weight: vector(&self.weight, self.width)?, eps: self.eps, out })
    }
}
