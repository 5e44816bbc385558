//! What the passes of a training step left, held against f64.

use super::batch::Batch;
use super::measure::{Verified, any_nan};
use super::training::{Kept, MatrixMemory, Sizes};
use super::weights::Source;
use anyhow::{Result, ensure};
use fused_moe::config::LayerConfig;
use fused_moe::{BackendBackward, DType, HostView};
use fused_moe_conformance::Comparison;
use fused_moe_conformance::rows::{self, BackwardCall, Call, Sample};

/// Tokens whose rows are worked out again.
const ROWS: usize = 3;

/// What the passes left.
pub(super) struct Left<'a, B: BackendBackward> {
    pub(super) sizes: &'a Sizes<'a>,
    pub(super) source: &'a Source,
    pub(super) backend: &'a B,
    pub(super) stream: &'a B::Stream,
}

impl<B: BackendBackward> Left<'_, B> {
    /// The outputs and the gradients of a batch, and those of the matrices where the batch was the last.
    pub(super) fn verify(
        &self,
        (batch, kept): (&Batch<B>, &Kept<B>),
        matrices: Option<&MatrixMemory<B>>,
        verified: &mut Verified,
    ) -> Result<()> {
        let &Sizes { config, dtype, tokens, from_router } = self.sizes;
        let LayerConfig { hidden, intermediate, experts, top_k, .. } = *config;
        let (rows, slots) = ([tokens, hidden], tokens * top_k);
        let weights = self.source.layer(0)?;
        let sample = rows::sample(tokens, ROWS);
        let logits = batch.logits.as_deref().map(|logits| HostView::of(logits, [tokens, experts])).transpose()?;
        let ids = self.download("the experts", &kept.experts, (slots, DType::U32))?;
        let factors = self.download("the weights", &kept.weights, (slots, DType::F32))?;
        let routes: (&[u32], &[f32]) = (&ids, bytemuck::cast_slice(&factors));

        let mut verdict = Comparison::default();
        let taken = (batch.experts.as_slice(), batch.weights.as_slice());
        for (memory, (experts, weights_of_slots)) in [(&batch.y, taken), (&kept.y, routes)] {
            let y = self.download("y", memory, (tokens * hidden, dtype))?;
            let x = batch.x.view(0, rows)?;
            let call = Call { x, experts, weights: weights_of_slots, logits, y: view(&y, dtype, rows)? };
            verdict = verdict.worse(rows::check_routes(config, &weights, &call, &sample));
            verdict = verdict.worse(rows::check(config, &weights, &call, &sample));
        }

        let gate_up = [experts * config.gate_up_rows(), hidden];
        let down = [experts * hidden, intermediate];
        let matrix = |name, memory: Option<&B::Memory>, [rows, cols]: [usize; 2]| {
            memory.map(|memory| self.download(name, memory, (rows * cols, dtype))).transpose()
        };
        let d_router = matrix("d_router", matrices.filter(|_| from_router).map(|m| &m.router), [experts, hidden])?;
        let d_gate_up = matrix("d_gate_up", matrices.map(|m| &m.gate_up), gate_up)?;
        let d_down = matrix("d_down", matrices.map(|m| &m.down), down)?;
        let d_x = self.download("d_x", &kept.d_x, (tokens * hidden, dtype))?;
        let d_logits = self.download("d_logits", &kept.d_logits, (tokens * experts, DType::F32))?;
        let call = BackwardCall {
            x: batch.x.view(0, rows)?,
            experts: routes.0,
            weights: routes.1,
            logits,
            d_y: kept.d_y.view(0, rows)?,
            d_x: view(&d_x, dtype, rows)?,
            d_logits: view(&d_logits, DType::F32, [tokens, experts])?,
            d_router: some(&d_router, dtype, [experts, hidden])?,
            d_gate_up: some(&d_gate_up, dtype, gate_up)?,
            d_down: some(&d_down, dtype, down)?,
        };
        let places = if matrices.is_some() { places(routes.0, [experts, intermediate]) } else { Vec::new() };
        let sample = Sample { tokens: &sample, matrices: &places };
        verdict = verdict.worse(rows::check_backward(config, &weights, &call, &sample));
        if let Some(failure) = verdict.failure {
            anyhow::bail!("{failure}");
        }
        verified.rows += 4 * sample.tokens.len() + 3 * places.len();
        if verdict.error >= verified.error {
            (verified.error, verified.tolerance) = (verdict.error, verdict.tolerance);
        }
        Ok(())
    }

    /// So many elements of a format; an error where there is a NaN among floats.
    fn download(&self, name: &str, memory: &B::Memory, (elements, dtype): (usize, DType)) -> Result<Vec<u32>> {
        let bytes = elements * dtype.size();
        let mut words = vec![0u32; bytes.div_ceil(4)];
        let to = &mut bytemuck::cast_slice_mut(&mut words)[..bytes];
        self.backend.download(self.stream, memory, to)?;
        ensure!(dtype == DType::U32 || !any_nan(dtype, to), "NaN was left in {name}");
        Ok(words)
    }
}

fn view(words: &[u32], dtype: DType, shape: [usize; 2]) -> Result<HostView<'_>> {
    Ok(HostView::new(bytemuck::cast_slice(words), dtype, 0, shape)?)
}

fn some(words: &Option<Vec<u32>>, dtype: DType, shape: [usize; 2]) -> Result<Option<HostView<'_>>> {
    words.as_deref().map(|words| view(words, dtype, shape)).transpose()
}

/// Experts and numbers below I: the first, the middle and the last of the experts with the most, the median and the least
/// slots.
fn places(ids: &[u32], [experts, intermediate]: [usize; 2]) -> Vec<[usize; 2]> {
    let mut counts = vec![0usize; experts];
    ids.iter().filter_map(|&id| usize::try_from(id).ok()).filter(|&id| id < experts).for_each(|id| counts[id] += 1);
    let mut order: Vec<usize> = (0..experts).collect();
    order.sort_by_key(|&e| counts[e]);
    let last = intermediate.saturating_sub(1);
    let places = [(experts.saturating_sub(1), 0), (experts / 2, last / 2), (0, last)];
    places.into_iter().filter_map(|(rank, i)| Some([*order.get(rank)?, i])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_and_idle_experts_are_looked_at() {
        assert_eq!(places(&[2, 2, 2, 1, 3, 3, u32::MAX], [4, 9]), [[2, 0], [3, 4], [0, 8]]);
        assert_eq!(places(&[0], [1, 1]), [[0, 0]; 3]);
    }
}
