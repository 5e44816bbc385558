//! From logits or tokens to routes, and to the rows that they make.

use super::{CudaLayer, In, Out, Router, pieces, vector};
use crate::error::Result;
use crate::route_permute::{Grouped, route_permute};
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
    /// Whether every slot is sure to have an expert that is here, and its row is wanted.
    pub(super) group: bool,
}

impl CudaLayer {
    /// The routes that the layer's rule makes, less what overflows a capacity; and whether their slots are grouped by expert
    /// in `permutation` already.
    pub(super) fn routing<'s>(
        &self,
        cuda: &Cuda,
        stream: &CudaStream,
        from: RoutesFrom<'_>,
        scratch: &'s mut RoutingScratch<'_>,
        permutation: &mut PermutationScratch<'_>,
    ) -> Result<(Routing<'s, Cuda>, bool)> {
        let RoutesFrom { logits: theirs, x, token_ids, sequences, group } = from;
        let slots = [x.rows(), self.problem.core.top_k];
        let grouped = match theirs {
            Some(logits) => {
                let RoutingScratch { experts, weights, .. } = scratch;
                let choice = self.choice(token_ids, experts.view_mut(U32, slots)?, weights.view_mut(F32, slots)?)?;
                self.route(cuda, stream, Route { logits, choice }, group.then_some(&mut *permutation))?
            }
            None => {
                let permutation = group.then_some(&mut *permutation);
                self.gate_route(cuda, stream, (x, token_ids), scratch, permutation)?
            }
        };
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
        let routing =
            Routing { experts: scratch.experts.view(U32, slots)?, weights: scratch.weights.view(F32, slots)? };
        Ok((routing, grouped))
    }

    /// The routes of logits, and the slots by expert if there is `permutation` for them and one launch does both; whether it
    /// did.
    fn route(
        &self,
        cuda: &Cuda,
        stream: &CudaStream,
        operands: Route<'_, Cuda>,
        permutation: Option<&mut PermutationScratch<'_>>,
    ) -> Result<bool> {
        let problem = operands.problem()?;
        let (Some(scratch), Some(plan)) = (permutation, crate::plan::route_permute(&problem)) else {
            cuda.route(stream, operands)?;
            return Ok(false);
        };
        let slots = problem.tokens * problem.top_k;
        let grouped = Grouped {
            row_slot: scratch.row_slot.view_mut(U32, [slots])?,
            slot_row: scratch.slot_row.view_mut(U32, [slots])?,
            offsets: scratch.offsets.view_mut(U32, [problem.experts + 1])?,
        };
        route_permute(cuda, stream, &operands, &grouped, plan)?;
        Ok(true)
    }

    /// The routes that the layer's router makes of tokens; `permutation` and the result as those of [`route`](Self::route).
    fn gate_route(
        &self,
        cuda: &Cuda,
        stream: &CudaStream,
        (x, token_ids): (In<'_>, Option<In<'_>>),
        scratch: &mut RoutingScratch<'_>,
        permutation: Option<&mut PermutationScratch<'_>>,
    ) -> Result<bool> {
        let Some(router) = &self.router else { return Ok(false) };
        let (config, tokens) = (&self.problem.core, x.rows());
        let (slots, all) = ([tokens, config.top_k], [tokens, config.choices()]);
        let RoutingScratch { logits, experts, weights, .. } = scratch;
        let choice = self.choice(token_ids, experts.view_mut(U32, slots)?, weights.view_mut(F32, slots)?)?;
        if !self.invariant() {
            if permutation.is_none() {
                let gate = self.gate(router, x, logits.view_mut(F32, all)?)?;
                cuda.gate_route(stream, GateRoute { gate, choice })?;
                return Ok(false);
            }
            cuda.gate(stream, self.gate(router, x, logits.view_mut(F32, all)?)?)?;
            return self.route(cuda, stream, Route { logits: logits.view(F32, all)?, choice }, permutation);
        }
        for Range { start, end } in pieces(tokens, true) {
            let some = logits.view_mut(F32, all)?.row_range(start, end - start)?;
            cuda.gate(stream, self.gate(router, x.row_range(start, end - start)?, some)?)?;
        }
        cuda.route(stream, Route { logits: logits.view(F32, all)?, choice })?;
        Ok(false)
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
