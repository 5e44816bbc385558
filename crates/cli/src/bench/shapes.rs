//! Layers of published models, by name.

use fused_moe::config::{Activation, LayerConfig, Normalize, RoutingRule, Score, WeightRule, WeightValue};

/// A layer of a published model: H, I, E, K and its routing and activation, without a shared expert, biases or groups.
pub(crate) struct Shape {
    pub(crate) name: &'static str,
    sizes: [usize; 4],
    rule: Rule,
}

/// What a weight is.
enum Rule {
    SoftmaxOverAll,
    SoftmaxOverAllThenSum,
    SoftmaxOverChosen,
    SigmoidThenSum,
}

/// All of them.
pub(crate) const SHAPES: [Shape; 6] = [
    Shape { name: "qwen3-30b-a3b", sizes: [2048, 768, 128, 8], rule: Rule::SoftmaxOverAllThenSum },
    Shape { name: "mixtral-8x7b", sizes: [4096, 14336, 8, 2], rule: Rule::SoftmaxOverAllThenSum },
    Shape { name: "gemma4-26b-a4b", sizes: [2816, 704, 128, 8], rule: Rule::SoftmaxOverAllThenSum },
    Shape { name: "deepseek-v3", sizes: [7168, 2048, 256, 8], rule: Rule::SigmoidThenSum },
    Shape { name: "gpt-oss-20b", sizes: [2880, 2880, 32, 4], rule: Rule::SoftmaxOverChosen },
    Shape { name: "olmoe", sizes: [2048, 1024, 64, 8], rule: Rule::SoftmaxOverAll },
];

impl Shape {
    pub(crate) fn config(&self) -> LayerConfig {
        let [hidden, intermediate, experts, top_k] = self.sizes;
        let sum = Normalize::Sum { eps: 0.0 };
        let (score, weights) = match self.rule {
            Rule::SoftmaxOverAll => (Score::Softmax, WeightRule::default()),
            Rule::SoftmaxOverAllThenSum => (Score::Softmax, WeightRule { normalize: sum, ..WeightRule::default() }),
            Rule::SoftmaxOverChosen => {
                (Score::Logit, WeightRule { value: WeightValue::SoftmaxOfChosen, ..WeightRule::default() })
            }
            Rule::SigmoidThenSum => (Score::Sigmoid, WeightRule { normalize: sum, ..WeightRule::default() }),
        };
        let activation = match self.name {
            "gpt-oss-20b" => Activation::ClampedSwish { alpha: 1.702, limit: 7.0 },
            "gemma4-26b-a4b" => Activation::Gated(fused_moe::config::Function::GeluTanh),
            _ => Activation::default(),
        };
        LayerConfig {
            routing: RoutingRule { score, weights, ..RoutingRule::default() },
            activation,
            ..LayerConfig::new(hidden, intermediate, experts, top_k)
        }
    }
}
