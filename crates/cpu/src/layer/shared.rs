use super::vector_bytes;
use crate::error::Result;
use crate::pack::Experts;
use crate::workspace::SharedScratch;
use crate::{Cpu, CpuStream};
use fused_moe_core::DType::{F32, U32};
use fused_moe_core::config::SharedConfig;
use fused_moe_core::operation::*;
use fused_moe_core::weights::{SharedWeights, floats};
use fused_moe_core::{Backend, HostView, Permutation, View};

/// The shared expert's matrices, as those of one expert, and f32 `[H]`.
#[derive(Debug)]
pub(super) struct SharedExpert {
    config: SharedConfig,
    matrices: Experts,
    gate: Option<Vec<f32>>,
}

impl SharedExpert {
    pub(super) fn new(cpu: &Cpu, config: SharedConfig, weights: &SharedWeights<'_>) -> Result<Self> {
        let matrices = Experts::local(cpu, &[&weights.matrices], 0..1)?;
        Ok(Self { config, matrices, gate: weights.gate.map(floats).transpose()? })
    }

    pub(super) fn weight_bytes(&self) -> usize {
        self.matrices.bytes() + vector_bytes(&self.gate)
    }

    /// What the shared expert makes of every token.
    pub(super) fn run<'s>(
        &self,
        cpu: &Cpu,
        stream: &CpuStream,
        x: HostView<'_>,
        scratch: &'s mut SharedScratch<'_>,
    ) -> Result<Shared<'s, Cpu>> {
        let (tokens, hidden, width) = (x.rows(), x.cols(), self.config.intermediate);
        let offsets = [0, tokens as u32];
        let offsets = View::of(&offsets, [2])?;
        let slots = scratch.slots.view(U32, [tokens])?;
        let between = self.matrices.between(x.dtype(), cpu.isa());
        cpu.gate_up(
            stream,
            GateUp {
                x,
                rows: RowSource::Rows,
                permutation: Permutation { row_slot: slots, slot_row: slots, offsets },
                input_weights: None,
                matrices: Matrices::Packed(&self.matrices),
                bias: None,
                activation: self.config.activation,
                output: GateUpOutput::Activated,
                out: scratch.a.view_mut(between, [tokens, width])?,
            },
        )?;
        cpu.down(
            stream,
            Down {
                a: scratch.a.view(between, [tokens, width])?,
                offsets,
                matrices: Matrices::Packed(&self.matrices),
                bias: None,
                out: scratch.y.view_mut(F32, [tokens, hidden])?,
            },
        )?;
        let logit = match &self.gate {
            Some(gate) => {
                let out = scratch.logit.view_mut(F32, [tokens, 1])?;
                cpu.linear(stream, Linear { x, weight: View::of(gate, [1, hidden])?, bias: None, out })?;
                Some(scratch.logit.view(F32, [tokens, 1])?)
            }
            None => None,
        };
        Ok(Shared { y: scratch.y.view(F32, [tokens, hidden])?, factor: None, logit, scale: self.config.scale })
    }
}
