//! What entries of the table of families share.

use super::family::*;
use fused_moe_core::config::{Function, GroupScore, Masked, Score, SelectBy, WeightOn, WeightValue};
use fused_moe_core::weights::{GateUpOrder, Orientation, StackLayout};

/// What most families have in common.
pub(super) const BASE: Family = Family {
    name: "",
    model_types: &[],
    unread: &[],
    beside: None,
    roots: &["model.", "model.language_model.", "language_model.model.", "transformer.", ""],
    blocks: &["layers.{l}.mlp"],
    layers: &["num_hidden_layers", "n_layers"],
    kinds: &[],
    hidden: &["hidden_size", "d_model"],
    intermediate: &["moe_intermediate_size"],
    intermediate_beside: None,
    experts: &["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"],
    top_k: Size::Field(TOP_K),
    zero_experts: None,
    always: None,
    sparse: &[Sparse::Every],
    router: &["gate.weight"],
    router_lies: Orientation::OutIn,
    router_mlp: None,
    router_norm: None,
    router_scale: Number::Fixed(1.0),
    router_bias: &[],
    router_biased: Flag::Always,
    softcap: &[],
    correction_bias: &[],
    correction_rows: 1,
    correction_end: None,
    expert_scale: &[],
    scale: &[],
    scale_optional: false,
    table: None,
    routing: &[always(SOFTMAX)],
    capacity: None,
    activation: HIDDEN_ACT,
    weight_on: WeightOn::Output,
    routed_scale: ONE,
    matrices: &[PER_EXPERT, FUSED],
    sum_bias: &[],
    shared: None,
    around: PLAIN,
};

pub(super) const TOP_K: Field = &["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"];

/// Where no width of dense layers has the shorter name.
pub(super) const EXPERT_WIDTH: Field = &["moe_intermediate_size", "intermediate_size"];

/// Experts with nothing around them.
pub(super) const PLAIN: Around = Around {
    latent: None,
    experts_in: None,
    expert_out: None,
    routed_out: None,
    shared_in: None,
    shared_out: None,
    out: None,
};

pub(super) const RMS_EPS: Number = field(&["rms_norm_eps", "norm_epsilon", "norm_eps"], None);

/// A norm whose factor is its weight.
pub(super) const fn rms(weight: &'static str) -> Rms {
    Rms { weight, eps: RMS_EPS, unit_offset: false, scaled_first: false }
}

/// Experts w1, w2, w3 of width `intermediate_size` in every layer.
pub(super) const MIXTRAL: Family =
    Family { blocks: SPARSE_BLOCK, intermediate: &["intermediate_size"], matrices: &[W123], ..BASE };

/// Sigmoid scores with a correction bias and groups, some dense layers first, shared experts.
pub(super) const DEEPSEEK: Family = Family {
    sparse: FIRST_DENSE,
    correction_bias: &["gate.e_score_correction_bias"],
    routing: &[always(deepseek(SCALING_FACTOR))],
    shared: Some(SHARED_EXPERTS),
    ..BASE
};

/// The same with weights multiplied by `scale`.
pub(super) const fn deepseek(scale: Number) -> Routing {
    Routing {
        select: grouped(Flag::Always, GroupScore::SumOfBestTwo, Masked::NegInfinity),
        normalize: NORM_TOPK_PROB,
        ..scaled(SIGMOID, scale)
    }
}

/// Softmax scores without bias or normalisation, groups only by one of two methods.
pub(super) const DEEPSEEK_V2: Family = Family {
    routing: &[
        Case { when: &[(&["topk_method"], "greedy")], then: scaled(SOFTMAX, factor(1.0)) },
        Case {
            when: &[(&["topk_method"], "group_limited_greedy")],
            then: Routing {
                select: grouped(Flag::Never, GroupScore::Best, Masked::Zero),
                ..scaled(SOFTMAX, factor(1.0))
            },
        },
    ],
    ..DEEPSEEK
};

/// Experts that share an activation with their shared expert: clamped gated SiLU.
pub(super) const CLAMPED_SHARED_EXPERTS: Shared = Shared { activation: CLAMPED_SILU, ..SHARED_EXPERTS };

pub(super) const GRANITE: Family = Family {
    beside: Some("the residual and its factor: a decoder layer is x + residual_multiplier * y"),
    blocks: SPARSE_BLOCK,
    intermediate: &["intermediate_size"],
    router: &["router.layer.weight", "router.weight"],
    routing: &[always(TOP_LOGITS)],
    matrices: &[
        Layout::Joint { gate_up: "input_linear.weight", down: "output_linear.weight", layout: OUT_IN, biases: None },
        FUSED,
    ],
    ..BASE
};

/// With a shared expert beside the block, if config.json has a width for it.
pub(super) const GRANITE_SHARED: Family = Family {
    shared: Some(Shared {
        matrices: &[Layout::Joint {
            gate_up: "../shared_mlp.input_linear.weight",
            down: "../shared_mlp.output_linear.weight",
            layout: OUT_IN,
            biases: None,
        }],
        width: &["shared_intermediate_size"],
        optional: true,
        times: None,
        ..SHARED_EXPERTS
    }),
    ..GRANITE
};

/// Logits with a bias, activation and biases in the experts, `x W`.
pub(super) const GPT_OSS: Family = Family {
    intermediate: &["intermediate_size"],
    router: &["router.weight"],
    router_bias: &["router.bias"],
    routing: &[always(TOP_LOGITS)],
    activation: SWIGLU_OAI,
    ..BASE
};

/// Softmax scores chosen with a correction bias, layers in a range.
pub(super) const ERNIE: Family = Family {
    unread: &[(&["use_bias"], "biases of experts")],
    sparse: &[Sparse::Range {
        first: &["moe_layer_start_index"],
        last: &["moe_layer_end_index"],
        interval: &["moe_layer_interval"],
    }],
    correction_bias: &["moe_statics.e_score_correction_bias"],
    routing: &[always(Routing {
        select: Select::TopK { by: SelectBy::Score, bias: Flag::Always, groups: None },
        normalize: Norm::AtLeast(field(&["moe_norm_min"], Some(1e-12))),
        ..SOFTMAX
    })],
    shared: Some(SHARED_EXPERTS),
    ..BASE
};

pub(super) const SPARSE_BLOCK: Names = &["layers.{l}.block_sparse_moe", "layers.{l}.mlp"];

pub(super) const QWEN_SPARSE: &[Sparse] =
    &[Sparse::Step { step: &["decoder_sparse_step"], except: &["mlp_only_layers"], default: &[] }];

pub(super) const MLP_LAYER_TYPES: Sparse = Sparse::Kind { field: &["mlp_layer_types"], moe: &["sparse", "moe"] };

pub(super) const FIRST_K_DENSE: Sparse = Sparse::From { first: &["first_k_dense_replace", "num_dense_layers"] };

pub(super) const FIRST_DENSE: &[Sparse] = &[MLP_LAYER_TYPES, FIRST_K_DENSE, Sparse::Every];

/// The same, but the first layer alone where config.json does not say.
pub(super) const ONE_DENSE: &[Sparse] = &[MLP_LAYER_TYPES, FIRST_K_DENSE, Sparse::Behind(1)];

pub(super) const HIDDEN_ACT: Act =
    Act::Gated { named: &["hidden_act", "hidden_activation", "activation_function"], default: Function::Silu };

/// Whatever the activation of other layers.
pub(super) const SILU: Act = Act::Gated { named: &[], default: Function::Silu };

pub(super) const SWIGLU_OAI: Act =
    Act::ClampedSwish { alpha: field(&["swiglu_alpha"], Some(1.702)), limit: field(&["swiglu_limit"], Some(7.0)) };

pub(super) const RELU_SQUARED: Act = Act::Plain { named: &["mlp_hidden_act"], default: Function::ReluSquared };

pub(super) const CLAMPED_SILU: Act = Act::ClampedSilu { limit: field(&["swiglu_limit"], Some(10.0)) };

pub(super) const ONE: Cases<Number> = &[always(Number::Fixed(1.0))];

pub(super) const SHARED_COMBINATION: Cases<Number> = &[
    Case { when: &[(&["shared_expert_combination_strategy"], "average")], then: Number::Fixed(0.5) },
    Case { when: &[(&["shared_expert_combination_strategy"], "sum")], then: Number::Fixed(1.0) },
];

pub(super) const SCALING_FACTOR: Number = field(&["routed_scaling_factor"], None);

pub(super) const fn factor(default: f32) -> Number {
    field(&["routed_scaling_factor"], Some(default))
}

/// Softmax over all experts, the largest K, weights as they are.
pub(super) const SOFTMAX: Routing = Routing {
    score: &[always(Score::Softmax)],
    select: Select::TopK { by: SelectBy::Score, bias: Flag::Never, groups: None },
    value: WeightValue::Score,
    normalize: Norm::Never,
    scale: Number::Fixed(1.0),
};

/// The same, weights divided by their sum.
pub(super) const NORMALIZED: Routing = Routing { normalize: Norm::Sum { when: Flag::Always, eps: 0.0 }, ..SOFTMAX };

/// Sigmoid scores, chosen with a correction bias, divided by their sum.
pub(super) const SIGMOID: Routing = Routing {
    score: &[always(Score::Sigmoid)],
    select: Select::TopK { by: SelectBy::Score, bias: Flag::Always, groups: None },
    ..NORMALIZED
};

/// The largest K logits, weighted by the softmax over them.
pub(super) const TOP_LOGITS: Routing = Routing {
    score: &[always(Score::Logit)],
    select: Select::TopK { by: SelectBy::Logit, bias: Flag::Never, groups: None },
    value: WeightValue::SoftmaxOfChosen,
    ..SOFTMAX
};

/// Softmax scores, divided by their sum if config.json says so.
pub(super) const fn norm_topk_prob(default: bool) -> Routing {
    Routing { normalize: norm_if(Some(default), 0.0), ..SOFTMAX }
}

/// By the sum plus eps if config.json says so; without a default it must.
pub(super) const fn norm_if(default: Option<bool>, eps: f32) -> Norm {
    Norm::Sum { when: Flag::Field { field: &["norm_topk_prob", "moe_renormalize"], default }, eps }
}

pub(super) const NORM_TOPK_PROB: Norm = norm_if(Some(true), 1e-20);

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

pub(super) const SHARED_SINGULAR: Layout = Layout::Apart {
    gate: "shared_expert.gate_proj.weight",
    up: "shared_expert.up_proj.weight",
    down: "shared_expert.down_proj.weight",
};

pub(super) const SHARED_APART: Layout = Layout::Apart {
    gate: "shared_experts.gate_proj.weight",
    up: "shared_experts.up_proj.weight",
    down: "shared_experts.down_proj.weight",
};

pub(super) const SHARED_W123: Layout = Layout::Apart {
    gate: "shared_experts.w1.weight",
    up: "shared_experts.w3.weight",
    down: "shared_experts.w2.weight",
};

pub(super) const SHARED_MLP: Layout = Layout::Apart {
    gate: "shared_mlp.gate_proj.weight",
    up: "shared_mlp.up_proj.weight",
    down: "shared_mlp.down_proj.weight",
};

pub(super) const QWEN_SHARED: Shared = Shared {
    matrices: &[SHARED_SINGULAR],
    width: &["shared_expert_intermediate_size"],
    optional: false,
    times: None,
    gate: &["shared_expert_gate.weight"],
    activation: HIDDEN_ACT,
    both: ONE,
};

/// The same without a gate of its own.
pub(super) const SHARED_EXPERT: Shared = Shared { gate: &[], ..QWEN_SHARED };

/// Several shared experts, stored as one of their total width.
pub(super) const SHARED_EXPERTS: Shared = Shared {
    matrices: &[SHARED_APART],
    width: &["moe_intermediate_size"],
    optional: false,
    times: Some(&["n_shared_experts", "num_shared_experts", "moe_num_shared_experts"]),
    gate: &[],
    activation: HIDDEN_ACT,
    both: ONE,
};
