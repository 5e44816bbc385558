//! From logits or tokens to routes, and to the rows that they make.

use super::{CudaLayer, In, Out, Router, pieces, vector};
use crate::error::Result;
use crate::gate::gate;
use crate::launch::Tensor;
use crate::permute::permute_counted;
use crate::ring::Routes;
use crate::route::RouteParams;
use crate::route_permute::{Grouped, route_permute};
use crate::workspace::{Buffer, COUNTERS, PermutationScratch, RoutingScratch};
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
    pub(super) wanted: Wanted,
}

/// What there is to be after the routing.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// The routes.
    Routes,
    /// The slots by expert, too: every one is sure to have an expert that is here.
    Groups,
    /// The routes, or what the next launch finds them by.
    Logits,
}

/// What there is besides the routes.
#[derive(Clone, Copy, Default)]
pub(super) struct Outcome {
    /// The slots are grouped by expert.
    pub(super) grouped: bool,
    /// The routes are still to be found by these, and then to be written where they belong.
    pub(super) left: Option<Routes>,
}

impl CudaLayer {
    /// Where the routes are that the layer's rule makes, less what overflows a capacity; `permutation` is for groups.
    pub(super) fn routing<'s>(
        &self,
        cuda: &Cuda,
        stream: &CudaStream,
        from: RoutesFrom<'_>,
        scratch: &'s mut RoutingScratch<'_>,
        permutation: &mut PermutationScratch<'_>,
    ) -> Result<(Routing<'s, Cuda>, Outcome)> {
        let RoutesFrom { logits: theirs, x, token_ids, sequences, wanted } = from;
        let slots = [x.rows(), self.problem.core.top_k];
        let outcome = match theirs {
            Some(logits) => {
                let RoutingScratch { experts, weights, .. } = scratch;
                let choice = self.choice(token_ids, experts.view_mut(U32, slots)?, weights.view_mut(F32, slots)?)?;
                self.route(cuda, stream, Route { logits, choice }, (wanted, &mut *permutation))?
            }
            None => self.gate_route(cuda, stream, (x, token_ids), scratch, (wanted, &mut *permutation))?,
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
        Ok((routing, outcome))
    }

    /// The routes of logits, and of what is wanted besides what costs no launch of its own.
    fn route(
        &self,
        cuda: &Cuda,
        stream: &CudaStream,
        operands: Route<'_, Cuda>,
        (wanted, scratch): (Wanted, &mut PermutationScratch<'_>),
    ) -> Result<Outcome> {
        let problem = operands.problem()?;
        if let Some(lane_logits) = crate::plan::lane_logits(&problem).filter(|_| wanted == Wanted::Logits) {
            let params = RouteParams::new(&problem, &operands, stream)?;
            let left = Some(Routes { params, logits: problem.logits, lane_logits });
            return Ok(Outcome { left, ..Outcome::default() });
        }
        let Some(plan) = crate::plan::route_permute(&problem, cuda.numbers()).filter(|_| wanted == Wanted::Groups)
        else {
            cuda.route(stream, operands)?;
            return Ok(Outcome::default());
        };
        let slots = problem.tokens * problem.top_k;
        let grouped = Grouped {
            row_slot: scratch.row_slot.view_mut(U32, [slots])?,
            slot_row: scratch.slot_row.view_mut(U32, [slots])?,
            offsets: scratch.offsets.view_mut(U32, [problem.experts + 1 + COUNTERS])?,
        };
        route_permute(cuda, stream, &operands, &grouped, plan)?;
        Ok(Outcome { grouped: true, ..Outcome::default() })
    }

    /// The routes that the layer's router makes of tokens, as [`route`](Self::route) does of logits.
    fn gate_route(
        &self,
        cuda: &Cuda,
        stream: &CudaStream,
        (x, token_ids): (In<'_>, Option<In<'_>>),
        scratch: &mut RoutingScratch<'_>,
        (wanted, permutation): (Wanted, &mut PermutationScratch<'_>),
    ) -> Result<Outcome> {
        let Some(router) = &self.router else { return Ok(Outcome::default()) };
        let (config, tokens) = (&self.problem.core, x.rows());
        let (slots, all) = ([tokens, config.top_k], [tokens, config.choices()]);
        let RoutingScratch { logits, experts, weights, .. } = scratch;
        let choice = self.choice(token_ids, experts.view_mut(U32, slots)?, weights.view_mut(F32, slots)?)?;
        if !self.invariant() {
            if wanted == Wanted::Routes {
                let gate = self.gate(router, x, logits.view_mut(F32, all)?)?;
                cuda.gate_route(stream, GateRoute { gate, choice })?;
                return Ok(Outcome::default());
            }
            // one token's next launch goes through its instructions before its turn
            let early = wanted == Wanted::Logits && tokens == 1;
            gate(cuda, stream, &self.gate(router, x, logits.view_mut(F32, all)?)?, early)?;
            let operands = Route { logits: logits.view(F32, all)?, choice };
            return self.route(cuda, stream, operands, (wanted, permutation));
        }
        for Range { start, end } in pieces(tokens, true) {
            let some = logits.view_mut(F32, all)?.row_range(start, end - start)?;
            cuda.gate(stream, self.gate(router, x.row_range(start, end - start)?, some)?)?;
        }
        cuda.route(stream, Route { logits: logits.view(F32, all)?, choice })?;
        Ok(Outcome::default())
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

    /// The slots of some experts, by expert; the counters are zero then.
    pub(super) fn permute(
        &self,
        cuda: &Cuda,
        stream: &CudaStream,
        experts: In<'_>,
        local: Range<usize>,
        scratch: &mut PermutationScratch<'_>,
    ) -> Result<()> {
        let (slots, experts_total) = (experts.rows() * experts.cols(), self.problem.core.choices());
        let all = scratch.offsets.view(U32, [experts_total + 1 + COUNTERS])?;
        let counters = Tensor::of(&all)?.data + 4 * (experts_total as u64 + 1);
        let operands = Permute {
            experts,
            experts_total,
            local,
            row_slot: scratch.row_slot.view_mut(U32, [slots])?,
            slot_row: scratch.slot_row.view_mut(U32, [slots])?,
            offsets: scratch.offsets.view_mut(U32, [experts_total + 1])?,
        };
        permute_counted(cuda, stream, operands, counters)
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
