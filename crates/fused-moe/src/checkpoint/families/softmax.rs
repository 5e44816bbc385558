//! Softmax over all experts: Qwen, Mixtral, ERNIE and their kin.

use crate::checkpoint::family::*;
use crate::checkpoint::parts::*;
use fused_moe_core::config::{Function, GroupScore, Masked, SelectBy, ZeroOutput};
use fused_moe_core::weights::{Orientation, StackLayout};

pub(super) const FAMILIES: &[Family] = &[
    Family { name: "mixtral", model_types: &["mixtral"], routing: &[always(NORMALIZED)], ..MIXTRAL },
    Family {
        name: "minimax",
        model_types: &["minimax"],
        beside: Some("the residual and its factors: a decoder layer is mlp_alpha_factor * x + mlp_beta_factor * y"),
        routing: &[always(NORMALIZED)],
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
        beside: Some("the hyper-connections around the block, which mix its output with the residual streams"),
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
        beside: Some("the norm behind the block: a decoder layer is x + norm(y)"),
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
        top_k: Size::Field(&["ffn_config.moe_top_k"]),
        router: &["router.layer.weight"],
        routing: &[always(Routing {
            normalize: Norm::Lp { p: &["ffn_config.moe_normalize_expert_weights"], default: 1.0 },
            ..SOFTMAX
        })],
        activation: Act::Gated { named: &["ffn_config.ffn_act_fn.name"], default: Function::Silu },
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
    Family {
        name: "longcat_flash",
        model_types: &["longcat_flash"],
        beside: Some("the two dense MLPs beside the block (mlps.0, mlps.1)"),
        // num_hidden_layers counts sublayers, two a layer
        layers: &["num_layers"],
        intermediate: &["expert_ffn_hidden_size"],
        zero_experts: Some(Zero { count: Size::Field(&["zero_expert_num"]), output: ZeroOutput::Copy, weighted: true }),
        router: &["router.classifier.weight"],
        correction_bias: &["router.e_score_correction_bias"],
        routing: &[always(scaled(BIASED, factor(6.0)))],
        ..BASE
    },
    Family {
        name: "zaya",
        model_types: &["zaya"],
        intermediate: EXPERT_WIDTH,
        zero_experts: Some(Zero { count: Size::Fixed(1), output: ZeroOutput::Zero, weighted: false }),
        router: &["gate.router_mlp.out_proj.weight"],
        router_mlp: Some(RouterLayers {
            width: &["router_hidden_size"],
            function: Function::GeluErf,
            down: ["gate.down_proj.weight", "gate.down_proj.bias"],
            state_scale: "gate.router_states_scale",
            norm: "gate.router_mlp.norm.weight",
            eps: RMS_EPS,
            fc1: ["gate.router_mlp.fc1.weight", "gate.router_mlp.fc1.bias"],
            fc2: ["gate.router_mlp.fc2.weight", "gate.router_mlp.fc2.bias"],
        }),
        correction_bias: &["gate.balancing_biases"],
        // the model's own code sets the choice without an expert to this when it loads a file
        correction_end: Some(-1.0),
        routing: &[always(BIASED)],
        matrices: &[FUSED, PER_EXPERT],
        ..BASE
    },
    Family {
        name: "gemma4",
        model_types: &["gemma4"],
        // the last is where a diffusion_gemma has it, whose text part calls itself gemma4 in some files
        roots: &["model.language_model.", "language_model.model.", "model.", "model.decoder."],
        ..GEMMA
    },
    Family {
        name: "diffusion_gemma",
        model_types: &["diffusion_gemma"],
        roots: &["model.decoder.", "model."],
        sparse: &[Sparse::If(Flag::Field { field: &["enable_moe_block"], default: Some(true) })],
        ..GEMMA
    },
    Family {
        name: "switch_transformers_decoder",
        model_types: &["switch_transformers"],
        roots: &["decoder."],
        blocks: &["block.{l}.layer.2.mlp"],
        layers: &["num_decoder_layers", "num_layers"],
        sparse: &[Sparse::SecondOf { step: &["decoder_sparse_step"] }],
        ..SWITCH
    },
    Family {
        name: "switch_transformers_encoder",
        model_types: &["switch_transformers"],
        roots: &["encoder."],
        blocks: &["block.{l}.layer.1.mlp"],
        layers: &["num_layers"],
        sparse: &[Sparse::SecondOf { step: &["encoder_sparse_step"] }],
        ..SWITCH
    },
    Family {
        name: "nllb_moe_decoder",
        model_types: &["nllb_moe", "nllb-moe"],
        roots: &["model.decoder.", "decoder."],
        layers: &["decoder_layers"],
        intermediate: &["decoder_ffn_dim"],
        sparse: &[Sparse::LastOf { step: &["decoder_sparse_step"] }],
        ..NLLB
    },
    Family {
        name: "nllb_moe_encoder",
        model_types: &["nllb_moe", "nllb-moe"],
        roots: &["model.encoder.", "encoder."],
        layers: &["encoder_layers", "num_hidden_layers"],
        intermediate: &["encoder_ffn_dim"],
        sparse: &[Sparse::LastOf { step: &["encoder_sparse_step"] }],
        ..NLLB
    },
];

/// Chosen with a correction bias.
const BIASED: Routing =
    Routing { select: Select::TopK { by: SelectBy::Score, bias: Flag::Always, groups: None }, ..SOFTMAX };

/// A norm before and one behind both the experts and a dense MLP beside them, and one of their sum; the router has its own.
const GEMMA: Family = Family {
    beside: Some("the residual and its factor: a decoder layer is (x + y) * layer_scalar"),
    blocks: &["layers.{l}"],
    top_k: Size::Field(&["top_k_experts"]),
    sparse: &[Sparse::If(Flag::Field { field: &["enable_moe_block"], default: Some(false) })],
    router: &["router.proj.weight"],
    router_norm: Some(("router.scale", RMS_EPS)),
    router_scale: Number::InverseRoot(BASE.hidden),
    expert_scale: &["router.per_expert_scale"],
    routing: &[always(NORMALIZED)],
    activation: GEGLU,
    matrices: &[FUSED],
    shared: Some(Shared {
        matrices: &[Layout::Apart {
            gate: "mlp.gate_proj.weight",
            up: "mlp.up_proj.weight",
            down: "mlp.down_proj.weight",
        }],
        width: &["intermediate_size"],
        times: None,
        activation: GEGLU,
        ..SHARED_EXPERTS
    }),
    around: Around {
        experts_in: Some(rms("pre_feedforward_layernorm_2.weight")),
        routed_out: Some(rms("post_feedforward_layernorm_2.weight")),
        shared_in: Some(rms("pre_feedforward_layernorm.weight")),
        shared_out: Some(rms("post_feedforward_layernorm_1.weight")),
        out: Some(rms("post_feedforward_layernorm.weight")),
        ..PLAIN
    },
    ..BASE
};

const GEGLU: Act = Act::Gated { named: &["hidden_activation"], default: Function::GeluTanh };

/// One expert a token, as long as it has room; without gates.
const SWITCH: Family = Family {
    intermediate: &["d_ff"],
    top_k: Size::Fixed(1),
    router: &["router.classifier.weight"],
    router_bias: &["router.classifier.bias"],
    router_biased: Flag::Field { field: &["router_bias"], default: Some(false) },
    capacity: Some(Slots {
        whole_call: false,
        fraction: &[],
        count: &["expert_capacity"],
        share: None,
        by_score: Flag::Never,
        renormalize: Flag::Never,
    }),
    activation: Act::Plain { named: &["dense_act_fn"], default: Function::Relu },
    matrices: &[Layout::Plain {
        up: "experts.expert_{e}.wi.weight",
        down: "experts.expert_{e}.wo.weight",
        biases: None,
    }],
    ..BASE
};

/// Two experts a token, as long as they have room, with biases. Of the policies for the second expert the others are random.
const NLLB: Family = Family {
    blocks: &["layers.{l}.ffn"],
    top_k: Size::Fixed(2),
    routing: &[Case {
        when: &[(&["second_expert_policy"], "all")],
        then: Routing {
            normalize: Norm::Sum { when: Flag::Field { field: BEFORE_DROPPING, default: Some(false) }, eps: 0.0 },
            ..SOFTMAX
        },
    }],
    capacity: Some(Slots {
        whole_call: true,
        fraction: &["moe_eval_capacity_token_fraction"],
        count: &["expert_capacity"],
        share: Some(2),
        by_score: Flag::Field { field: &["batch_prioritized_routing"], default: Some(false) },
        renormalize: Flag::Not(BEFORE_DROPPING),
    }),
    activation: Act::Plain { named: &["activation_function"], default: Function::Relu },
    routed_scale: &[always(Number::OneLess(&["moe_token_dropout"]))],
    matrices: &[Layout::Plain {
        up: "experts.expert_{e}.fc1.weight",
        down: "experts.expert_{e}.fc2.weight",
        biases: Some(["experts.expert_{e}.fc1.bias", "experts.expert_{e}.fc2.bias"]),
    }],
    ..SWITCH
};

const BEFORE_DROPPING: Field = &["normalize_router_prob_before_dropping"];
