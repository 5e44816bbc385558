//! From what the router reads to the routes, and from these to rows.

use super::{CpuLayer, vector};
use crate::error::Result;
use crate::workspace::{Buffer, PermutationScratch, RoutingScratch};
use crate::{Cpu, CpuStream};
use fused_moe_core::DType::{F32, U32};
use fused_moe_core::config::{Capacity, CapacityOrder};
use fused_moe_core::operation::*;
use fused_moe_core::{Backend, HostView, Permutation, Routing, View};
use std::ops::Range;

/// What routes are made of.
#[derive(Clone, Copy)]
pub(super) struct RouteInput<'a> {
    /// `[T, E]`.
    pub(super) logits: HostView<'a>,
    /// `[T]`.
    pub(super) token_ids: Option<HostView<'a>>,
    /// `[N+1]`.
    pub(super) sequences: Option<HostView<'a>>,
}

impl CpuLayer {
    /// `logits = gate(x)`.
    pub(super) fn gate<'s>(
        &self,
        stream: &CpuStream,
        x: HostView<'_>,
        logits: &'s mut Buffer<'_>,
    ) -> Result<HostView<'s>> {
        let (config, shape) = (&self.problem.config, [x.rows(), self.problem.config.choices()]);
        if let Some(router) = &self.router {
            let operands = Gate {
                x,
                router: View::new(&router.matrix[..], router.dtype, 0, [config.choices(), config.router_width()])?,
                bias: vector(&router.bias)?,
                norm_weight: vector(&self.router_norm)?,
                config: config.gate,
                normed: None,
                logits: logits.view_mut(F32, shape)?,
            };
            self.cpu.gate(stream, operands)?;
        }
        logits.view(F32, shape)
    }

    /// The routes that the layer's rule makes of logits, without what overflows its capacity.
    pub(super) fn route<'s>(
        &self,
        stream: &CpuStream,
        input: RouteInput<'_>,
        scratch: &'s mut RoutingScratch<'_>,
        permutation: &mut PermutationScratch<'_>,
    ) -> Result<Routing<'s, Cpu>> {
        let (config, logits) = (&self.problem.config, input.logits);
        let shape = [logits.rows(), config.top_k];
        let table = match (&self.table, input.token_ids) {
            (Some(table), Some(token_ids)) => {
                let experts = View::of(table, [table.len() / config.top_k, config.top_k])?;
                Some(TokenTable { token_ids, experts })
            }
            _ => None,
        };
        let choice = Choice {
            rule: config.routing,
            correction_bias: vector(&self.correction_bias)?,
            expert_scale: vector(&self.expert_scale)?,
            table,
            experts: scratch.experts.view_mut(U32, shape)?,
            weights: scratch.weights.view_mut(F32, shape)?,
            witness: None,
        };
        self.cpu.route(stream, Route { logits, choice })?;
        if let Some(capacity) = config.capacity {
            self.limit(stream, capacity, input, scratch, permutation)?;
        }
        Ok(Routing { experts: scratch.experts.view(U32, shape)?, weights: scratch.weights.view(F32, shape)? })
    }

    /// Drops what overflows the capacity, wherever the experts are.
    fn limit(
        &self,
        stream: &CpuStream,
        capacity: Capacity,
        input: RouteInput<'_>,
        scratch: &mut RoutingScratch<'_>,
        permutation: &mut PermutationScratch<'_>,
    ) -> Result<()> {
        let tokens = input.logits.rows();
        let shape = [tokens, self.problem.config.top_k];
        let importance = match capacity.order {
            CapacityOrder::Position => None,
            CapacityOrder::Score => {
                let rule = Capacity::importance();
                let best = scratch.best.view_mut(U32, [tokens, 1])?;
                let choice = Choice::new(rule, best, scratch.importance.view_mut(F32, [tokens, 1])?);
                self.cpu.route(stream, Route { logits: input.logits, choice })?;
                Some(scratch.importance.view(F32, [tokens])?)
            }
        };
        let all = 0..self.problem.config.choices();
        let permutation = self.permute(stream, scratch.experts.view(U32, shape)?, all, permutation)?;
        let operands = DropOverflow {
            capacity,
            permutation,
            importance,
            sequences: input.sequences,
            experts: scratch.experts.view_mut(U32, shape)?,
            weights: scratch.weights.view_mut(F32, shape)?,
        };
        self.cpu.drop_overflow(stream, operands)
    }

    /// The slots of some experts, by expert.
    pub(super) fn permute<'s>(
        &self,
        stream: &CpuStream,
        experts: HostView<'_>,
        local: Range<usize>,
        scratch: &'s mut PermutationScratch<'_>,
    ) -> Result<Permutation<'s, Cpu>> {
        let choices = self.problem.config.choices();
        let (slots, ends) = ([experts.rows() * experts.cols()], [choices + 1]);
        let operands = Permute {
            experts,
            experts_total: choices,
            local,
            row_slot: scratch.row_slot.view_mut(U32, slots)?,
            slot_row: scratch.slot_row.view_mut(U32, slots)?,
            offsets: scratch.offsets.view_mut(U32, ends)?,
        };
        self.cpu.permute(stream, operands)?;
        Ok(Permutation {
            row_slot: scratch.row_slot.view(U32, slots)?,
            slot_row: scratch.slot_row.view(U32, slots)?,
            offsets: scratch.offsets.view(U32, ends)?,
        })
    }
}
