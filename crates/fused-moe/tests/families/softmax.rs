//! Softmax over all experts.

use crate::block::{FUSED, PER_EXPERT, Row, SHARED_EXPERT, SHARED_EXPERTS, SIZES, W123, row, with};
use crate::rules::*;
use serde_json::{Value, json};

/// Fields of the families that call their experts routed and count shared ones.
const ROUTED: [&str; 5] =
    ["/hidden_size", "/moe_intermediate_size", "/n_routed_experts", "/num_experts_per_tok", "/n_shared_experts"];

/// A model whose language part is in `text_config`, typed `FAMILY_text`.
pub(crate) fn nested(family: &str, outer: &str, row: &Row) -> Value {
    let text = with(row.config.clone(), json!({ "model_type": family }));
    json!({ "model_type": outer, "text_config": text, "vision_config": { "model_type": "x", "hidden_size": 99 } })
}

pub(crate) fn inside(fields: [&'static str; 5]) -> [&'static str; 5] {
    fields.map(|field| if field.is_empty() { "" } else { format!("/text_config{field}").leak() })
}

fn softmax_renormalized(l: &[f64], _: &[f64]) -> Routes {
    normalized(of(&top(l, 3), &softmax(l)), 0.0)
}

fn softmax_as_is(l: &[f64], _: &[f64]) -> Routes {
    of(&top(l, 3), &softmax(l))
}

fn mistral_large4(l: &[f64], _: &[f64]) -> Routes {
    let p = softmax(l);
    times(normalized(of(&top(&limited(&p, 4, 2, 0.0), 3), &p), 1e-20), 1.75)
}

fn by_best_group(l: &[f64], _: &[f64]) -> Routes {
    let p = softmax(l);
    times(of(&top(&limited_by_best(&p, 4, 2, 0.0), 3), &p), 4.0)
}

/// The choice is biased, the weights are not, and their sum is at least 0.5.
fn ernie(l: &[f64], bias: &[f64]) -> Routes {
    let p = softmax(l);
    let routes = of(&top(&plus(&p, bias), 3), &p);
    let sum: f64 = routes.iter().map(|(_, w)| w).sum();
    times(routes, 1.0 / sum.max(0.5))
}

pub(crate) fn rows() -> Vec<Row> {
    let mut all = vec![
        Row {
            block: "model.layers.1.block_sparse_moe",
            experts: W123,
            route: softmax_renormalized,
            fields: ["/hidden_size", "/intermediate_size", "/num_local_experts", "", ""],
            ..row("minimax", json!({ "num_local_experts": 8, "intermediate_size": 6, "mlp_alpha_factor": 3.5 }))
        },
        Row {
            sizes: [12, 6, 7, 5, 0],
            route: |l, _| of(&top(l, 5), &softmax(l)),
            fields: ["/hidden_size", "/intermediate_size", "/num_experts", "", ""],
            ..row("flex_olmo", json!({ "num_experts": 7, "num_experts_per_tok": 5, "intermediate_size": 6 }))
        },
        Row {
            sizes: [12, 6, 7, 5, 0],
            route: |l, _| normalized(of(&top(l, 5), &softmax(l)), 0.0),
            ..row(
                "flex_olmo",
                json!({ "num_experts": 7, "num_experts_per_tok": 5, "intermediate_size": 6, "norm_topk_prob": true,
                        "moe_intermediate_size": null }),
            )
        },
        Row {
            moe: &[1],
            route: softmax_renormalized,
            ..row(
                "mellum",
                json!({ "num_experts": 8, "moe_intermediate_size": 6, "mlp_layer_types": ["dense", "sparse"] }),
            )
        },
        Row {
            route: softmax_as_is,
            fields: ["/hidden_size", "/moe_intermediate_size", "/num_local_experts", "", ""],
            ..row("mellum", json!({ "num_local_experts": 8, "moe_intermediate_size": 6, "norm_topk_prob": false }))
        },
    ];
    // no tensor contradicts a width under another name
    all[2].fields[1] = "/intermediate_size";

    let qwen = json!({ "num_experts": 8, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 10 });
    for (experts, norm) in [(PER_EXPERT, None), (FUSED, Some(false))] {
        let config = match norm {
            None => qwen.clone(),
            Some(norm) => with(qwen.clone(), json!({ "norm_topk_prob": norm })),
        };
        let flat = Row {
            block: "model.language_model.layers.1.mlp",
            experts,
            shared: Some(SHARED_EXPERT),
            shared_gate: Some("shared_expert_gate.weight"),
            route: if norm.is_none() { softmax_renormalized } else { softmax_as_is },
            ..row("qwen4_exp", config)
        };
        let fields = inside([flat.fields[0], flat.fields[1], flat.fields[2], "", "/shared_expert_intermediate_size"]);
        all.push(Row { config: nested("qwen4_exp_text", "qwen4_exp", &flat), fields, ..flat });
    }

    let ocr = json!({ "n_routed_experts": 8, "moe_intermediate_size": 6, "n_shared_experts": 2, "n_group": null,
                      "mlp_layer_types": ["dense", "sparse"], "norm_topk_prob": true, "routed_scaling_factor": 4.0 });
    let grouped = json!({ "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2 });
    for family in ["deepseek_ocr2", "unlimited_ocr"] {
        let greedy = with(ocr.clone(), json!({ "topk_method": "greedy" }));
        for (config, route) in [
            (greedy, (|l, _| times(softmax_as_is(l, &[]), 4.0)) as fn(&[f64], &[f64]) -> Routes),
            (with(ocr.clone(), grouped.clone()), by_best_group),
        ] {
            let flat = Row {
                moe: &[1],
                sizes: [12, 6, 8, 3, 12],
                shared: Some(SHARED_EXPERTS),
                route,
                fields: ROUTED,
                ..row(family, config)
            };
            let fields = [inside(ROUTED)[0], inside(ROUTED)[1], "", "", inside(ROUTED)[4]];
            all.push(Row { config: nested(&format!("{family}_text"), family, &flat), fields, ..flat });
        }
    }
    all.push(Row {
        moe: &[1],
        sizes: [12, 6, 8, 3, 12],
        shared: Some(SHARED_EXPERTS),
        route: |l, _| times(softmax_as_is(l, &[]), 4.0),
        fields: ROUTED,
        ..row("deepseek_v2", with(ocr, json!({ "topk_method": "greedy", "n_group": 1, "topk_group": 1 })))
    });
    all.push(Row {
        moe: &[1],
        block: "layers.1",
        sizes: [12, 6, 8, 3, 12],
        experts: W123,
        shared: Some(["shared_experts.w1.weight", "shared_experts.w3.weight", "shared_experts.w2.weight"]),
        route: mistral_large4,
        fields: ROUTED,
        ..row(
            "mistral_large4",
            json!({ "n_routed_experts": 8, "moe_intermediate_size": 6, "n_shared_experts": 2, "n_group": 4,
                    "topk_group": 2, "norm_topk_prob": false, "routed_scaling_factor": 1.75,
                    "first_k_dense_replace": 1 }),
        )
    });

    let ernie_vl = || Row {
        moe: &[1],
        block: "model.language_model.layers.1.mlp",
        sizes: [12, 6, 8, 3, 12],
        router: "gate.weight",
        router_turned: true,
        correction: Some(("model.language_model.layers.1.mlp.moe_statics.e_score_correction_bias", 2)),
        shared: Some(SHARED_EXPERTS),
        route: ernie,
        ..row(
            "ernie4_5_vl_moe",
            json!({ "moe_num_experts": 8, "moe_k": 3, "num_experts_per_tok": null, "moe_intermediate_size": [6, 2],
                    "moe_num_shared_experts": 2, "moe_norm_min": 0.5, "mlp_layer_types": ["dense", "sparse"] }),
        )
    };
    all.push(Row {
        config: nested("ernie4_5_vl_moe_text", "ernie4_5_vl_moe", &ernie_vl()),
        fields: inside(["/hidden_size", "/moe_intermediate_size/0", "/moe_num_experts", "", "/moe_num_shared_experts"]),
        ..ernie_vl()
    });

    let range = json!({ "mlp_layer_types": null, "moe_num_experts": [8, 8], "moe_layer_interval": 1,
                        "moe_layer_start_index": [1, 1], "moe_layer_end_index": [1, 1] });
    all.push(Row {
        config: nested(
            "ernie4_5_vl_moe_text",
            "ernie4_5_vl_moe",
            &Row { config: with(ernie_vl().config, range), ..ernie_vl() },
        ),
        fields: inside([
            "/hidden_size",
            "/moe_intermediate_size/0",
            "/moe_num_experts/0",
            "",
            "/moe_num_shared_experts",
        ]),
        ..ernie_vl()
    });

    // the thinker and the talker are also in `parts`, both in one file
    let thinker = Row {
        block: "thinker.model.layers.1.mlp",
        route: softmax_renormalized,
        fields: ["/thinker_config/text_config/hidden_size", "", "/thinker_config/text_config/num_experts", "", ""],
        ..row("qwen3_omni_moe", json!({ "num_experts": 8, "moe_intermediate_size": 6, "mlp_only_layers": [] }))
    };
    let talker = Row {
        moe: &[1],
        block: "talker.model.layers.1.mlp",
        shared: Some(SHARED_EXPERT),
        shared_gate: Some("shared_expert_gate.weight"),
        route: softmax_renormalized,
        fields: ["", "", "", "", "/talker_config/text_config/shared_expert_intermediate_size"],
        ..row(
            "qwen3_omni_moe_talker",
            json!({ "num_local_experts": 8, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 10,
                    "decoder_sparse_step": 2, "norm_topk_prob": true }),
        )
    };
    let omni = omni(&thinker.config, &talker.config);
    all.push(Row { config: omni.clone(), ..thinker });
    all.push(Row { config: omni, sizes: SIZES, ..talker });
    all
}

/// A config.json with a model that thinks and one that talks.
pub(crate) fn omni(thinker: &Value, talker: &Value) -> Value {
    let text = |config: &Value, name: &str| with(config.clone(), json!({ "model_type": name }));
    json!({
        "model_type": "qwen3_omni_moe",
        "thinker_config": { "model_type": "qwen3_omni_moe_thinker",
                            "text_config": text(thinker, "qwen3_omni_moe_text") },
        "talker_config": { "model_type": "qwen3_omni_moe_talker",
                           "text_config": text(talker, "qwen3_omni_moe_talker_text") },
    })
}
