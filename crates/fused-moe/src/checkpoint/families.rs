//! The model families: one entry each, nothing but data; what they share is in `parts`.

use super::family::*;
use super::parts::*;
use fused_moe_core::config::{GroupScore, Masked, Score, SelectBy, WeightOn};
use fused_moe_core::weights::{GateUpOrder, Orientation, StackLayout};

/// All of them. Each is held against numbers that the model's own code computed.
pub(super) const FAMILIES: &[Family] = &[
    Family { name: "mixtral", model_types: &["mixtral"], routing: &[always(NORMALIZED)], ..MIXTRAL },
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
        name: "qwen3_next",
        model_types: &["qwen3_next"],
        sparse: QWEN_SPARSE,
        routing: &[always(norm_topk_prob(true))],
        shared: Some(QWEN_SHARED),
        ..BASE
    },
    Family {
        name: "qwen3_5_moe",
        model_types: &["qwen3_5_moe", "qwen3_5_moe_text"],
        routing: &[always(NORMALIZED)],
        shared: Some(QWEN_SHARED),
        ..BASE
    },
    Family {
        name: "qwen3_vl_moe",
        model_types: &["qwen3_vl_moe", "qwen3_vl_moe_text"],
        sparse: QWEN_SPARSE,
        routing: &[always(NORMALIZED)],
        matrices: &[FUSED_IN_OUT, FUSED, PER_EXPERT],
        ..BASE
    },
    Family {
        name: "olmoe",
        model_types: &["olmoe"],
        intermediate: &["intermediate_size"],
        routing: &[always(norm_topk_prob(false))],
        ..BASE
    },
    Family { name: "deepseek_v3", model_types: &["deepseek_v3", "kimi_k2"], ..DEEPSEEK },
    Family { name: "glm4_moe", model_types: &["glm4_moe"], ..DEEPSEEK },
    Family { name: "dots1", model_types: &["dots1"], ..DEEPSEEK },
    Family {
        name: "exaone_moe",
        model_types: &["exaone_moe"],
        correction_bias: &["e_score_correction_bias"],
        ..DEEPSEEK
    },
    Family {
        name: "bailing_hybrid",
        model_types: &["bailing_hybrid"],
        correction_bias: &["gate.expert_bias"],
        ..DEEPSEEK
    },
    Family { name: "kimi_linear", model_types: &["kimi_linear"], blocks: SPARSE_BLOCK, matrices: &[W123], ..DEEPSEEK },
    Family {
        name: "deepseek_v2",
        model_types: &["deepseek_v2"],
        routing: &[
            Case { when: &[(&["topk_method"], "greedy")], then: scaled(SOFTMAX, SCALING_FACTOR) },
            Case {
                when: &[(&["topk_method"], "group_limited_greedy")],
                then: Routing {
                    select: grouped(Flag::Never, GroupScore::Best, Masked::Zero),
                    ..scaled(SOFTMAX, SCALING_FACTOR)
                },
            },
        ],
        ..DEEPSEEK
    },
    Family {
        name: "deepseek_v4",
        model_types: &["deepseek_v4"],
        blocks: &["layers.{l}.ffn"],
        sparse: &[Sparse::Every],
        correction_bias: &["gate.bias"],
        routing: &[Case {
            when: &[(&["mlp_layer_types"], "moe"), (&["scoring_func"], "sqrtsoftplus")],
            then: Routing {
                score: Score::SqrtSoftplus,
                normalize: Norm::Sum { when: Flag::Always, eps: 1e-20 },
                ..scaled(SIGMOID, SCALING_FACTOR)
            },
        }],
        activation: CLAMPED_SILU,
        matrices: &[W123],
        shared: Some(Shared {
            matrices: &[Layout::Apart {
                gate: "shared_experts.w1.weight",
                up: "shared_experts.w3.weight",
                down: "shared_experts.w2.weight",
            }],
            activation: CLAMPED_SILU,
            ..SHARED_EXPERTS
        }),
        ..BASE
    },
    Family {
        name: "mistral4",
        model_types: &["mistral4"],
        routing: &[always(Routing {
            select: grouped(Flag::Never, GroupScore::SumOfBestTwo, Masked::Zero),
            normalize: NORM_TOPK_PROB,
            ..scaled(SOFTMAX, SCALING_FACTOR)
        })],
        ..DEEPSEEK
    },
    Family {
        name: "minimax_m2",
        model_types: &["minimax_m2"],
        correction_bias: &["e_score_correction_bias"],
        routing: &[always(SIGMOID)],
        ..MIXTRAL
    },
    Family {
        name: "minimax_m3_vl",
        model_types: &["minimax_m3_vl", "minimax_m3_vl_text"],
        sparse: FIRST_DENSE,
        correction_bias: &["e_score_correction_bias"],
        routing: &[always(SIGMOID)],
        activation: SWIGLU_OAI,
        routed_scale: &[always(SCALING_FACTOR)],
        shared: Some(Shared {
            width: &["shared_intermediate_size"],
            times: None,
            activation: SWIGLU_OAI,
            ..SHARED_EXPERTS
        }),
        ..MIXTRAL
    },
    Family {
        name: "phimoe",
        model_types: &["phimoe"],
        routing: &[always(Routing {
            select: Select::SparseMixer { jitter: field(&["router_jitter_noise"], Some(0.01)) },
            ..SOFTMAX
        })],
        ..MIXTRAL
    },
    Family {
        name: "gpt_oss",
        model_types: &["gpt_oss"],
        intermediate: &["intermediate_size"],
        router: &["router.weight"],
        router_bias: &["router.bias"],
        routing: &[always(TOP_LOGITS)],
        activation: SWIGLU_OAI,
        matrices: &[Layout::Joint {
            gate_up: "experts.gate_up_proj",
            down: "experts.down_proj",
            layout: StackLayout { order: GateUpOrder::Interleaved, ..IN_OUT },
            biases: Some(["experts.gate_up_proj_bias", "experts.down_proj_bias"]),
        }],
        ..BASE
    },
    Family {
        name: "llama4",
        model_types: &["llama4_text"],
        blocks: &["layers.{l}.feed_forward"],
        intermediate: &["intermediate_size"],
        sparse: &[Sparse::Listed(&["moe_layers"]), Sparse::Step { step: &["interleave_moe_layer_step"], except: &[] }],
        router: &["router.weight"],
        routing: &[always(Routing {
            score: Score::Sigmoid,
            select: Select::TopK { by: SelectBy::Logit, bias: Flag::Never, groups: None },
            ..SOFTMAX
        })],
        weight_on: WeightOn::Input,
        matrices: &[FUSED_IN_OUT],
        shared: Some(Shared { width: &["intermediate_size"], gate: &[], ..QWEN_SHARED }),
        ..BASE
    },
    Family { name: "granitemoe", model_types: &["granitemoe"], ..GRANITE },
    Family {
        name: "granitemoeshared",
        model_types: &["granitemoeshared"],
        shared: Some(Shared {
            matrices: &[Layout::Joint {
                gate_up: "../shared_mlp.input_linear.weight",
                down: "../shared_mlp.output_linear.weight",
                layout: OUT_IN,
                biases: None,
            }],
            width: &["shared_intermediate_size"],
            times: None,
            ..SHARED_EXPERTS
        }),
        ..GRANITE
    },
    Family {
        name: "jamba",
        model_types: &["jamba"],
        blocks: &["layers.{l}.feed_forward"],
        intermediate: &["intermediate_size"],
        sparse: &[Sparse::Period { period: &["expert_layer_period"], offset: &["expert_layer_offset"] }],
        router: &["router.weight"],
        ..BASE
    },
    Family {
        name: "dbrx",
        model_types: &["dbrx"],
        blocks: &["blocks.{l}.ffn"],
        intermediate: &["ffn_config.ffn_hidden_size"],
        experts: &["ffn_config.moe_num_experts"],
        top_k: &["ffn_config.moe_top_k"],
        router: &["router.layer.weight"],
        routing: &[always(Routing {
            normalize: Norm::Lp { p: &["ffn_config.moe_normalize_expert_weights"], default: 1.0 },
            ..SOFTMAX
        })],
        activation: Act::Gated { named: &["ffn_config.ffn_act_fn.name"] },
        matrices: &[Layout::Stacks {
            gate: "experts.mlp.w1",
            up: "experts.mlp.v1",
            down: "experts.mlp.w2",
            layout: StackLayout { down: Orientation::InOut, ..OUT_IN },
            flat: true,
        }],
        ..BASE
    },
    Family {
        name: "ernie4_5_moe",
        model_types: &["ernie4_5_moe"],
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
    },
    Family {
        name: "hunyuan_v1_moe",
        model_types: &["hunyuan_v1_moe"],
        intermediate: &["intermediate_size"],
        router: &["gate.wg.weight"],
        routing: &[always(NORMALIZED)],
        shared: Some(Shared {
            matrices: &[Layout::Apart {
                gate: "shared_mlp.gate_proj.weight",
                up: "shared_mlp.up_proj.weight",
                down: "shared_mlp.down_proj.weight",
            }],
            width: &["intermediate_size"],
            times: None,
            ..SHARED_EXPERTS
        }),
        ..BASE
    },
    Family {
        name: "lfm2_moe",
        model_types: &["lfm2_moe"],
        blocks: &["layers.{l}.feed_forward"],
        sparse: FIRST_DENSE,
        correction_bias: &["expert_bias"],
        routing: &[always(Routing {
            select: Select::TopK {
                by: SelectBy::Score,
                bias: Flag::Field { field: &["use_expert_bias"], default: true },
                groups: None,
            },
            normalize: Norm::Sum { when: Flag::Field { field: &["norm_topk_prob"], default: true }, eps: 1e-6 },
            ..scaled(SIGMOID, SCALING_FACTOR)
        })],
        matrices: &[W123],
        ..BASE
    },
    Family {
        name: "afmoe",
        model_types: &["afmoe"],
        sparse: FIRST_DENSE,
        router: &["router.gate.weight"],
        correction_bias: &["expert_bias"],
        routing: &[always(Routing {
            normalize: Norm::Sum { when: Flag::Always, eps: 1e-20 },
            ..scaled(SIGMOID, field(&["route_scale"], None))
        })],
        shared: Some(SHARED_EXPERTS),
        ..BASE
    },
    Family {
        name: "cohere2_moe",
        model_types: &["cohere2_moe"],
        intermediate: &["intermediate_size"],
        sparse: FIRST_DENSE,
        routing: &[Case { when: &[(&["expert_selection_fn"], "softmax")], then: TOP_LOGITS }],
        routed_scale: SHARED_COMBINATION,
        shared: Some(Shared { width: &["intermediate_size"], scale: SHARED_COMBINATION, ..SHARED_EXPERTS }),
        ..BASE
    },
    Family {
        name: "aria_text",
        model_types: &["aria_text"],
        intermediate: &["intermediate_size"],
        router: &["router.weight"],
        routing: &[always(TOP_LOGITS)],
        matrices: &[Layout::Joint {
            gate_up: "experts.fc1.weight",
            down: "experts.fc2.weight",
            layout: IN_OUT,
            biases: None,
        }],
        shared: Some(Shared { width: &["intermediate_size"], ..SHARED_EXPERTS }),
        ..BASE
    },
    Family {
        name: "step3p7",
        model_types: &["step3p7", "step3p5"],
        blocks: &["layers.{l}.moe"],
        sparse: FIRST_DENSE,
        correction_bias: &["router_bias"],
        routing: &[always(SIGMOID)],
        activation: Act::SiluThenClamp { limit: &["swiglu_limits"] },
        routed_scale: &[always(field(&["moe_router_scaling_factor"], None))],
        matrices: &[Layout::Stacks {
            gate: "gate_proj.weight",
            up: "up_proj.weight",
            down: "down_proj.weight",
            layout: OUT_IN,
            flat: false,
        }],
        shared: Some(Shared {
            matrices: &[Layout::Apart {
                gate: "../share_expert.gate_proj.weight",
                up: "../share_expert.up_proj.weight",
                down: "../share_expert.down_proj.weight",
            }],
            width: &["share_expert_dim"],
            times: None,
            activation: Act::SiluThenClamp { limit: &["swiglu_limits_shared"] },
            ..SHARED_EXPERTS
        }),
        ..BASE
    },
];
