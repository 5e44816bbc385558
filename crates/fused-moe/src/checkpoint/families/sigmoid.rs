//! A score for each expert by itself, mostly with a correction bias: DeepSeek and its kin.

use crate::checkpoint::family::*;
use crate::checkpoint::parts::*;
use fused_moe_core::config::{GroupScore, Masked, Score, SelectBy};
use fused_moe_core::weights::{GateUpOrder, StackLayout};

pub(super) const FAMILIES: &[Family] = &[
    Family { name: "deepseek_v3", model_types: &["deepseek_v3", "kimi_k2", "kimi_k25", "kimi_k2_5"], ..DEEPSEEK },
    Family { name: "deepseek_v32", model_types: &["deepseek_v32"], ..DEEPSEEK },
    Family {
        name: "deepseek_v4",
        model_types: &["deepseek_v4"],
        blocks: &["layers.{l}.ffn"],
        sparse: &[Sparse::Every],
        correction_bias: &["gate.bias"],
        routing: &[always(Routing {
            score: &[
                Case { when: &[(&["scoring_func"], "sqrtsoftplus")], then: Score::SqrtSoftplus },
                Case { when: &[(&["scoring_func"], "sigmoid")], then: Score::Sigmoid },
                Case { when: &[(&["scoring_func"], "softmax")], then: Score::Softmax },
            ],
            normalize: Norm::Sum { when: Flag::Always, eps: 1e-20 },
            ..scaled(SIGMOID, factor(1.5))
        })],
        table: Some(ByTable {
            layers: &[
                Sparse::Kind { field: &["mlp_layer_types"], moe: &["hash_moe"] },
                Sparse::Before { end: &["num_hash_layers"], default: 3 },
            ],
            names: &["gate.tid2eid"],
            vocabulary: &["vocab_size"],
        }),
        activation: CLAMPED_SILU,
        matrices: &[W123],
        shared: Some(Shared { matrices: &[SHARED_W123], ..CLAMPED_SHARED_EXPERTS }),
        ..BASE
    },
    Family { name: "glm4_moe", model_types: &["glm4_moe"], ..DEEPSEEK },
    Family { name: "glm4v_moe", model_types: &["glm4v_moe"], ..DEEPSEEK },
    Family {
        name: "glm4_moe_lite",
        model_types: &["glm4_moe_lite"],
        sparse: ONE_DENSE,
        routing: &[always(deepseek(factor(1.8)))],
        ..DEEPSEEK
    },
    Family { name: "glm_moe_dsa", model_types: &["glm_moe_dsa"], ..DEEPSEEK },
    Family {
        name: "glm5_next",
        model_types: &["glm5_next"],
        sparse: &[MLP_LAYER_TYPES, FIRST_K_DENSE, Sparse::Behind(3)],
        routing: &[always(deepseek(factor(2.5)))],
        activation: CLAMPED_SILU,
        shared: Some(CLAMPED_SHARED_EXPERTS),
        ..DEEPSEEK
    },
    Family {
        name: "dots1",
        model_types: &["dots1"],
        routing: &[always(Routing { normalize: norm_if(Some(false), 1e-20), ..deepseek(SCALING_FACTOR) })],
        ..DEEPSEEK
    },
    Family {
        name: "dots3_note",
        model_types: &["dots3_note"],
        beside: Some("the experts of the vision encoder, which are not read"),
        sparse: &[
            MLP_LAYER_TYPES,
            MOE_LAYER_FREQ,
            Sparse::EveryFrom { first: &["first_k_dense_replace"], default: 1, step: &["moe_layer_freq"] },
        ],
        routing: &[always(deepseek(factor(1.0)))],
        shared: Some(Shared {
            width: &["shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"],
            ..SHARED_EXPERTS
        }),
        ..DEEPSEEK
    },
    Family {
        name: "solar_open",
        model_types: &["solar_open"],
        sparse: &[Sparse::Every],
        routing: &[always(deepseek(factor(1.0)))],
        ..DEEPSEEK
    },
    Family {
        name: "exaone_moe",
        model_types: &["exaone_moe"],
        sparse: ONE_DENSE,
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
        name: "mimo_v2_flash",
        model_types: &["mimo_v2_flash"],
        sparse: &[MLP_LAYER_TYPES, MOE_LAYER_FREQ, FIRST_K_DENSE, Sparse::Behind(1)],
        routing: &[always(deepseek(factor(1.0)))],
        shared: None,
        ..DEEPSEEK
    },
    Family {
        name: "axk1",
        model_types: &["axk1"],
        sparse: ONE_DENSE,
        around: Around { out: Some(rms("../post_mlp_layernorm.weight")), ..PLAIN },
        ..DEEPSEEK
    },
    Family {
        name: "axk2",
        model_types: &["axk2"],
        sparse: ONE_DENSE,
        routing: &[always(Routing {
            select: grouped(Flag::Always, GroupScore::SumOfBestTwo, Masked::Zero),
            ..deepseek(factor(2.5))
        })],
        ..DEEPSEEK
    },
    Family {
        name: "hy_v3",
        model_types: &["hy_v3"],
        sparse: ONE_DENSE,
        router: &["router.gate.weight"],
        correction_bias: &["expert_bias"],
        routing: &[always(Routing {
            normalize: Norm::Sum { when: Flag::Always, eps: 1e-20 },
            ..scaled(SIGMOID, field(&["router_scaling_factor"], Some(2.826)))
        })],
        shared: Some(Shared { matrices: &[SHARED_MLP], ..SHARED_EXPERTS }),
        ..BASE
    },
    Family {
        name: "hy_v4",
        model_types: &["hy_v4"],
        sparse: ONE_DENSE,
        routing: &[always(deepseek(factor(2.827)))],
        activation: CLAMPED_SILU,
        matrices: &[FUSED, PER_EXPERT],
        shared: Some(Shared {
            matrices: &[
                SHARED_APART,
                Layout::Apart {
                    gate: "shared_experts.linear_gate.weight",
                    up: "shared_experts.up_proj.weight",
                    down: "shared_experts.down_proj.weight",
                },
            ],
            ..SHARED_EXPERTS
        }),
        ..DEEPSEEK
    },
    Family {
        name: "beam",
        model_types: &["beam"],
        intermediate: EXPERT_WIDTH,
        activation: SILU,
        routing: &[always(deepseek(Number::Fixed(1.0)))],
        routed_scale: &[always(SCALING_FACTOR)],
        shared: None,
        ..DEEPSEEK
    },
    Family {
        name: "nemotron_h",
        model_types: &["nemotron_h"],
        unread: &[(&["mlp_bias"], "biases of experts")],
        roots: &["backbone.", "model."],
        blocks: &["layers.{l}.mixer"],
        kinds: &["layers_block_type", "hybrid_override_pattern"],
        sparse: &[
            Sparse::Kind { field: &["layers_block_type"], moe: &["moe"] },
            Sparse::Letter { field: &["hybrid_override_pattern"], moe: 'E' },
        ],
        routing: &[always(deepseek(factor(1.0)))],
        activation: RELU_SQUARED,
        matrices: &[
            Layout::Plain { up: "experts.{e}.up_proj.weight", down: "experts.{e}.down_proj.weight", biases: None },
            Layout::Joint {
                gate_up: "experts.up_proj",
                down: "experts.down_proj",
                layout: StackLayout { order: GateUpOrder::UpOnly, ..OUT_IN },
                biases: None,
            },
        ],
        shared: Some(Shared {
            matrices: &[Layout::Plain {
                up: "shared_experts.up_proj.weight",
                down: "shared_experts.down_proj.weight",
                biases: None,
            }],
            width: &["moe_shared_expert_intermediate_size"],
            times: None,
            activation: RELU_SQUARED,
            ..SHARED_EXPERTS
        }),
        around: Around {
            latent: Some(Latent {
                width: &["moe_latent_size"],
                down: "fc1_latent_proj.weight",
                up: "fc2_latent_proj.weight",
            }),
            ..PLAIN
        },
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
        model_types: &["minimax_m3_vl"],
        sparse: &[MLP_LAYER_TYPES, MOE_LAYER_FREQ, FIRST_K_DENSE, Sparse::Every],
        // the text model alone is stored as the model's code names it: stacks, the bias with the gate
        correction_bias: &["e_score_correction_bias", "gate.e_score_correction_bias"],
        routing: &[always(SIGMOID)],
        activation: SWIGLU_OAI,
        routed_scale: &[always(SCALING_FACTOR)],
        matrices: &[W123, FUSED],
        shared: Some(Shared {
            matrices: &[
                SHARED_APART,
                Layout::Joint {
                    gate_up: "shared_experts.gate_up_proj.weight",
                    down: "shared_experts.down_proj.weight",
                    layout: OUT_IN,
                    biases: None,
                },
            ],
            width: &["shared_intermediate_size"],
            times: None,
            activation: SWIGLU_OAI,
            ..SHARED_EXPERTS
        }),
        ..MIXTRAL
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
                bias: Flag::Field { field: &["use_expert_bias"], default: Some(true) },
                groups: None,
            },
            normalize: Norm::Sum { when: Flag::Field { field: &["norm_topk_prob"], default: Some(true) }, eps: 1e-6 },
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
            ..scaled(SIGMOID, ROUTE_SCALE)
        })],
        shared: Some(SHARED_EXPERTS),
        ..BASE
    },
    Family {
        name: "step3p7",
        model_types: &["step3p7", "step3p5"],
        blocks: &["layers.{l}.moe"],
        sparse: &[MLP_LAYER_TYPES, Sparse::Listed(&["moe_layers_enum"]), Sparse::Behind(3)],
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
    Family {
        name: "laguna",
        model_types: &["laguna"],
        intermediate: EXPERT_WIDTH,
        sparse: ONE_DENSE,
        softcap: &["moe_router_logit_softcapping"],
        correction_bias: &["experts.e_score_correction_bias"],
        routing: &[always(SIGMOID)],
        routed_scale: &[always(field(&["moe_routed_scaling_factor"], Some(1.0)))],
        shared: Some(Shared { matrices: &[SHARED_SINGULAR, SHARED_APART], ..SHARED_EXPERT }),
        ..BASE
    },
    Family {
        name: "kolibri1",
        model_types: &["kolibri1"],
        intermediate: EXPERT_WIDTH,
        sparse: FIRST_DENSE,
        correction_bias: &["../moe.router.expert_bias"],
        routing: &[always(Routing {
            select: Select::TopK { by: SelectBy::Logit, bias: Flag::Always, groups: None },
            normalize: norm_if(Some(false), 0.0),
            ..SIGMOID
        })],
        shared: Some(Shared { matrices: &[SHARED_SINGULAR, SHARED_APART], ..SHARED_EXPERT }),
        ..BASE
    },
    Family {
        name: "flint",
        model_types: &["flint"],
        intermediate: EXPERT_WIDTH,
        sparse: &[Sparse::Step { step: &["decoder_sparse_step"], except: &["mlp_only_layers"], default: &[0, 1] }],
        routing: &[always(Routing { score: &[always(Score::Sigmoid)], normalize: norm_if(None, 0.0), ..SOFTMAX })],
        shared: Some(SHARED_EXPERT),
        ..BASE
    },
    Family {
        name: "inkling",
        model_types: &["inkling", "inkling_mm_model"],
        always: Some(Always {
            count: &["n_shared_experts"],
            matrices: &[Layout::Joint {
                gate_up: "shared_experts.shared_w13_weight",
                down: "shared_experts.shared_w2_weight",
                layout: INTERLEAVED,
                biases: None,
            }],
        }),
        routing: &[always(scaled(SIGMOID, ROUTE_SCALE))],
        ..INKLING
    },
    Family {
        name: "inkling2",
        model_types: &["inkling2"],
        scale_optional: true,
        routing: &[Case {
            when: &[(&["scoring_func"], "sigmoid")],
            then: Routing { normalize: Norm::Sum { when: Flag::Always, eps: 1e-20 }, ..scaled(SIGMOID, ROUTE_SCALE) },
        }],
        activation: Act::SoftcappedSilu {
            gate_cap: field(&["mlp_gate_softcap"], Some(4.0)),
            up_cap: field(&["mlp_up_softcap"], Some(25.0)),
        },
        ..INKLING
    },
    Family {
        name: "muse_spark",
        model_types: &["muse_spark"],
        sparse: FIRST_DENSE,
        router_scale: field(&["output_multiplier"], None),
        correction_bias: &["gate.e_score_correction_bias"],
        routing: &[always(Routing {
            normalize: Norm::Sum { when: Flag::Always, eps: 1e-15 },
            ..scaled(SIGMOID, SCALING_FACTOR)
        })],
        matrices: &[FUSED, PER_EXPERT],
        around: Around {
            latent: Some(Latent {
                width: &["moe_hidden_size"],
                down: "pre_expert_proj.weight",
                up: "post_expert_proj.weight",
            }),
            // post_norm_eps is that of the norm behind the experts, by its name; the one before them has the model's, where
            // the model has one
            experts_in: Some(Rms {
                unit_offset: true,
                eps: field(&["rms_norm_eps", "norm_epsilon", "norm_eps", "post_norm_eps"], None),
                ..rms("pre_expert_norm.weight")
            }),
            expert_out: Some(Rms {
                scaled_first: true,
                unit_offset: true,
                eps: field(&["post_norm_eps", "rms_norm_eps", "norm_epsilon", "norm_eps"], None),
                ..rms("experts.post_expert_norm.weight")
            }),
            ..PLAIN
        },
        ..BASE
    },
];

const INKLING: Family = Family {
    roots: &["model.llm.", "model.language_model.", "model."],
    intermediate: EXPERT_WIDTH,
    intermediate_beside: Some([&["dense_intermediate_size"], &["intermediate_size"]]),
    sparse: &[MLP_LAYER_TYPES, Sparse::From { first: &["dense_mlp_idx"] }, Sparse::Every],
    correction_bias: &["gate.bias"],
    scale: &["gate.global_scale"],
    matrices: &[Layout::Joint {
        gate_up: "experts.w13_weight",
        down: "experts.w2_weight",
        layout: INTERLEAVED,
        biases: None,
    }],
    ..BASE
};

const INTERLEAVED: StackLayout = StackLayout { order: GateUpOrder::Interleaved, ..OUT_IN };

const MOE_LAYER_FREQ: Sparse = Sparse::Marked(&["moe_layer_freq"]);

const ROUTE_SCALE: Number = field(&["route_scale"], None);
