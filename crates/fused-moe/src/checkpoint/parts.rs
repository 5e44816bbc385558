//! What entries of the table of families share.

use super::family::*;
use fused_moe_core::config::{GroupScore, Masked, Score, SelectBy, WeightOn, WeightValue};
use fused_moe_core::weights::{GateUpOrder, Orientation, StackLayout};

/// What most families have in common.
pub(super) const BASE: Family = Family {
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

/// Experts w1, w2, w3 of width `intermediate_size` in every layer.
pub(super) const MIXTRAL: Family =
    Family { blocks: SPARSE_BLOCK, intermediate: &["intermediate_size"], matrices: &[W123], ..BASE };

/// Sigmoid scores with a correction bias and groups, some dense layers first, shared experts.
pub(super) const DEEPSEEK: Family = Family {
    sparse: FIRST_DENSE,
    correction_bias: &["gate.e_score_correction_bias"],
    routing: &[always(Routing {
        select: grouped(Flag::Always, GroupScore::SumOfBestTwo, Masked::NegInfinity),
        normalize: NORM_TOPK_PROB,
        ..scaled(SIGMOID, SCALING_FACTOR)
    })],
    shared: Some(SHARED_EXPERTS),
    ..BASE
};

pub(super) const GRANITE: Family = Family {
    blocks: SPARSE_BLOCK,
    intermediate: &["intermediate_size"],
    router: &["router.layer.weight"],
    routing: &[always(TOP_LOGITS)],
    matrices: &[Layout::Joint {
        gate_up: "input_linear.weight",
        down: "output_linear.weight",
        layout: OUT_IN,
        biases: None,
    }],
    ..BASE
};

pub(super) const SPARSE_BLOCK: Names = &["layers.{l}.block_sparse_moe", "layers.{l}.mlp"];

pub(super) const QWEN_SPARSE: &[Sparse] =
    &[Sparse::Step { step: &["decoder_sparse_step"], except: &["mlp_only_layers"] }];

pub(super) const FIRST_DENSE: &[Sparse] = &[
    Sparse::Kind { field: &["mlp_layer_types"], moe: &["sparse", "moe"] },
    Sparse::From { first: &["first_k_dense_replace", "num_dense_layers"] },
    Sparse::Every,
];

pub(super) const HIDDEN_ACT: Act = Act::Gated { named: &["hidden_act", "hidden_activation", "activation_function"] };

pub(super) const SWIGLU_OAI: Act =
    Act::ClampedSwish { alpha: field(&["swiglu_alpha"], Some(1.702)), limit: field(&["swiglu_limit"], Some(7.0)) };

pub(super) const CLAMPED_SILU: Act = Act::ClampedSilu { limit: field(&["swiglu_limit"], None) };

pub(super) const ONE: Cases<Number> = &[always(Number::Fixed(1.0))];

pub(super) const SHARED_COMBINATION: Cases<Number> = &[
    Case { when: &[(&["shared_expert_combination_strategy"], "average")], then: Number::Fixed(0.5) },
    Case { when: &[(&["shared_expert_combination_strategy"], "sum")], then: Number::Fixed(1.0) },
];

pub(super) const SCALING_FACTOR: Number = field(&["routed_scaling_factor"], None);

/// Softmax over all experts, the largest K, weights as they are.
pub(super) const SOFTMAX: Routing = Routing {
    score: Score::Softmax,
    select: Select::TopK { by: SelectBy::Score, bias: Flag::Never, groups: None },
    value: WeightValue::Score,
    normalize: Norm::Never,
    scale: Number::Fixed(1.0),
};

/// The same, weights divided by their sum.
pub(super) const NORMALIZED: Routing = Routing { normalize: Norm::Sum { when: Flag::Always, eps: 0.0 }, ..SOFTMAX };

/// Sigmoid scores, chosen with a correction bias, divided by their sum.
pub(super) const SIGMOID: Routing = Routing {
    score: Score::Sigmoid,
    select: Select::TopK { by: SelectBy::Score, bias: Flag::Always, groups: None },
    ..NORMALIZED
};

/// The largest K logits, weighted by the softmax over them.
pub(super) const TOP_LOGITS: Routing = Routing {
    score: Score::Logit,
    select: Select::TopK { by: SelectBy::Logit, bias: Flag::Never, groups: None },
    value: WeightValue::SoftmaxOfChosen,
    ..SOFTMAX
};

/// Softmax scores, divided by their sum if config.json says so.
pub(super) const fn norm_topk_prob(default: bool) -> Routing {
    let when = Flag::Field { field: &["norm_topk_prob"], default };
    Routing { normalize: Norm::Sum { when, eps: 0.0 }, ..SOFTMAX }
}

pub(super) const NORM_TOPK_PROB: Norm =
    Norm::Sum { when: Flag::Field { field: &["norm_topk_prob", "moe_renormalize"], default: true }, eps: 1e-20 };

pub(super) const fn scaled(routing: Routing, scale: Number) -> Routing {
    Routing { scale, ..routing }
}

pub(super) const fn grouped(bias: Flag, score: GroupScore, masked: Masked) -> Select {
    let groups = GroupFields { count: &["n_group", "num_expert_group"], keep: &["topk_group"], score, masked };
    Select::TopK { by: SelectBy::Score, bias, groups: Some(groups) }
}

pub(super) const fn field(field: Field, default: Option<f32>) -> Number {
    Number::Field { field, default }
}

pub(super) const fn always<T: Copy>(then: T) -> Case<T> {
    Case { when: &[], then }
}

pub(super) const PER_EXPERT: Layout = Layout::Apart {
    gate: "experts.{e}.gate_proj.weight",
    up: "experts.{e}.up_proj.weight",
    down: "experts.{e}.down_proj.weight",
};

pub(super) const W123: Layout =
    Layout::Apart { gate: "experts.{e}.w1.weight", up: "experts.{e}.w3.weight", down: "experts.{e}.w2.weight" };

pub(super) const FUSED: Layout =
    Layout::Joint { gate_up: "experts.gate_up_proj", down: "experts.down_proj", layout: OUT_IN, biases: None };

pub(super) const FUSED_IN_OUT: Layout =
    Layout::Joint { gate_up: "experts.gate_up_proj", down: "experts.down_proj", layout: IN_OUT, biases: None };

pub(super) const OUT_IN: StackLayout =
    StackLayout { order: GateUpOrder::GateThenUp, gate_up: Orientation::OutIn, down: Orientation::OutIn };

pub(super) const IN_OUT: StackLayout =
    StackLayout { order: GateUpOrder::GateThenUp, gate_up: Orientation::InOut, down: Orientation::InOut };

pub(super) const QWEN_SHARED: Shared = Shared {
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

/// Several shared experts, stored as one of their total width.
pub(super) const SHARED_EXPERTS: Shared = Shared {
    matrices: &[Layout::Apart {
        gate: "shared_experts.gate_proj.weight",
        up: "shared_experts.up_proj.weight",
        down: "shared_experts.down_proj.weight",
    }],
    width: &["moe_intermediate_size"],
    times: Some(&["n_shared_experts", "num_shared_experts", "moe_num_shared_experts"]),
    gate: &[],
    activation: HIDDEN_ACT,
    scale: ONE,
};
