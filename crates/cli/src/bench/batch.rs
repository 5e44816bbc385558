//! Tokens of one call: what goes in, where they are routed, where the result goes.

use super::weights::{Numbers, Random, Source, bias};
use crate::args::{Origin, Spread};
use anyhow::{Result, ensure};
use fused_moe::backend::{In, shorten, shorten_mut};
use fused_moe::config::LayerConfig;
use fused_moe::operation::{self, Choice, Forward, Gate, GateRoute, Route};
use fused_moe::{Backend, DType, Stream, View};
use fused_moe_conformance::shapes::Cost;
use rayon::prelude::*;

/// Tokens of one call.
pub(crate) struct Batch<B: Backend> {
    pub(crate) x: Numbers,
    /// `[T, E]`, where the call is given them.
    pub(crate) logits: Option<Vec<f32>>,
    x_memory: B::Memory,
    logits_memory: Option<B::Memory>,
    pub(crate) y: B::Memory,
    /// The routes that are taken, `[T, K]`.
    pub(crate) experts: Vec<u32>,
    pub(crate) weights: Vec<f32>,
}

/// Makes batches of one size.
pub(crate) struct Batches<'a, B: Backend> {
    pub(crate) backend: &'a B,
    pub(crate) stream: &'a B::Stream,
    pub(crate) config: &'a LayerConfig,
    pub(crate) dtype: DType,
    pub(crate) source: &'a Source,
    pub(crate) origin: Origin,
    pub(crate) routing: Spread,
    pub(crate) tokens: usize,
    pub(crate) seed: u64,
}

impl<B: Backend> Batches<'_, B> {
    /// So many, whose calls go to `layers` layers in turn.
    pub(crate) fn make(&self, count: usize, layers: usize) -> Result<Vec<Batch<B>>> {
        let mut logits = match self.origin {
            Origin::X => vec![None; count],
            Origin::Logits => {
                let some =
                    |i: usize| logits(self.config, self.tokens, self.routing, self.seed.wrapping_add(5000 + i as u64));
                (0..count).map(|i| Some(some(i))).collect()
            }
        };
        if self.tokens == 1 && !matches!(self.routing, Spread::Half | Spread::One) {
            let mut given: Vec<&mut Vec<f32>> = logits.iter_mut().flatten().collect();
            disjoint(&mut given, layers, self.config.top_k);
        }
        logits.into_iter().enumerate().map(|(i, logits)| self.batch(i, logits)).collect()
    }

    fn batch(&self, index: usize, logits: Option<Vec<f32>>) -> Result<Batch<B>> {
        let (backend, elements) = (self.backend, self.tokens * self.config.hidden);
        let x = Numbers::new(self.dtype, elements, 1.0, self.seed.wrapping_add(1000 + index as u64));
        let x_memory = uploaded(backend, x.bytes())?;
        let logits_memory =
            logits.as_deref().map(|logits| uploaded(backend, bytemuck::cast_slice(logits))).transpose()?;
        let y = poisoned(backend, elements, self.dtype)?;
        let mut batch = Batch { x, logits, x_memory, logits_memory, y, experts: Vec::new(), weights: Vec::new() };
        (batch.experts, batch.weights) = self.routes(&batch)?;
        Ok(batch)
    }

    /// The routes that the backend's own operations take, as a layer's call does.
    fn routes(&self, batch: &Batch<B>) -> Result<(Vec<u32>, Vec<f32>)> {
        let LayerConfig { hidden, experts, top_k, routing, gate, .. } = *self.config;
        let (backend, stream, tokens) = (self.backend, self.stream, self.tokens);
        let slots = tokens * top_k;
        let mut ids = backend.allocate(4 * slots)?;
        let mut weights = backend.allocate(4 * slots)?;
        let (router, bias, mut logits);
        let choice = Choice::new(
            routing,
            shorten_mut::<B>(View::new(B::write(&mut ids), DType::U32, 0, [tokens, top_k])?),
            shorten_mut::<B>(View::new(B::write(&mut weights), DType::F32, 0, [tokens, top_k])?),
        );
        match &batch.logits_memory {
            Some(memory) => {
                let logits = shorten::<B>(View::new(B::read(memory), DType::F32, 0, [tokens, experts])?);
                backend.route(stream, Route { logits, choice })?;
            }
            None => {
                router = uploaded(backend, self.source.router())?;
                bias = self.source.bias().map(|bias| uploaded(backend, bytemuck::cast_slice(bias))).transpose()?;
                logits = backend.allocate(4 * tokens * experts)?;
                let bias = bias.as_ref().map(|bias| View::new(B::read(bias), DType::F32, 0, [experts])).transpose()?;
                let gate = Gate {
                    bias: bias.map(shorten::<B>),
                    config: gate,
                    ..Gate::new(
                        shorten::<B>(View::new(B::read(&batch.x_memory), self.dtype, 0, [tokens, hidden])?),
                        shorten::<B>(View::new(B::read(&router), self.dtype, 0, [experts, hidden])?),
                        shorten_mut::<B>(View::new(B::write(&mut logits), DType::F32, 0, [tokens, experts])?),
                    )
                };
                backend.gate_route(stream, GateRoute { gate, choice })?;
            }
        }
        let status = stream.status()?;
        ensure!(status.is_ok(), "status of the router: {status}");
        let (mut host_ids, mut host_weights) = (vec![0u32; slots], vec![0f32; slots]);
        backend.download(stream, &ids, bytemuck::cast_slice_mut(&mut host_ids))?;
        backend.download(stream, &weights, bytemuck::cast_slice_mut(&mut host_weights))?;
        Ok((host_ids, host_weights))
    }
}

impl<B: Backend> Batch<B> {
    /// The call of a layer.
    pub(crate) fn call(
        &mut self,
        dtype: DType,
        tokens: usize,
        config: &LayerConfig,
    ) -> fused_moe::Result<Forward<'_, B>> {
        let shape = [tokens, config.hidden];
        let x = shorten::<B>(View::new(B::read(&self.x_memory), dtype, 0, shape)?);
        let y = shorten_mut::<B>(View::new(B::write(&mut self.y), dtype, 0, shape)?);
        let mut call = Forward::<B>::new(x, y);
        if let Some(logits) = &self.logits_memory {
            let logits = View::new(B::read(logits), DType::F32, 0, [tokens, config.experts])?;
            call.source = operation::Source::Logits(shorten::<B>(logits));
        }
        Ok(call)
    }

    /// Makes what a call writes NaN again.
    pub(crate) fn poison(&mut self, backend: &B) -> Result<()> {
        poison(backend, &mut self.y, self.x.bytes().len())
    }

    /// x, `[T, H]`.
    pub(crate) fn x_view(&self, dtype: DType, shape: [usize; 2]) -> fused_moe::Result<In<'_, B>> {
        Ok(shorten::<B>(View::new(B::read(&self.x_memory), dtype, 0, shape)?))
    }

    /// The logits that it is given, f32 `[T, E]`.
    pub(crate) fn logits_view(&self, tokens: usize, config: &LayerConfig) -> fused_moe::Result<Option<In<'_, B>>> {
        let Some(memory) = &self.logits_memory else { return Ok(None) };
        Ok(Some(shorten::<B>(View::new(B::read(memory), DType::F32, 0, [tokens, config.experts])?)))
    }

    /// Slots of each expert.
    pub(crate) fn counts(&self, config: &LayerConfig) -> Vec<u32> {
        let mut counts = vec![0u32; config.experts];
        for &expert in &self.experts {
            if let Some(count) = counts.get_mut(expert as usize) {
                *count += 1;
            }
        }
        counts
    }

    /// What a call costs at the least, and how many experts it touches.
    pub(crate) fn cost(&self, dtype: DType, tokens: usize, config: &LayerConfig) -> (Cost, usize) {
        let counts = self.counts(config);
        let cost = Cost::of(config, tokens, &counts, [dtype; 2]);
        let cost = if self.logits.is_some() { cost.from_logits(config, tokens, dtype) } else { cost };
        (cost, counts.iter().filter(|&&count| count > 0).count())
    }
}

pub(super) fn uploaded<B: Backend>(backend: &B, bytes: &[u8]) -> Result<B::Memory> {
    let mut memory = backend.allocate(bytes.len())?;
    backend.upload(bytes, &mut memory)?;
    Ok(memory)
}

/// All bits set, NaN in every format of floats: what a call leaves out shows.
pub(super) fn poisoned<B: Backend>(backend: &B, elements: usize, dtype: DType) -> Result<B::Memory> {
    uploaded(backend, &vec![0xff; elements * dtype.size()])
}

pub(super) fn poison<B: Backend>(backend: &B, memory: &mut B::Memory, bytes: usize) -> Result<()> {
    Ok(backend.upload(&vec![0xff; bytes], memory)?)
}

/// About normal, of variance 1, plus the bias of the routing: f32 `[T, E]`.
fn logits(config: &LayerConfig, tokens: usize, routing: Spread, seed: u64) -> Vec<f32> {
    let bias = bias(routing, config);
    let mut logits = vec![0f32; tokens * config.experts];
    logits.par_chunks_mut(config.experts).enumerate().for_each(|(token, logits)| {
        let mut random = Random::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(token as u64));
        for (e, logit) in logits.iter_mut().enumerate() {
            let bits = random.next();
            let sum: f32 = (0..4).map(|i| f32::from((bits >> (16 * i)) as u16) / 65536.0 - 0.5).sum();
            *logit = sum * 3f32.sqrt() + bias.as_ref().map_or(0.0, |bias| bias[e]);
        }
    });
    logits
}

/// Far below any logit, and a number still.
const NOT_CHOSEN: f32 = -100.0;

/// Makes one-token calls that go to the same layer choose different experts, as far as there are enough: call i goes to
/// layer `i % layers`. Else a call would find in the cache what the one before it read.
fn disjoint(logits: &mut [&mut Vec<f32>], layers: usize, top_k: usize) {
    for layer in 0..layers.max(1) {
        let mut taken: Vec<usize> = Vec::new();
        for logits in logits.iter_mut().skip(layer).step_by(layers.max(1)) {
            if taken.len() + top_k > logits.len() {
                taken.clear();
            }
            for &expert in &taken {
                logits[expert] = NOT_CHOSEN;
            }
            taken.extend(chosen(logits, top_k));
        }
    }
}

/// The experts with the largest logits.
fn chosen(logits: &[f32], top_k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    order.truncate(top_k);
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use fused_moe_conformance::shapes::SHAPES;

    fn calls_of(config: &LayerConfig, count: usize, layers: usize, routing: Spread) -> Vec<Vec<usize>> {
        let mut all: Vec<_> = (0..count as u64).map(|seed| logits(config, 1, routing, seed)).collect();
        disjoint(&mut all.iter_mut().collect::<Vec<_>>(), layers, config.top_k);
        all.iter().map(|logits| chosen(logits, config.top_k)).collect()
    }

    #[test]
    fn single_tokens_on_the_same_layer_share_no_expert() {
        for shape in SHAPES {
            let config = shape.config();
            for (layers, routing) in [(2, Spread::Uniform), (2, Spread::Zipf), (3, Spread::Uniform), (8, Spread::Zipf)]
            {
                let calls = calls_of(&config, 8, layers, routing);
                for layer in 0..layers {
                    let mut of_layer: Vec<_> = calls.iter().skip(layer).step_by(layers).flatten().collect();
                    let all = of_layer.len();
                    of_layer.sort_unstable();
                    of_layer.dedup();
                    assert_eq!(of_layer.len(), all, "{}, {layers} layers", shape.name);
                }
            }
        }
    }

    #[test]
    fn too_few_experts_are_used_again_only_when_all_were() {
        let config = LayerConfig::new(8, 8, 4, 2);
        let calls = calls_of(&config, 4, 1, Spread::Uniform);
        let together = |a: usize, b: usize| {
            let mut both = [calls[a].clone(), calls[b].clone()].concat();
            both.sort_unstable();
            both
        };
        assert_eq!((together(0, 1), together(2, 3)), (vec![0, 1, 2, 3], vec![0, 1, 2, 3]));
    }

    #[test]
    fn logits_follow_the_routing() {
        let config = LayerConfig::new(8, 8, 16, 2);
        let uniform = logits(&config, 4000, Spread::Uniform, 3);
        let (count, sum) = (uniform.len() as f32, uniform.iter().sum::<f32>());
        let variance = uniform.iter().map(|x| x * x).sum::<f32>() / count;
        assert!((sum / count).abs() < 0.02 && (variance - 1.0).abs() < 0.05, "{variance}");
        let config = LayerConfig::new(8, 8, 8, 2);
        let mut slots = [0usize; 8];
        for token in logits(&config, 1400, Spread::Half, 3).chunks(8) {
            chosen(token, 2).into_iter().for_each(|expert| slots[expert] += 1);
        }
        assert_eq!(slots[0], 1400);
        assert!(slots[1..].iter().all(|slots| (150..250).contains(slots)), "{slots:?}");
        let config = LayerConfig::new(8, 8, 16, 2);
        for token in logits(&config, 50, Spread::One, 4).chunks(16) {
            let mut experts = chosen(token, 2);
            experts.sort_unstable();
            assert_eq!(experts, [0, 1]);
        }
    }
}
