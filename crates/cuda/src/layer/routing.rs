//! From logits or tokens to routes, and to the rows that they make.

use super::{CudaLayer, In, Out, Router, pieces, vector};
use crate::error::Result;
use crate::workspace::{Buffer, PermutationScratch, RoutingScratch};
use crate::{Cuda, CudaStream};
use fused_moe_core::DType::{F32, U32};
use fused_moe_core::config::{Capacity, CapacityOrder};
use fused_moe_core::operation::*;
use fused_moe_core::{Backend, Permutation, Routing, View};
use std::ops::Range;

/// What routes are made from.
pub(super) struct RoutesFrom<'a> {
    /// The caller's logits `[T, E]`; absent, the layer's router makes them.
    pub(super) logits: Option<In<'a>>,
    /// `[T, router_width]`.
    pub(super) x: In<'a>,
    pub(super) token_ids: Option<In<'a>>,
    pub(super) sequences: Option<In<'a>>,
}

impl CudaLayer {
    /// The routes that the layer's rule makes, less what overflows a capacity. `permutation` is used for that.
    pub(super) fn routing<'s>(
        &self,
        cuda: &Cuda,
        stream: &CudaStream,
        from: RoutesFrom<'_>,
        scratch: &'s mut RoutingScratch<'_>,
        permutation: &mut PermutationScratch<'_>,
    ) -> Result<Routing<'s, Cuda>> {
        let RoutesFrom { logits: theirs, x, token_ids, sequences } = from;
        let slots = [x.rows(), self.problem.core.top_k];
        match theirs {
            Some(logits) => {
                let RoutingScratch { experts, weights, .. } = scratch;
                let choice = self.choice(token_ids, experts.view_mut(U32, slots)?, weights.view_mut(F32, slots)?)?;
                cuda.route(stream, Route { logits, choice })?;
            }
            None => self.gate_route(cuda, stream, x, token_ids, scratch)?,
        }
        if let Some(capacity) = self.problem.core.capacity {
            let (tokens, choices) = (slots[0], self.problem.core.choices());
            let RoutingScratch { logits, experts, weights, best } = scratch;
            let importance = match capacity.order {
                CapacityOrder::Position => None,
                CapacityOrder::Score => {
                    let logits = theirs.map_or_else(|| logits.view(F32, [tokens, choices]), Ok)?;
                    Some(importance(cuda, stream, logits, best)?)
                }
            };
            self.permute(cuda, stream, experts.view(U32, slots)?, 0..choices, permutation)?;
            let operands = DropOverflow {
                capacity,
                permutation: permutation.views(tokens * slots[1], choices)?,
                importance,
                sequences,
                experts: experts.view_mut(U32, slots)?,
                weights: weights.view_mut(F32, slots)?,
            };
            cuda.drop_overflow(stream, operands)?;
        }
        Ok(Routing { experts: scratch.experts.view(U32, slots)?, weights: scratch.weights.view(F32, slots)? })
    }

    /// The routes that the layer's router makes of tokens.
    fn gate_route(
        &self,
        cuda: &Cuda,
        stream: &CudaStream,
        x: In<'_>,
        token_ids: Option<In<'_>>,
        scratch: &mut RoutingScratch<'_>,
    ) -> Result<()> {
        let Some(router) = &self.router else { return Ok(()) };
        let (config, tokens) = (&self.problem.core, x.rows());
        let (slots, all) = ([tokens, config.top_k], [tokens, config.choices()]);
        let RoutingScratch { logits, experts, weights, .. } = scratch;
        let choice = self.choice(token_ids, experts.view_mut(U32, slots)?, weights.view_mut(F32, slots)?)?;
        if !self.invariant() {
            let gate = self.gate(router, x, logits.view_mut(F32, all)?)?;
            return cuda.gate_route(stream, GateRoute { gate, choice });
        }
        for Range { start, end } in pieces(tokens, true) {
            let some = logits.view_mut(F32, all)?.row_range(start, end - start)?;
            cuda.gate(stream, self.gate(router, x.row_range(start, end - start)?, some)?)?;
        }
        cuda.route(stream, Route { logits: logits.view(F32, all)?, choice })
    }

    fn gate<'s>(&'s self, router: &'s Router, x: In<'s>, logits: Out<'s>) -> Result<Gate<'s, Cuda>> {
        let (config, choices) = (&self.problem.config, self.problem.core.choices());
        let width = config.router_width();
        Ok(Gate {
            x,
            router: View::new(router.matrix.read(), router.dtype, 0, [choices, width])?,
            bias: vector(&router.bias, choices)?,
            norm_weight: vector(&self.router_norm, width)?,
            config: config.gate,
            normed: None,
            logits,
        })
    }

    fn choice<'s>(&'s self, token_ids: Option<In<'s>>, experts: Out<'s>, weights: Out<'s>) -> Result<Choice<'s, Cuda>> {
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

    /// The slots of some experts, by expert.
    pub(super) fn permute(
        &self,
        cuda: &Cuda,
        stream: &CudaStream,
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
        cuda.permute(stream, operands)
    }
}

/// The largest softmax of each token's logits, f32 `[T, 1]`: the weight of the best expert.
fn importance<'b>(cuda: &Cuda, stream: &CudaStream, logits: In<'_>, best: &'b mut [Buffer<'_>; 2]) -> Result<In<'b>> {
    let shape = [logits.rows(), 1];
    let [experts, weights] = best;
    let rule = Capacity::importance();
    let choice = Choice::new(rule, experts.view_mut(U32, shape)?, weights.view_mut(F32, shape)?);
    cuda.route(stream, Route { logits, choice })?;
    weights.view(F32, shape)
}

impl PermutationScratch<'_> {
    pub(super) fn views(&self, slots: usize, experts: usize) -> Result<Permutation<'_, Cuda>> {
        Ok(Permutation {
            row_slot: self.row_slot.view(U32, [slots])?,
            slot_row: self.slot_row.view(U32, [slots])?,
            offsets: self.offsets.view(U32, [experts + 1])?,
        })
    }
}
