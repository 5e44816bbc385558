//! The shapes that are measured, and what a call of them costs at the least.

use fused_moe_core::DType;
use fused_moe_core::config::{
    Activation, Function, LayerConfig, Normalize, RoutingRule, Score, SelectBy, Selection, WeightRule, WeightValue,
};

/// A layer of a published model: sizes, routing and activation, without shared expert, biases and groups. A number at the
/// end of the name (`deepseek-v3-64`) is how many of the model's experts it has.
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
    /// How experts are chosen and weighed.
    pub routing: RoutingRule,
    /// The activation.
    pub activation: Activation,
}

const SILU: Activation = Activation::Gated(Function::Silu);
const GELU: Activation = Activation::Gated(Function::GeluTanh);
const CLAMPED: Activation = Activation::ClampedSwish { alpha: 1.702, limit: 7.0 };

const SOFTMAX: RoutingRule = rule(Score::Softmax, WeightValue::Score, Normalize::None);
const SOFTMAX_SUM: RoutingRule = rule(Score::Softmax, WeightValue::Score, Normalize::Sum { eps: 0.0 });
const SIGMOID_SUM: RoutingRule = rule(Score::Sigmoid, WeightValue::Score, Normalize::Sum { eps: 0.0 });
const SOFTMAX_OF_CHOSEN: RoutingRule = rule(Score::Logit, WeightValue::SoftmaxOfChosen, Normalize::None);

const fn rule(score: Score, value: WeightValue, normalize: Normalize) -> RoutingRule {
    let selection = Selection::TopK { by: SelectBy::Score, bias: false, groups: None };
    RoutingRule {
        score,
        selection,
        weights: WeightRule { value, expert_scale: None, normalize, scale: 1.0 },
        always: 0,
    }
}

/// All of them.
pub const SHAPES: [NamedShape; 7] = [
    shape("qwen3-30b-a3b", [2048, 768, 128, 8], SOFTMAX_SUM, SILU),
    shape("mixtral-8x7b", [4096, 14336, 8, 2], SOFTMAX_SUM, SILU),
    shape("gemma4-26b-a4b", [2816, 704, 128, 8], SOFTMAX_SUM, GELU),
    shape("deepseek-v3", [7168, 2048, 256, 8], SIGMOID_SUM, SILU),
    shape("deepseek-v3-64", [7168, 2048, 64, 8], SIGMOID_SUM, SILU),
    shape("gpt-oss-20b", [2880, 2880, 32, 4], SOFTMAX_OF_CHOSEN, CLAMPED),
    shape("olmoe", [2048, 1024, 64, 8], SOFTMAX, SILU),
];

const fn shape(name: &'static str, sizes: [usize; 4], routing: RoutingRule, activation: Activation) -> NamedShape {
    let [hidden, intermediate, experts, top_k] = sizes;
    NamedShape { name, hidden, intermediate, experts, top_k, routing, activation }
}

/// The shape of this name.
pub fn find(name: &str) -> Option<NamedShape> {
    SHAPES.into_iter().find(|shape| shape.name == name)
}

impl NamedShape {
    /// A layer of this shape.
    pub fn config(&self) -> LayerConfig {
        LayerConfig {
            routing: self.routing,
            activation: self.activation,
            ..LayerConfig::new(self.hidden, self.intermediate, self.experts, self.top_k)
        }
    }
}

/// What a call has to move and to compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Bytes of the matrices of the touched experts and of the shared one, of the router, of x and y: each once.
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
            .map_or(0, |s| n(s.intermediate) + n(s.activation.gate_up_rows(s.intermediate)) + u64::from(s.gated));
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

    /// The same where the caller brings the logits, f32 `[T, E]`: they are read, the router is not.
    pub fn from_logits(self, config: &LayerConfig, tokens: usize, weights: DType) -> Self {
        if tokens == 0 {
            return self;
        }
        let (tokens, experts) = (tokens as u64, config.experts as u64);
        let router = experts * config.hidden as u64;
        Self {
            bytes: (self.bytes + 4 * tokens * experts).saturating_sub(router * weights.size() as u64),
            flops: self.flops.saturating_sub(2 * tokens * router),
        }
    }

    /// Of the backward pass of a call of this cost: twice the products, and beside what the call reads the gradient of y, the
    /// saved pre-activations, and the gradients of x and of every matrix, those of experts without tokens too.
    ///
    /// - `from_router`: whether the router has a gradient
    pub fn backward(self, config: &LayerConfig, counts: &[u32], dtype: DType, from_router: bool) -> Self {
        let n = |x: usize| x as u64;
        let slots: u64 = counts.iter().map(|&count| u64::from(count)).sum();
        let tokens = slots / n(config.top_k.max(1));
        let expert = (n(config.gate_up_rows()) + n(config.intermediate)) * n(config.hidden);
        let router = if from_router { n(config.experts) * n(config.hidden) } else { 0 };
        let moved = slots * n(config.gate_up_rows()) + tokens * n(config.hidden);
        let written = n(config.experts) * expert + router;
        Self { bytes: self.bytes + (moved + written) * n(dtype.size()), flops: 2 * self.flops }
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
    use fused_moe_core::config::SharedConfig;

    #[test]
    fn names_are_unique_and_layers_are_valid() {
        for shape in SHAPES {
            assert_eq!(find(shape.name), Some(shape));
            shape.config().check().unwrap();
        }
        assert_eq!(find("none"), None);
    }

    #[test]
    fn a_shared_expert_is_read_once_and_computed_for_every_token() {
        let shared = SharedConfig { intermediate: 5, activation: SILU, gated: true, scale: 1.0 };
        let config = LayerConfig { shared: Some(shared), ..LayerConfig::new(7, 3, 4, 2) };
        let cost = Cost::of(&config, 3, &[3, 0, 1, 2], [DType::F16, DType::F32]);
        let (expert, always) = (3 * 7 * 3, 4 * 7 + 3 * 7 * 5 + 7);
        assert_eq!(cost.bytes, 2 * (3 * expert + always) + 4 * 2 * 3 * 7);
        assert_eq!(cost.flops, 2 * (6 * expert + 3 * always));
    }

    #[test]
    fn a_backward_pass_writes_every_matrix() {
        let config = LayerConfig::new(7, 3, 4, 2);
        let counts = [3, 0, 1, 2];
        let cost = Cost::of(&config, 3, &counts, [DType::F16; 2]);
        let back = cost.backward(&config, &counts, DType::F16, true);
        let (expert, router) = (3 * 7 * 3, 4 * 7);
        // x, d_y and d_x; pre-activations
        let rows = 3 * 3 * 7 + 6 * 6;
        assert_eq!(back.bytes, 2 * (3 * expert + 4 * expert + 2 * router + rows));
        assert_eq!(back.flops, 2 * cost.flops);
        assert_eq!(back.bytes - cost.backward(&config, &counts, DType::F16, false).bytes, 2 * router);
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
        let given = cost.from_logits(&config, 1, DType::BF16);
        assert_eq!((given.bytes, given.flops), (8 * expert * 2 + 4 * 128 + 2 * 2048 * 2, 2 * 8 * expert));
        assert_eq!(Cost::default().from_logits(&config, 0, DType::BF16), Cost::default());
        assert_eq!(cost.floor(cost.bytes as f64, 1e30), 1.0);
        assert_eq!(cost.floor(1e30, cost.flops as f64), 1.0);
        assert_eq!(Cost::of(&config, 0, &[0; 128], [DType::BF16; 2]), Cost::default());
    }
}
