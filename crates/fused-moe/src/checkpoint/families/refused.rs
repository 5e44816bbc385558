//! Families that a layer cannot express yet, and what it lacks.

/// A family that is known and cannot run.
#[derive(Debug)]
pub(in crate::checkpoint) struct Refused {
    /// `model_type`s in config.json, each also with `_text` behind it.
    pub(in crate::checkpoint) model_types: &'static [&'static str],
    /// What its layers have that a layer has not.
    pub(in crate::checkpoint) lacks: &'static str,
}

pub(in crate::checkpoint) const LATENT: &str =
    "latent projections: experts that work in a width of their own, between a matrix before them and one behind";

pub(in crate::checkpoint) const REFUSED: &[Refused] = &[
    Refused {
        model_types: &["longcat_flash"],
        lacks: "identity experts: router rows past the last expert, which return the token itself",
    },
    Refused {
        model_types: &["muse_spark"],
        lacks: "latent projections with a norm before the experts and one of each expert's output",
    },
    Refused {
        model_types: &["inkling", "inkling_mm_model"],
        lacks: "shared experts that the router scores together with the chosen ones",
    },
    Refused {
        model_types: &["inkling2", "inkling2_mm_model"],
        lacks: "an activation whose gate and up are softcapped",
    },
    Refused {
        model_types: &["zaya"],
        lacks: "a router of several layers that carries its state on to the next block, and a choice that skips the experts",
    },
    Refused { model_types: &["switch_transformers"], lacks: "expert capacity: tokens past it get zero" },
    Refused {
        model_types: &["nllb_moe", "nllb-moe"],
        lacks: "expert capacity: tokens past it get zero; and a second choice by logits",
    },
    Refused { model_types: &["jetmoe"], lacks: "a bias that is added once to the sum over the experts" },
    Refused { model_types: &["axk1"], lacks: "a norm of the sum of routed and shared experts (post_mlp_layernorm)" },
    Refused {
        model_types: &["gemma4", "diffusion_gemma"],
        lacks: "a dense MLP beside the experts, each with norms of its own before and behind",
    },
];
