//! The shapes that are measured, and what a call of them costs at the least.

use fused_moe_core::DType;
use fused_moe_core::config::{Activation, Function, LayerConfig, Normalize, WeightRule};

/// The sizes of a published model's layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NamedShape {
    /// As on a command line.
    pub name: &'static str,
    /// H.
    pub hidden: usize,
    /// I.
    pub intermediate: usize,
    /// E.
    pub experts: usize,
    /// K.
    pub top_k: usize,
    /// The activation.
    pub activation: Activation,
}

const SILU: Activation = Activation::Gated(Function::Silu);

/// All of them.
pub const SHAPES: [NamedShape; 6] = [
    shape("qwen3-30b-a3b", [2048, 768, 128, 8], SILU),
    shape("mixtral-8x7b", [4096, 14336, 8, 2], SILU),
    shape("gemma4-26b-a4b", [2816, 704, 128, 8], Activation::Gated(Function::GeluTanh)),
    shape("deepseek-v3", [7168, 2048, 256, 8], SILU),
    shape("gpt-oss-20b", [2880, 2880, 32, 4], Activation::ClampedSwish { alpha: 1.702, limit: 7.0 }),
    shape("olmoe", [2048, 1024, 64, 8], SILU),
];

const fn shape(name: &'static str, sizes: [usize; 4], activation: Activation) -> NamedShape {
    let [hidden, intermediate, experts, top_k] = sizes;
    NamedShape { name, hidden, intermediate, experts, top_k, activation }
}

/// The shape of this name.
pub fn find(name: &str) -> Option<NamedShape> {
    SHAPES.into_iter().find(|shape| shape.name == name)
}

impl NamedShape {
    /// A layer of this shape: softmax over all experts, top K renormalised.
    pub fn config(&self) -> LayerConfig {
        let mut config = LayerConfig::new(self.hidden, self.intermediate, self.experts, self.top_k);
        config.activation = self.activation;
        config.routing.weights = WeightRule { normalize: Normalize::Sum { eps: 0.0 }, ..WeightRule::default() };
        config
    }
}

/// What a call has to move and to compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Bytes of the touched experts' matrices, of the router, of x and y: each once.
    pub bytes: u64,
    /// Multiplications and additions of the matrix products.
    pub flops: u64,
}

impl Cost {
    /// Of a call with `tokens` tokens whose slots spread over the experts as `counts` says, `[E]`.
    pub fn of(config: &LayerConfig, tokens: usize, counts: &[u32], [weights, activations]: [DType; 2]) -> Self {
        let n = |x: usize| x as u64;
        let shared = config
            .shared
            .map_or(0, |shared| n(shared.intermediate) + n(shared.activation.gate_up_rows(shared.intermediate)));
        let expert = (n(config.gate_up_rows()) + n(config.intermediate)) * n(config.hidden);
        let router = n(config.experts) * n(config.hidden);
        let touched = n(counts.iter().filter(|&&count| count > 0).count());
        let slots: u64 = counts.iter().map(|&count| u64::from(count)).sum();
        let always = if tokens > 0 { router + shared * n(config.hidden) } else { 0 };
        let products = slots * expert + n(tokens) * (router + shared * n(config.hidden));
        let moved = n(tokens) * n(config.hidden) * 2;
        Self {
            bytes: (touched * expert + always) * n(weights.size()) + moved * n(activations.size()),
            flops: 2 * products,
        }
    }

    /// The shortest time that it can take, in seconds: the larger of what memory and what arithmetic need.
    ///
    /// - `bandwidth`: bytes per second; `rate`: operations per second, both as measured on the device
    pub fn floor(&self, bandwidth: f64, rate: f64) -> f64 {
        (self.bytes as f64 / bandwidth).max(self.flops as f64 / rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_layers_are_valid() {
        for shape in SHAPES {
            assert_eq!(find(shape.name), Some(shape));
            shape.config().check().unwrap();
        }
        assert_eq!(find("none"), None);
    }

    #[test]
    fn one_token_of_qwen3() {
        let config = find("qwen3-30b-a3b").unwrap().config();
        let mut counts = [0; 128];
        counts[..8].fill(1);
        let cost = Cost::of(&config, 1, &counts, [DType::BF16; 2]);
        let expert = 3 * 2048 * 768;
        assert_eq!(cost.bytes, (8 * expert + 128 * 2048) * 2 + 2 * 2048 * 2);
        assert_eq!(cost.flops, 2 * (8 * expert + 128 * 2048));
        assert_eq!(cost.floor(cost.bytes as f64, 1e30), 1.0);
        assert_eq!(cost.floor(1e30, cost.flops as f64), 1.0);
        assert_eq!(Cost::of(&config, 0, &[0; 128], [DType::BF16; 2]), Cost::default());
    }
}
