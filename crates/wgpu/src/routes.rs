//! The routes of a layer's call: what its router or given logits make them, without what overflows a capacity, by expert.

use crate::error::Result;
use crate::layer::{BETWEEN, In, Out, WgpuLayer, vector};
use crate::workspace::{PermutationScratch, RoutingScratch, Scratch};
use crate::{Wgpu, WgpuStream, gate};
use fused_moe_core::DType::{F32, U32};
use fused_moe_core::config::{Capacity, CapacityOrder};
use fused_moe_core::operation::*;
use fused_moe_core::{Backend, Permutation, Routing, View};
use std::ops::Range;

/// What routes are made of.
pub(crate) struct Choosing<'a> {
    /// `[T, H]`: what the router reads.
    pub(crate) x: In<'a>,
    /// `[T, E]`, where they are given.
    pub(crate) logits: Option<In<'a>>,
    pub(crate) token_ids: Option<In<'a>>,
    pub(crate) sequences: Option<In<'a>>,
}

impl WgpuLayer {
    /// Writes the routes that the layer's rule makes; from x, with the gate's norm if the experts read it.
    pub(crate) fn choose(
        &self,
        wgpu: &Wgpu,
        stream: &WgpuStream,
        from: &Choosing<'_>,
        scratch: &mut Scratch<'_>,
    ) -> Result<()> {
        let (tokens, config) = (from.x.rows(), &self.problem.core);
        let RoutingScratch { logits, experts, weights } = &mut scratch.routing;
        let (slots, all) = ([tokens, config.top_k], [tokens, config.choices()]);
        let choice = self.choice(from.token_ids, experts.view_mut(U32, slots)?, weights.view_mut(F32, slots)?)?;
        let logits = match (from.logits, &self.router) {
            (Some(logits), _) => {
                wgpu.route(stream, Route { logits, choice })?;
                logits
            }
            (None, Some(router)) => {
                let (x, width) = (from.x, self.problem.config.router_width());
                let normed = self.gate_norm_feeds_experts().map(|_| scratch.tokens.view_mut(BETWEEN, [tokens, width]));
                let gate = Gate {
                    x,
                    router: View::new(router.matrix.read(), router.dtype, 0, [config.choices(), width])?,
                    bias: vector(&router.bias, config.choices())?,
                    norm_weight: vector(&self.router_norm, width)?,
                    config: config.gate,
                    normed: normed.transpose()?,
                    logits: logits.view_mut(F32, all)?,
                };
                gate::gate_route(wgpu, stream, GateRoute { gate, choice }, self.invariant())?;
                logits.view(F32, all)?
            }
            // a call from x of a layer without router is refused before
            (None, None) => return Ok(()),
        };
        let Some(capacity) = config.capacity else { return Ok(()) };
        if capacity.order == CapacityOrder::Score {
            let one = [tokens, 1];
            // which the products write later
            let (best, importance) = (scratch.y.view_mut(U32, one)?, scratch.a.view_mut(F32, one)?);
            let rule = Capacity::importance();
            wgpu.route(stream, Route { logits, choice: Choice::new(rule, best, importance) })?;
        }
        self.drop_overflow(wgpu, stream, (capacity, from.sequences), tokens, scratch)
    }

    fn choice<'s>(&'s self, token_ids: Option<In<'s>>, experts: Out<'s>, weights: Out<'s>) -> Result<Choice<'s, Wgpu>> {
        let config = &self.problem.core;
        let table = match (&self.table, token_ids) {
            (Some((table, vocabulary)), Some(token_ids)) => {
                Some(TokenTable { token_ids, experts: View::new(table.read(), U32, 0, [*vocabulary, config.top_k])? })
            }
            _ => None,
        };
        Ok(Choice {
            rule: config.routing,
            correction_bias: vector(&self.correction_bias, config.choices() - config.routing.always)?,
            expert_scale: vector(&self.expert_scale, config.choices())?,
            table,
            experts,
            weights,
            witness: None,
        })
    }

    /// Takes what overflows out of the routes; the importance of tokens lies where activations will.
    fn drop_overflow(
        &self,
        wgpu: &Wgpu,
        stream: &WgpuStream,
        (capacity, sequences): (Capacity, Option<In<'_>>),
        tokens: usize,
        scratch: &mut Scratch<'_>,
    ) -> Result<()> {
        let Scratch { routing: RoutingScratch { experts, weights, .. }, permutation, a, .. } = scratch;
        let (choices, slots) = (self.problem.core.choices(), [tokens, self.problem.core.top_k]);
        self.permute(wgpu, stream, experts.view(U32, slots)?, 0..choices, permutation)?;
        let by_score = capacity.order == CapacityOrder::Score;
        let operands = DropOverflow {
            capacity,
            permutation: permutation.views(tokens * self.problem.core.top_k, choices)?,
            importance: by_score.then(|| a.view(F32, [tokens, 1])).transpose()?,
            sequences,
            experts: experts.view_mut(U32, slots)?,
            weights: weights.view_mut(F32, slots)?,
        };
        wgpu.drop_overflow(stream, operands)
    }

    /// The slots of these experts, by expert.
    pub(crate) fn permute(
        &self,
        wgpu: &Wgpu,
        stream: &WgpuStream,
        experts: In<'_>,
        local: Range<usize>,
        scratch: &mut PermutationScratch<'_>,
    ) -> Result<()> {
        let (slots, experts_total) = (experts.rows() * experts.cols(), self.problem.core.choices());
        let operands = Permute {
            experts,
            experts_total,
            local,
            row_slot: scratch.row_slot.view_mut(U32, [slots])?,
            slot_row: scratch.slot_row.view_mut(U32, [slots])?,
            offsets: scratch.offsets.view_mut(U32, [experts_total + 1])?,
        };
        wgpu.permute(stream, operands)
    }
}

impl RoutingScratch<'_> {
    pub(crate) fn views(&self, slots: [usize; 2]) -> Result<Routing<'_, Wgpu>> {
        Ok(Routing { experts: self.experts.view(U32, slots)?, weights: self.weights.view(F32, slots)? })
    }
}

impl PermutationScratch<'_> {
    /// Of so many slots, and experts with those without weights.
    pub(crate) fn views(&self, slots: usize, experts: usize) -> Result<Permutation<'_, Wgpu>> {
        Ok(Permutation {
            row_slot: self.row_slot.view(U32, [slots])?,
            slot_row: self.slot_row.view(U32, [slots])?,
            offsets: self.offsets.view(U32, [experts + 1])?,
        })
    }
}
