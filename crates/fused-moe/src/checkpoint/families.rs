//! The model families: one entry each, nothing but data.

use super::family::*;
use fused_moe_core::config::{GroupScore, Masked, Score, SelectBy, WeightOn, WeightValue};
use fused_moe_core::weights::{GateUpOrder, Orientation, StackLayout};

/// All of them.
pub(super) const FAMILIES: &[Family] = &[
    Family {
        name: "mixtral",
        model_types: &["mixtral"],
        blocks: SPARSE_BLOCK,
        intermediate: &["intermediate_size"],
        routing: &[always(NORMALIZED)],
        matrices: &[W123],
        ..BASE
    },
    Family {
        name: "qwen2_moe",
        model_types: &["qwen2_moe"],
        sparse: QWEN_SPARSE,
        routing: &[always(norm_topk_prob(false))],
        shared: Some(QWEN_SHARED),
        ..BASE
    },
    Family {
        name: "qwen3_moe",
        model_types: &["qwen3_moe"],
        sparse: QWEN_SPARSE,
        routing: &[always(norm_topk_prob(false))],
        ..BASE
    },
    Family {
        name: "olmoe",
        model_types: &["olmoe"],
        intermediate: &["intermediate_size"],
        routing: &[always(norm_topk_prob(false))],
        ..BASE
    },
];

/// What most families have in common.
const BASE: Family = Family {
    name: "",
    model_types: &[],
    roots: &["model.", "model.language_model.", "language_model.model.", "thinker.model.", "transformer.", ""],
    blocks: &["layers.{l}.mlp"],
    layers: &["num_hidden_layers", "n_layers"],
    hidden: &["hidden_size", "d_model"],
    intermediate: &["moe_intermediate_size"],
    experts: &["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"],
    top_k: &["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"],
    sparse: &[Sparse::Every],
    router: &["gate.weight"],
    router_bias: &[],
    correction_bias: &[],
    routing: &[always(SOFTMAX)],
    activation: HIDDEN_ACT,
    weight_on: WeightOn::Output,
    routed_scale: ONE,
    matrices: &[PER_EXPERT, FUSED],
    shared: None,
};

const SPARSE_BLOCK: Names = &["layers.{l}.block_sparse_moe", "layers.{l}.mlp"];

const QWEN_SPARSE: &[Sparse] = &[Sparse::Step { step: &["decoder_sparse_step"], except: &["mlp_only_layers"] }];

const HIDDEN_ACT: Act = Act::Gated { named: &["hidden_act", "hidden_activation", "activation_function"] };

const ONE: Cases<Number> = &[always(Number::Fixed(1.0))];

/// Softmax over all experts, the largest K, weights as they are.
const SOFTMAX: Routing = Routing {
    score: Score::Softmax,
    select: Select::TopK { by: SelectBy::Score, bias: Flag::Never, groups: None },
    value: WeightValue::Score,
    normalize: Norm::Never,
    scale: Number::Fixed(1.0),
};

/// The same, weights divided by their sum.
const NORMALIZED: Routing = Routing { normalize: Norm::Sum { when: Flag::Always, eps: 0.0 }, ..SOFTMAX };

/// The same, divided by their sum if config.json says so.
const fn norm_topk_prob(default: bool) -> Routing {
    let when = Flag::Field { field: &["norm_topk_prob"], default };
    Routing { normalize: Norm::Sum { when, eps: 0.0 }, ..SOFTMAX }
}

const PER_EXPERT: Layout = Layout::Apart {
    gate: "experts.{e}.gate_proj.weight",
    up: "experts.{e}.up_proj.weight",
    down: "experts.{e}.down_proj.weight",
};

const W123: Layout =
    Layout::Apart { gate: "experts.{e}.w1.weight", up: "experts.{e}.w3.weight", down: "experts.{e}.w2.weight" };

/// `[E, 2I, H]` and `[E, H, I]`.
const FUSED: Layout = Layout::Joint {
    gate_up: "experts.gate_up_proj",
    down: "experts.down_proj",
    layout: OUT_IN,
    biases: None,
};

const OUT_IN: StackLayout =
    StackLayout { order: GateUpOrder::GateThenUp, gate_up: Orientation::OutIn, down: Orientation::OutIn };

const QWEN_SHARED: Shared = Shared {
    matrices: &[Layout::Apart {
        gate: "shared_expert.gate_proj.weight",
        up: "shared_expert.up_proj.weight",
        down: "shared_expert.down_proj.weight",
    }],
    width: &["shared_expert_intermediate_size"],
    times: None,
    gate: &["shared_expert_gate.weight"],
    activation: HIDDEN_ACT,
    scale: ONE,
};

const fn always<T: Copy>(then: T) -> Case<T> {
    Case { when: None, then }
}
