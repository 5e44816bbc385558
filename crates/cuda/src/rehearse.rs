//! Calls of a layer that are gone through and not run: what they need is compiled before it is needed, and how they would
//! be carried out is told, by the code that carries them out.

use crate::Cuda;
use crate::error::Result;
use crate::layer::CudaLayer;
use crate::memory::Memory;
use crate::workspace::Workspace;
use fused_moe_core::DType::{F32, U32};
use fused_moe_core::config::{LayerConfig, Selection};
use fused_moe_core::operation::{Forward, NextNorm, RoutesOut, Source};
use fused_moe_core::{Layer, Routing, View};

/// Calls that stand for all there can be.
#[derive(Clone, Copy)]
enum Rehearsed {
    /// With the state of the router before, where it has one.
    Router,
    /// The same, with counts.
    RouterCounts,
    PlainLogits,
    /// With a norm.
    Norm,
    /// With a norm and counts.
    Counts,
    /// Which are written out.
    Routes,
}

impl CudaLayer {
    /// The launches of a call, a line each.
    pub(crate) fn explanation(&self, tokens: usize) -> Result<String> {
        let (cuda, recorder) = self.cuda.recording();
        let source = if self.router.is_some() { Rehearsed::Router } else { Rehearsed::PlainLogits };
        self.rehearse(&cuda, tokens, source)?;
        Ok(format!("{tokens} tokens on {}:{}", self.cuda.numbers().name, recorder.lines()))
    }

    /// Finds, compiles and loads what calls with up to so many tokens need.
    pub(crate) fn compile(&self, max_tokens: usize) -> Result<()> {
        let (cuda, recorder) = self.cuda.recording();
        for tokens in rehearsed_tokens(max_tokens) {
            let sources = [
                Rehearsed::Router,
                Rehearsed::RouterCounts,
                Rehearsed::PlainLogits,
                Rehearsed::Norm,
                Rehearsed::Counts,
                Rehearsed::Routes,
            ];
            for source in sources {
                if self.router.is_some() || !matches!(source, Rehearsed::Router | Rehearsed::RouterCounts) {
                    self.rehearse(&cuda, tokens, source)?;
                }
            }
        }
        self.cuda.kernels().prepare(&recorder.kernels())
    }

    /// A call on memory that is not there, which `cuda` records.
    fn rehearse(&self, cuda: &Cuda, tokens: usize, source: Rehearsed) -> Result<()> {
        let LayerConfig { hidden, experts, top_k, router_mlp, .. } = self.problem.config;
        let choices = self.problem.config.choices();
        let all = || Memory::placeholder(usize::MAX >> 1);
        let (x, logits, ids) = (all(), all(), all());
        let (mut y, mut norm, mut counts, mut out) = (all(), all(), all(), [all(), all()]);
        let dtype = self.problem.gate_up;
        let slots = [tokens, top_k];
        let mut call = Forward::new(
            View::new(x.read(), dtype, 0, [tokens, hidden])?,
            View::new(y.write(), dtype, 0, [tokens, hidden])?,
        );
        let by_id = self.problem.config.routing.selection == Selection::Table;
        if by_id && !matches!(source, Rehearsed::Routes) {
            call.token_ids = Some(View::new(ids.read(), U32, 0, [tokens])?);
        }
        match source {
            Rehearsed::Router | Rehearsed::RouterCounts => {
                if matches!(source, Rehearsed::RouterCounts) {
                    call.counts = Some(View::new(counts.write(), U32, 0, [experts])?);
                }
                let previous = router_mlp.map(|mlp| View::new(logits.read(), F32, 0, [tokens, mlp.width]));
                call.router_state.previous = previous.transpose()?;
            }
            Rehearsed::PlainLogits => {
                call.source = Source::Logits(View::new(logits.read(), F32, 0, [tokens, choices])?);
            }
            Rehearsed::Norm | Rehearsed::Counts => {
                call.source = Source::Logits(View::new(logits.read(), F32, 0, [tokens, choices])?);
                if matches!(source, Rehearsed::Counts) {
                    call.counts = Some(View::new(counts.write(), U32, 0, [experts])?);
                }
                let out = View::new(norm.write(), dtype, 0, [tokens, hidden])?;
                call.norm = Some(NextNorm { weight: None, eps: 0.0, out });
            }
            Rehearsed::Routes => {
                let ids = View::new(ids.read(), U32, 0, slots)?;
                call.source =
                    Source::Routes(Routing { experts: ids, weights: View::new(logits.read(), F32, 0, slots)? });
                let [experts, weights] = &mut out;
                call.routes = Some(RoutesOut {
                    experts: View::new(experts.write(), U32, 0, slots)?,
                    weights: View::new(weights.write(), F32, 0, slots)?,
                });
            }
        }
        let memory = Memory::placeholder(self.workspace_bytes(tokens)?);
        self.run_on(cuda, &self.idle, call, &mut Workspace::new(memory, &self.problem, tokens)?)
    }
}

/// Batch sizes by steps of a thirty-second, the largest among them: where a plan changes, it does so between two of these
/// and keeps to it for longer than one.
fn rehearsed_tokens(max_tokens: usize) -> impl Iterator<Item = usize> {
    let next = move |&tokens: &usize| {
        (tokens < max_tokens).then(|| max_tokens.min(tokens.saturating_add((tokens / 32).max(1))))
    };
    std::iter::successors((max_tokens > 0).then_some(1), next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_batch_is_rehearsed() {
        for max in [1, 2, 33, 512, 2047, 2048, 4096, 1 << 20] {
            let tokens: Vec<usize> = rehearsed_tokens(max).collect();
            assert_eq!((tokens[0], tokens[tokens.len() - 1]), (1, max));
            assert!(tokens.windows(2).all(|pair| pair[0] < pair[1] && pair[1] - pair[0] <= (pair[0] / 32).max(1)));
        }
        assert_eq!(rehearsed_tokens(0).count(), 0);
    }
}
