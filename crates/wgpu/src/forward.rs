//! Calls of a layer in pieces of tokens.

use crate::Wgpu;
use crate::error::Result;
use fused_moe_core::backend::reborrow;
use fused_moe_core::operation::{Forward, NextNorm, Residual, RouterState, RoutesOut, Source};
use fused_moe_core::{Routing, View};
use std::ops::Range;

/// Bytes from token to token, of the operand where that is most.
pub(crate) fn token_bytes(call: &Forward<'_, Wgpu>) -> usize {
    fn bytes<S>(view: &View<S>) -> usize {
        view.row_stride().saturating_mul(view.dtype().size())
    }
    let source = match &call.source {
        Source::Router => 0,
        Source::Logits(logits) => bytes(logits),
        Source::Routes(Routing { experts, weights }) => bytes(experts).max(bytes(weights)),
    };
    let residual = match &call.residual {
        Some(Residual::Of(residual)) => bytes(residual),
        Some(Residual::InPlace) | None => 0,
    };
    let norm = call.norm.as_ref().map_or(0, |norm| bytes(&norm.out));
    let routes = call.routes.as_ref().map_or(0, |routes| bytes(&routes.experts).max(bytes(&routes.weights)));
    let RouterState { previous, next } = &call.router_state;
    let state = previous.as_ref().map_or(0, bytes).max(next.as_ref().map_or(0, bytes));
    [bytes(&call.x), bytes(&call.y), source, residual, norm, routes, state].into_iter().fold(0, usize::max)
}

/// The same call of some of its tokens.
pub(crate) fn part<'s>(call: &'s mut Forward<'_, Wgpu>, tokens: Range<usize>) -> Result<Forward<'s, Wgpu>> {
    let (first, count) = (tokens.start, tokens.len());
    Ok(Forward {
        x: call.x.row_range(first, count)?,
        source: match &call.source {
            Source::Router => Source::Router,
            Source::Logits(logits) => Source::Logits(logits.row_range(first, count)?),
            Source::Routes(Routing { experts, weights }) => Source::Routes(Routing {
                experts: experts.row_range(first, count)?,
                weights: weights.row_range(first, count)?,
            }),
        },
        sequences: call.sequences,
        router_state: RouterState {
            previous: call.router_state.previous.map(|state| state.row_range(first, count)).transpose()?,
            next: match &mut call.router_state.next {
                Some(next) => Some(reborrow::<Wgpu>(next).row_range(first, count)?),
                None => None,
            },
        },
        token_ids: call.token_ids.map(|ids| ids.columns(first, count)).transpose()?,
        residual: match &call.residual {
            Some(Residual::Of(residual)) => Some(Residual::Of(residual.row_range(first, count)?)),
            Some(Residual::InPlace) => Some(Residual::InPlace),
            None => None,
        },
        norm: match &mut call.norm {
            Some(NextNorm { weight, eps, out }) => {
                Some(NextNorm { weight: *weight, eps: *eps, out: reborrow::<Wgpu>(out).row_range(first, count)? })
            }
            None => None,
        },
        routes: match &mut call.routes {
            Some(RoutesOut { experts, weights }) => Some(RoutesOut {
                experts: reborrow::<Wgpu>(experts).row_range(first, count)?,
                weights: reborrow::<Wgpu>(weights).row_range(first, count)?,
            }),
            None => None,
        },
        counts: call.counts.as_mut().map(reborrow::<Wgpu>),
        y: reborrow::<Wgpu>(&mut call.y).row_range(first, count)?,
    })
}
