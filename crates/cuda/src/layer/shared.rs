//! The shared expert: a grouped product whose rows are all one expert's.

use super::{In, formats, pieces, vector_of};
use crate::down::{Manner, down_of};
use crate::error::Result;
use crate::gate_up::gate_up_of;
use crate::grouped::Groups;
use crate::memory::Memory;
use crate::pack::Experts;
use crate::workspace::SharedScratch;
use crate::{Cuda, CudaStream};
use fused_moe_core::DType::{F32, U32};
use fused_moe_core::config::SharedConfig;
use fused_moe_core::operation::*;
use fused_moe_core::weights::SharedWeights;
use fused_moe_core::{Backend, Permutation, View};

/// The shared expert's matrices, as those of one expert, and f32 `[H]`.
#[derive(Debug)]
pub(super) struct SharedExpert {
    config: SharedConfig,
    matrices: Experts,
    gate: Option<Memory>,
}

impl SharedExpert {
    pub(super) fn new(cuda: &Cuda, config: SharedConfig, weights: &SharedWeights<'_>) -> Result<Self> {
        let matrices = Experts::local(cuda, &[&weights.matrices], 0..1)?;
        Ok(Self { config, matrices, gate: vector_of(cuda, weights.gate)? })
    }

    /// Bytes of its weights.
    pub(super) fn bytes(&self) -> usize {
        self.matrices.bytes() + self.gate.as_ref().map_or(0, Memory::bytes)
    }

    /// What the shared expert makes of every token.
    pub(super) fn run<'s>(
        &self,
        cuda: &Cuda,
        stream: &CudaStream,
        x: In<'_>,
        scratch: &'s mut SharedScratch<'_>,
        invariant: bool,
    ) -> Result<Shared<'s, Cuda>> {
        let (tokens, hidden, width) = (x.rows(), x.cols(), self.config.intermediate);
        let [gate_up, down] = self.matrices.formats();
        let (between, outputs) = formats(x.dtype(), gate_up, down);
        // two numbers that nobody reads: all rows are the one expert's
        let slots = scratch.slots.view(U32, [tokens])?;
        let offsets = scratch.ends.view(U32, [2])?;
        gate_up_of(
            cuda,
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
                out: scratch.a.view_mut(between, [tokens, width])?,
            },
            Groups::One,
            invariant,
        )?;
        down_of(
            cuda,
            stream,
            &Down {
                a: scratch.a.view(between, [tokens, width])?,
                offsets,
                matrices: Matrices::Packed(&self.matrices),
                bias: None,
                out: scratch.y.view_mut(outputs, [tokens, hidden])?,
            },
            Groups::One,
            Manner { invariant, early: true },
        )?;
        if let Some(gate) = &self.gate {
            for piece in pieces(tokens, invariant) {
                let out = scratch.logit.view_mut(F32, [tokens, 1])?.row_range(piece.start, piece.len())?;
                let x = x.row_range(piece.start, piece.len())?;
                let weight = View::new(gate.read(), F32, 0, [1, hidden])?;
                cuda.linear(stream, Linear { x, weight, bias: None, out })?;
            }
        }
        let logit = self.gate.as_ref().map(|_| scratch.logit.view(F32, [tokens, 1])).transpose()?;
        Ok(Shared { y: scratch.y.view(outputs, [tokens, hidden])?, factor: None, logit, scale: self.config.scale })
    }
}
