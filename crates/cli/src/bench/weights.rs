//! Random weights and tokens. The experts are overlapping windows of one pool on the host: preparing a layer copies each
//! into memory of its own, so the host needs no second copy of a model that barely fits.

use crate::args::Spread;
use anyhow::Result;
use fused_moe::config::LayerConfig;
use fused_moe::weights::{ExpertMatrices, ExpertWeights, LayerWeights, Matrix, Orientation};
use fused_moe::{DType, Float, HostView};
use half::{bf16, f16};
use rayon::prelude::*;

/// Random numbers of one format, uniform in `+-scale`, none of them zero.
#[derive(Debug)]
pub(crate) struct Numbers {
    dtype: DType,
    words: Vec<u32>,
}

impl Numbers {
    /// So many numbers; the same seed gives the same, for any number of threads.
    pub(crate) fn new(dtype: DType, count: usize, scale: f32, seed: u64) -> Self {
        const CHUNK: usize = 1 << 16;
        let mut words = vec![0u32; (count * dtype.size()).div_ceil(4)];
        words.par_chunks_mut(CHUNK).enumerate().for_each(|(index, words)| {
            let mut random = Random::new(seed.wrapping_add((index as u64).wrapping_mul(0x9e37_79b9)));
            match dtype {
                DType::F16 => fill::<f16>(bytemuck::cast_slice_mut(words), scale, &mut random),
                DType::BF16 => fill::<bf16>(bytemuck::cast_slice_mut(words), scale, &mut random),
                _ => fill::<f32>(bytemuck::cast_slice_mut(words), scale, &mut random),
            }
        });
        Self { dtype, words }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.words)
    }

    pub(crate) fn into_words(self) -> Vec<u32> {
        self.words
    }

    /// `[rows, cols]` from the element `first` on.
    pub(crate) fn view(&self, first: usize, shape: [usize; 2]) -> Result<HostView<'_>> {
        Ok(HostView::new(self.bytes(), self.dtype, first * self.dtype.size(), shape)?)
    }
}

fn fill<T: Float>(out: &mut [T], scale: f32, random: &mut Random) {
    for chunk in out.chunks_mut(4) {
        let bits = random.next();
        for (i, x) in chunk.iter_mut().enumerate() {
            let signed = (bits >> (16 * i)) as u16 as i16;
            *x = T::from_f32((f32::from(signed) + 0.5) * (scale / 32768.0));
        }
    }
}

/// SplitMix64 (Steele, Lea, Flood, 2014).
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x2545_f491_4f6c_dd1d))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// The weights of any number of layers of one shape.
#[derive(Debug)]
pub(crate) struct Source {
    pool: Numbers,
    router: Numbers,
    bias: Option<Vec<f32>>,
    config: LayerConfig,
}

/// What is added to logits of variance 1 so that tokens spread as asked, `[E]`.
pub(crate) fn bias(spread: Spread, config: &LayerConfig) -> Option<Vec<f32>> {
    let experts = 0..config.experts;
    match spread {
        Spread::Uniform => None,
        Spread::Zipf => Some(experts.map(|e| -((e + 1) as f32).ln()).collect()),
        // more than the logits of a token differ, and not so much that the others' weights vanish
        Spread::Half => Some(experts.map(|e| if e == 0 { 7.0 } else { 0.0 }).collect()),
        Spread::One => Some(experts.map(|e| if e < config.top_k { 1000.0 } else { 0.0 }).collect()),
    }
}

/// How far the windows of two experts lie apart, in elements.
const STEP: usize = 4099 * 16;
const WINDOWS: usize = 61;

impl Source {
    /// Weights such that tokens of variance 1/3 keep about their size.
    pub(crate) fn new(config: &LayerConfig, dtype: DType, spread: Spread, seed: u64) -> Self {
        let LayerConfig { hidden, intermediate, experts, .. } = *config;
        let matrix = hidden * intermediate;
        let scale = 3.0 / (hidden as f32).sqrt();
        Self {
            pool: Numbers::new(dtype, 3 * matrix + STEP * WINDOWS, scale, seed),
            router: Numbers::new(dtype, experts * hidden, scale, seed.wrapping_add(1)),
            bias: bias(spread, config),
            config: config.clone(),
        }
    }

    /// `[E, H]`, the same for every layer.
    pub(crate) fn router(&self) -> &[u8] {
        self.router.bytes()
    }

    /// `[E]`, what the router adds to its logits.
    pub(crate) fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    /// Bytes that it takes.
    pub(crate) fn size(config: &LayerConfig, dtype: DType) -> usize {
        let matrix = config.hidden.saturating_mul(config.intermediate);
        let router = config.experts.saturating_mul(config.hidden);
        matrix.saturating_mul(3).saturating_add(router).saturating_add(STEP * WINDOWS).saturating_mul(dtype.size())
    }

    /// The weights of layer number `index`.
    pub(crate) fn layer(&self, index: usize) -> Result<LayerWeights<'_>> {
        let LayerConfig { hidden, experts, .. } = self.config;
        let matrices = (0..experts).map(|e| self.expert(index, e)).collect::<Result<_>>()?;
        let mut weights =
            LayerWeights::new(self.router.view(0, [experts, hidden])?, ExpertWeights::per_expert(matrices));
        weights.router_bias = self.bias.as_deref().map(|bias| HostView::of(bias, [experts])).transpose()?;
        Ok(weights)
    }

    /// The matrices of one expert of layer number `index`.
    fn expert(&self, index: usize, expert: usize) -> Result<ExpertMatrices<'_>> {
        let LayerConfig { hidden, intermediate, activation, .. } = self.config;
        let (first, matrix) = ((index * 7 + expert) % WINDOWS * STEP, hidden * intermediate);
        let part = |n: usize, shape| -> Result<_> {
            Ok(Matrix::new(self.pool.view(first + n * matrix, shape)?, Orientation::OutIn)?)
        };
        let gate = activation.is_gated().then(|| part(0, [intermediate, hidden])).transpose()?;
        Ok(ExpertMatrices::new(gate, part(1, [intermediate, hidden])?, part(2, [hidden, intermediate])?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_random_and_never_zero() {
        let numbers = Numbers::new(DType::F32, 300_001, 2.0, 7);
        let x: &[f32] = bytemuck::cast_slice(numbers.bytes());
        let mean = x.iter().sum::<f32>() / x.len() as f32;
        assert!(mean.abs() < 0.02 && x.iter().all(|&x| x != 0.0 && x.abs() <= 2.0));
        assert_ne!(Numbers::new(DType::F32, 10, 2.0, 8).bytes(), &numbers.bytes()[..40]);
    }
}
