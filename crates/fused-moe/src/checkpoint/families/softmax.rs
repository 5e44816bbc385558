//! Softmax over all experts: Qwen, Mixtral, ERNIE and their kin.

use crate::checkpoint::family::*;
use crate::checkpoint::parts::*;
use fused_moe_core::config::{GroupScore, Masked};
use fused_moe_core::weights::{Orientation, StackLayout};

pub(super) const FAMILIES: &[Family] = &[
    Family { name: "mixtral", model_types: &["mixtral"], routing: &[always(NORMALIZED)], ..MIXTRAL },
    Family { name: "minimax", model_types: &["minimax"], routing: &[always(NORMALIZED)], ..MIXTRAL },
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
        model_types: &["qwen3_5_moe"],
        routing: &[always(NORMALIZED)],
        shared: Some(QWEN_SHARED),
        ..BASE
    },
    Family {
        name: "qwen4_exp",
        model_types: &["qwen4_exp"],
        routing: &[always(norm_topk_prob(true))],
        shared: Some(QWEN_SHARED),
        ..BASE
    },
    Family {
        name: "qwen3_vl_moe",
        model_types: &["qwen3_vl_moe"],
        sparse: QWEN_SPARSE,
        routing: &[always(NORMALIZED)],
        matrices: &[FUSED_IN_OUT, FUSED, PER_EXPERT],
        ..BASE
    },
    Family {
        name: "qwen3_omni_moe",
        model_types: &["qwen3_omni_moe", "qwen3_omni_moe_thinker"],
        roots: &["thinker.model.", "model.", "model.language_model."],
        sparse: QWEN_SPARSE,
        routing: &[always(norm_topk_prob(true))],
        ..BASE
    },
    Family {
        name: "qwen3_omni_moe_talker",
        model_types: &["qwen3_omni_moe_talker"],
        roots: &["talker.model.", "model."],
        sparse: QWEN_SPARSE,
        routing: &[always(norm_topk_prob(false))],
        shared: Some(QWEN_SHARED),
        ..BASE
    },
    Family {
        name: "olmoe",
        model_types: &["olmoe"],
        intermediate: &["intermediate_size"],
        routing: &[always(norm_topk_prob(false))],
        ..BASE
    },
    Family {
        name: "flex_olmo",
        model_types: &["flex_olmo"],
        intermediate: &["intermediate_size"],
        routing: &[always(norm_topk_prob(false))],
        ..BASE
    },
    Family {
        name: "mellum",
        model_types: &["mellum"],
        sparse: FIRST_DENSE,
        routing: &[always(norm_topk_prob(true))],
        ..BASE
    },
    Family { name: "deepseek_v2", model_types: &["deepseek_v2"], ..DEEPSEEK_V2 },
    Family { name: "deepseek_ocr2", model_types: &["deepseek_ocr2"], ..DEEPSEEK_V2 },
    Family { name: "unlimited_ocr", model_types: &["unlimited_ocr"], sparse: ONE_DENSE, ..DEEPSEEK_V2 },
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
        name: "mistral_large4",
        model_types: &["mistral_large4"],
        blocks: &["layers.{l}", "layers.{l}.mlp"],
        routing: &[always(Routing {
            select: grouped(Flag::Never, GroupScore::SumOfBestTwo, Masked::Zero),
            normalize: Norm::Sum { when: Flag::Always, eps: 1e-20 },
            ..scaled(SOFTMAX, SCALING_FACTOR)
        })],
        matrices: &[W123, FUSED, PER_EXPERT],
        shared: Some(Shared { matrices: &[SHARED_W123, SHARED_APART], ..SHARED_EXPERTS }),
        ..DEEPSEEK
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
    Family { name: "ernie4_5_moe", model_types: &["ernie4_5_moe"], ..ERNIE },
    Family {
        name: "ernie4_5_vl_moe",
        model_types: &["ernie4_5_vl_moe", "ernie4_5_moe_vl"],
        beside: Some("image tokens have experts of their own, which are not read; the layer is that of text tokens"),
        intermediate: &["moe_intermediate_size.0", "moe_intermediate_size"],
        experts: &["moe_num_experts.0", "moe_num_experts", "num_experts"],
        sparse: &[
            MLP_LAYER_TYPES,
            Sparse::Range {
                first: &["moe_layer_start_index.0", "moe_layer_start_index"],
                last: &["moe_layer_end_index.0", "moe_layer_end_index"],
                interval: &["moe_layer_interval"],
            },
        ],
        router_lies: Orientation::InOut,
        correction_rows: 2,
        shared: Some(Shared { width: &["moe_intermediate_size.0", "moe_intermediate_size"], ..SHARED_EXPERTS }),
        ..ERNIE
    },
    Family {
        name: "hunyuan_v1_moe",
        model_types: &["hunyuan_v1_moe"],
        intermediate: &["intermediate_size"],
        router: &["gate.wg.weight"],
        routing: &[always(NORMALIZED)],
        shared: Some(Shared { matrices: &[SHARED_MLP], width: &["intermediate_size"], times: None, ..SHARED_EXPERTS }),
        ..BASE
    },
];
