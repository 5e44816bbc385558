//! Calls of a layer that are gone through and not run: what they need is compiled before it is needed, and how they would
//! be carried out is told, by the code that carries them out.

use crate::device::Device;
use crate::error::Result;
use crate::layer::WgpuLayer;
use crate::memory::Memory;
use crate::workspace::Workspace;
use crate::{Wgpu, WgpuStream};
use fused_moe_core::DType::{F32, U32};
use fused_moe_core::config::{LayerConfig, Selection};
use fused_moe_core::operation::{Forward, NextNorm, RoutesOut, Source};
use fused_moe_core::{Backend, Routing, View};

/// What stands for a stream and for the operands of a call; each has a buffer of its own, as kernels depend on that.
#[derive(Debug)]
pub(crate) struct Idle {
    stream: WgpuStream,
    buffers: [wgpu::Buffer; 13],
}

impl Idle {
    pub(crate) fn new(wgpu: &Wgpu) -> Result<Self> {
        let buffer = || wgpu.device().buffer(4, Device::USAGES);
        let [a, b, c, d, e] = [buffer()?, buffer()?, buffer()?, buffer()?, buffer()?];
        let [f, g, h, i, j] = [buffer()?, buffer()?, buffer()?, buffer()?, buffer()?];
        let [k, l, m] = [buffer()?, buffer()?, buffer()?];
        Ok(Self { stream: wgpu.stream()?, buffers: [a, b, c, d, e, f, g, h, i, j, k, l, m] })
    }
}

#[cfg(test)]
impl Idle {
    /// Whether a rehearsal made one of the stream's own.
    pub(crate) fn has_scratch(&self) -> bool {
        self.stream.has_scratch()
    }
}

/// Calls that stand for all there can be.
#[derive(Clone, Copy)]
enum Rehearsed {
    Router,
    /// With the state of the block before, which is handed on.
    RouterState,
    PlainLogits,
    /// With a norm, which one token's launch of down and combine cannot have.
    NormedLogits,
    /// With a norm, counts and sequences.
    Logits,
    /// Which are written out.
    Routes,
}

impl WgpuLayer {
    /// The launches of a call, a line each.
    pub(crate) fn explanation(&self, tokens: usize) -> Result<String> {
        let (wgpu, recorder) = self.wgpu.recording();
        let source = if self.router.is_some() { Rehearsed::Router } else { Rehearsed::PlainLogits };
        let at_once = self.tokens_at_once();
        self.undivided(tokens, at_once)?;
        self.rehearse(&wgpu, tokens.min(at_once), source)?;
        let pieces = if tokens > at_once {
            format!(", in pieces of {at_once} since a binding or a buffer has no room for more")
        } else {
            String::new()
        };
        Ok(format!("{tokens} tokens on {}{pieces}:{}", self.wgpu.numbers().name, recorder.lines()))
    }

    /// Finds, compiles and loads what calls with up to so many tokens need.
    pub(crate) fn compile(&self, max_tokens: usize) -> Result<()> {
        let (wgpu, recorder) = self.wgpu.recording();
        let (mut tokens, max_tokens) = (1, max_tokens.min(self.tokens_at_once()));
        while tokens <= max_tokens {
            use Rehearsed::{Logits, NormedLogits, PlainLogits, Router, RouterState, Routes};
            for source in [Router, RouterState, PlainLogits, NormedLogits, Logits, Routes] {
                let there = match source {
                    Router => self.router.is_some(),
                    RouterState => self.router.is_some() && self.problem.config.router_mlp.is_some(),
                    _ => true,
                };
                if there {
                    self.rehearse(&wgpu, tokens, source)?;
                }
            }
            tokens += (tokens / 32).max(1);
        }
        let pipelines = self.wgpu.pipelines();
        recorder.variants().iter().try_for_each(|variant| pipelines.get(self.wgpu.device(), variant).map(|_| ()))
    }

    /// A call on memory that is not there, which `wgpu` records.
    fn rehearse(&self, wgpu: &Wgpu, tokens: usize, source: Rehearsed) -> Result<()> {
        let config = &self.problem.config;
        let LayerConfig { hidden, experts, top_k, .. } = *config;
        let [x, logits, ids, mut y, mut norm, mut counts, rest @ ..] =
            self.idle.buffers.each_ref().map(|buffer| Memory::placeholder(buffer, usize::MAX >> 1));
        let [mut experts_out, mut weights_out, sequences, previous, mut next, scratch, arguments] = rest;
        let dtype = self.problem.gate_up;
        let slots = [tokens, top_k];
        let mut call = Forward::new(
            View::new(x.read(), dtype, 0, [tokens, hidden])?,
            View::new(y.write(), dtype, 0, [tokens, hidden])?,
        );
        let by_id = config.routing.selection == Selection::Table;
        if by_id && !matches!(source, Rehearsed::Routes) {
            call.token_ids = Some(View::new(ids.read(), U32, 0, [tokens])?);
        }
        match source {
            Rehearsed::Router => {}
            Rehearsed::RouterState => {
                let shape = [tokens, config.router_width()];
                call.router_state.previous = Some(View::new(previous.read(), F32, 0, shape)?);
                call.router_state.next = Some(View::new(next.write(), F32, 0, shape)?);
            }
            Rehearsed::PlainLogits => {
                call.source = Source::Logits(View::new(logits.read(), F32, 0, [tokens, config.choices()])?);
            }
            Rehearsed::NormedLogits | Rehearsed::Logits => {
                call.source = Source::Logits(View::new(logits.read(), F32, 0, [tokens, config.choices()])?);
                if matches!(source, Rehearsed::Logits) {
                    call.counts = Some(View::new(counts.write(), U32, 0, [experts])?);
                }
                let out = View::new(norm.write(), dtype, 0, [tokens, hidden])?;
                call.norm = Some(NextNorm { weight: None, eps: 0.0, out });
                if config.capacity.is_some() {
                    call.sequences = Some(View::new(sequences.read(), U32, 0, [2])?);
                }
            }
            Rehearsed::Routes => {
                let ids = View::new(ids.read(), U32, 0, slots)?;
                call.source =
                    Source::Routes(Routing { experts: ids, weights: View::new(logits.read(), F32, 0, slots)? });
                call.routes = Some(RoutesOut {
                    experts: View::new(experts_out.write(), U32, 0, slots)?,
                    weights: View::new(weights_out.write(), F32, 0, slots)?,
                });
            }
        }
        self.run_on(wgpu, &self.idle.stream, call, &mut Workspace::of(scratch, arguments))
    }
}
