//! The shared expert of a layer.

use crate::down::down_of;
use crate::error::Result;
use crate::gate_up::gate_up_of;
use crate::grouped::Groups;
use crate::layer::{BETWEEN, In, vector_of};
use crate::linear::linear;
use crate::memory::Memory;
use crate::pack::Experts;
use crate::workspace::SharedScratch;
use crate::{Wgpu, WgpuStream};
use fused_moe_core::DType::{F32, U32};
use fused_moe_core::config::SharedConfig;
use fused_moe_core::operation::{Down, GateUp, GateUpOutput, Linear, Matrices, RowSource, Shared};
use fused_moe_core::weights::SharedWeights;
use fused_moe_core::{Permutation, View};

/// Its matrices, as those of one expert, and f32 `[H]`.
#[derive(Debug)]
pub(crate) struct SharedExpert {
    config: SharedConfig,
    matrices: Experts,
    gate: Option<Memory>,
}

impl SharedExpert {
    pub(crate) fn new(wgpu: &Wgpu, config: SharedConfig, weights: &SharedWeights<'_>) -> Result<Self> {
        let matrices = Experts::local(wgpu, &[&weights.matrices], 0..1)?;
        Ok(Self { config, matrices, gate: vector_of(wgpu, weights.gate)? })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.matrices.bytes() + self.gate.as_ref().map_or(0, Memory::bytes)
    }

    /// What it makes of every token.
    pub(crate) fn run<'s>(
        &self,
        wgpu: &Wgpu,
        stream: &WgpuStream,
        x: In<'_>,
        scratch: &'s mut SharedScratch<'_>,
        invariant: bool,
    ) -> Result<Shared<'s, Wgpu>> {
        let (tokens, hidden, width) = (x.rows(), x.cols(), self.config.intermediate);
        // a permutation that nobody reads: all rows are the one expert's
        let unread = Memory::placeholder(scratch.y.buffer(), 4 * tokens.max(2));
        let slots = View::new(unread.read(), U32, 0, [tokens])?;
        let offsets = View::new(unread.read(), U32, 0, [2])?;
        gate_up_of(
            wgpu,
            stream,
            &GateUp {
                x,
                rows: RowSource::Rows,
                permutation: Permutation { row_slot: slots, slot_row: slots, offsets },
                input_weights: None,
                matrices: Matrices::Packed(&self.matrices),
                bias: None,
                activation: self.config.activation,
                output: GateUpOutput::Activated,
                out: scratch.a.view_mut(BETWEEN, [tokens, width])?,
            },
            Groups::One,
            invariant,
        )?;
        down_of(
            wgpu,
            stream,
            &Down {
                a: scratch.a.view(BETWEEN, [tokens, width])?,
                offsets,
                matrices: Matrices::Packed(&self.matrices),
                bias: None,
                out: scratch.y.view_mut(BETWEEN, [tokens, hidden])?,
            },
            Groups::One,
            invariant,
        )?;
        let y = scratch.y.view(BETWEEN, [tokens, hidden])?;
        let Some(gate) = &self.gate else {
            return Ok(Shared { y, factor: None, logit: None, scale: self.config.scale });
        };
        let weight = View::new(gate.read(), F32, 0, [1, hidden])?;
        let out = scratch.logit.view_mut(F32, [tokens, 1])?;
        linear(wgpu, stream, &Linear { x, weight, bias: None, out }, invariant)?;
        Ok(Shared { y, factor: None, logit: Some(scratch.logit.view(F32, [tokens, 1])?), scale: self.config.scale })
    }
}
