//! The largest logits: gpt-oss, Granite and others.

use crate::checkpoint::family::*;
use crate::checkpoint::parts::*;
use fused_moe_core::config::{Score, SelectBy, WeightOn, WeightValue};
use fused_moe_core::weights::{GateUpOrder, StackLayout};

pub(super) const FAMILIES: &[Family] = &[
    Family {
        name: "gpt_oss",
        model_types: &["gpt_oss"],
        matrices: &[Layout::Joint {
            gate_up: "experts.gate_up_proj",
            down: "experts.down_proj",
            layout: StackLayout { order: GateUpOrder::Interleaved, ..IN_OUT },
            biases: Some(["experts.gate_up_proj_bias", "experts.down_proj_bias"]),
        }],
        ..GPT_OSS
    },
    Family {
        name: "openai_privacy_filter",
        model_types: &["openai_privacy_filter"],
        routing: &[always(scaled(TOP_LOGITS, Number::Inverse(TOP_K)))],
        matrices: &[Layout::Joint {
            gate_up: "experts.gate_up_proj",
            down: "experts.down_proj",
            layout: IN_OUT,
            biases: Some(["experts.gate_up_proj_bias", "experts.down_proj_bias"]),
        }],
        ..GPT_OSS
    },
    Family {
        name: "llama4",
        model_types: &["llama4"],
        blocks: &["layers.{l}.feed_forward"],
        intermediate: &["intermediate_size"],
        sparse: &[
            Sparse::Listed(&["moe_layers"]),
            Sparse::Step { step: &["interleave_moe_layer_step"], except: &[], default: &[] },
        ],
        router: &["router.weight"],
        routing: &[always(Routing {
            score: &[always(Score::Sigmoid)],
            select: Select::TopK { by: SelectBy::Logit, bias: Flag::Never, groups: None },
            ..SOFTMAX
        })],
        weight_on: WeightOn::Input,
        matrices: &[FUSED_IN_OUT],
        shared: Some(Shared { width: &["intermediate_size"], ..SHARED_EXPERT }),
        ..BASE
    },
    Family { name: "granitemoe", model_types: &["granitemoe"], ..GRANITE },
    Family { name: "granitemoe_swa", model_types: &["granitemoe_swa"], ..GRANITE_SHARED },
    Family { name: "granitemoeshared", model_types: &["granitemoeshared"], ..GRANITE_SHARED },
    Family { name: "granitemoehybrid", model_types: &["granitemoehybrid"], ..GRANITE_SHARED },
    Family {
        name: "jetmoe",
        model_types: &["jetmoe"],
        beside: Some("the experts of the attention (self_attention.experts), which are not read"),
        blocks: &["layers.{l}.mlp"],
        sum_bias: &["bias"],
        ..GRANITE
    },
    Family {
        name: "cohere2_moe",
        model_types: &["cohere2_moe"],
        beside: Some("the attention, which reads the same x: a decoder layer is x + attention(x) + y"),
        intermediate: &["intermediate_size"],
        sparse: FIRST_DENSE,
        routing: &[
            Case { when: &[(&["expert_selection_fn"], "softmax")], then: TOP_LOGITS },
            Case {
                when: &[(&["expert_selection_fn"], "sigmoid")],
                then: Routing {
                    score: &[always(Score::Sigmoid)],
                    value: WeightValue::Score,
                    normalize: norm_if(Some(true), 0.0),
                    ..TOP_LOGITS
                },
            },
        ],
        shared: Some(Shared { width: &["intermediate_size"], both: SHARED_COMBINATION, ..SHARED_EXPERTS }),
        ..BASE
    },
    Family {
        name: "aria_text",
        model_types: &["aria_text", "aria"],
        intermediate: &["intermediate_size"],
        router: &["router.weight"],
        routing: &[always(TOP_LOGITS)],
        activation: SILU,
        matrices: &[Layout::Joint {
            gate_up: "experts.fc1.weight",
            down: "experts.fc2.weight",
            layout: IN_OUT,
            biases: None,
        }],
        shared: Some(Shared { width: &["intermediate_size"], ..SHARED_EXPERTS }),
        ..BASE
    },
];
