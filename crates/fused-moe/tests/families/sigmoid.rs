//! A score for each expert by itself.

use crate::block::{FUSED, Lies, PER_EXPERT, Row, SHARED_EXPERT, SHARED_EXPERTS, W123, row, with};
use crate::rules::*;
use crate::softmax::{inside, nested};
use serde_json::json;

const FIELDS: [&str; 5] = ["/hidden_size", "/moe_intermediate_size", "/n_routed_experts", "", "/n_shared_experts"];

fn groups_of_four(l: &[f64], bias: &[f64]) -> Routes {
    ds3_groups(l, bias, [3, 4, 2], f64::NEG_INFINITY, 2.5)
}

/// A model like DeepSeek-V3, its first layer dense, with groups.
fn deepseek(family: &'static str) -> Row {
    Row {
        moe: &[1],
        sizes: [12, 6, 8, 3, 12],
        correction: Some(("model.layers.1.mlp.gate.e_score_correction_bias", 1)),
        shared: Some(SHARED_EXPERTS),
        route: groups_of_four,
        fields: FIELDS,
        ..row(
            family,
            json!({ "n_routed_experts": 8, "moe_intermediate_size": 6, "n_shared_experts": 2, "n_group": 4,
                    "topk_group": 2, "norm_topk_prob": true, "routed_scaling_factor": 2.5,
                    "first_k_dense_replace": 1 }),
        )
    }
}

fn configured(mut row: Row, more: serde_json::Value) -> Row {
    row.config = with(row.config, more);
    row
}

fn laguna(l: &[f64], bias: &[f64]) -> Routes {
    let s: Vec<f64> = l.iter().map(|l| sigmoid(1.5 * (l / 1.5).tanh())).collect();
    normalized(of(&top(&plus(&s, bias), 3), &s), 0.0)
}

fn laguna_uncapped(l: &[f64], bias: &[f64]) -> Routes {
    let s = sigmoids(l);
    normalized(of(&top(&plus(&s, bias), 3), &s), 0.0)
}

/// Chosen by logit plus bias, weighted by sigmoid.
fn kolibri(l: &[f64], bias: &[f64]) -> Routes {
    of(&top(&plus(l, bias), 3), &sigmoids(l))
}

fn normalized_by_millionth(l: &[f64], bias: &[f64]) -> Routes {
    let s = sigmoids(l);
    times(normalized(of(&top(&plus(&s, bias), 3), &s), 1e-6), 1.5)
}

pub(crate) fn rows() -> Vec<Row> {
    let mut all: Vec<Row> =
        ["deepseek_v32", "glm_moe_dsa", "glm4_moe_lite", "axk2", "glm4v_moe", "dots3_note", "solar_open"]
            .map(deepseek)
            .into();
    for row in &mut all {
        match row.family {
            "axk2" => row.route = |l, bias| ds3_groups(l, bias, [3, 4, 2], 0.0, 2.5),
            "glm4v_moe" => {
                row.block = "model.language_model.layers.1.mlp";
                row.correction = Some(("model.language_model.layers.1.mlp.gate.e_score_correction_bias", 1));
                row.config = nested("glm4v_moe_text", "glm4v_moe", row);
                row.fields = inside([FIELDS[0], FIELDS[1], "", "", FIELDS[4]]);
            }
            "dots3_note" => {
                row.sizes[4] = 10;
                row.config["shared_experts_intermediate_size"] = json!(5);
            }
            "solar_open" => row.moe = &[0, 1],
            _ => {}
        }
    }
    // a list of layers goes before the number of dense ones; no groups where their number is null or 1
    all.push(Row {
        moe: &[0],
        block: "model.layers.0.mlp",
        correction: Some(("model.layers.0.mlp.gate.e_score_correction_bias", 1)),
        route: |l, bias| ds3(l, bias, 3, 2.5),
        ..configured(deepseek("axk2"), json!({ "mlp_layer_types": ["sparse", "dense"], "n_group": null }))
    });
    all.push(Row {
        route: |l, bias| ds3(l, bias, 3, 1.8),
        ..configured(
            deepseek("glm4_moe_lite"),
            json!({ "first_k_dense_replace": null, "routed_scaling_factor": null, "n_group": 1 }),
        )
    });
    // kimi_k2 by itself, and as the text of kimi_k2.5
    all.push(configured(deepseek("deepseek_v3"), json!({ "model_type": "kimi_k2" })));
    all.push(Row {
        block: "language_model.model.layers.1.mlp",
        correction: Some(("language_model.model.layers.1.mlp.gate.e_score_correction_bias", 1)),
        config: nested("kimi_k2", "kimi_k25", &deepseek("deepseek_v3")),
        fields: inside([FIELDS[0], FIELDS[1], "", "", FIELDS[4]]),
        ..deepseek("deepseek_v3")
    });
    let glm5 = Row {
        block: "model.language_model.layers.1.mlp",
        correction: Some(("model.language_model.layers.1.mlp.gate.e_score_correction_bias", 1)),
        activation: clamped_at_half,
        shared_activation: clamped_at_half,
        ..configured(deepseek("glm5_next"), json!({ "swiglu_limit": 0.5 }))
    };
    all.push(Row {
        moe: &[3, 4],
        block: "model.layers.4.mlp",
        correction: Some(("model.layers.4.mlp.gate.e_score_correction_bias", 1)),
        ..configured(
            deepseek("glm5_next"),
            json!({ "swiglu_limit": null, "num_hidden_layers": 5, "first_k_dense_replace": null }),
        )
    });
    all.push(Row {
        sizes: [12, 6, 8, 3, 10],
        route: |l, bias| ds3_groups(l, bias, [3, 4, 2], f64::NEG_INFINITY, 1.0),
        ..configured(
            deepseek("dots3_note"),
            json!({ "moe_shared_expert_intermediate_size": 5, "routed_scaling_factor": null,
                    "first_k_dense_replace": null }),
        )
    });
    let fields = inside([FIELDS[0], FIELDS[1], "", "", FIELDS[4]]);
    all.push(Row { config: nested("glm5_next_text", "glm5_next", &glm5), fields, ..glm5 });
    all.push(Row {
        shared: None,
        sizes: [12, 6, 8, 3, 0],
        route: |l, bias| ds3(l, bias, 3, 1.0),
        fields: [FIELDS[0], FIELDS[1], FIELDS[2], "", ""],
        ..configured(
            deepseek("mimo_v2_flash"),
            json!({ "n_shared_experts": null, "routed_scaling_factor": null, "n_group": 1, "topk_group": 1,
                    "first_k_dense_replace": null }),
        )
    });
    for (experts, gate) in [(FUSED, "shared_experts.gate_proj.weight"), (FUSED, "shared_experts.linear_gate.weight")] {
        all.push(Row {
            experts,
            shared: Some([gate, "shared_experts.up_proj.weight", "shared_experts.down_proj.weight"]),
            activation: clamped_at_half,
            ..configured(deepseek("hy_v4"), json!({ "swiglu_limit": 0.5 }))
        });
    }
    all.push(Row { experts: FUSED, ..configured(deepseek("hy_v4"), json!({ "swiglu_limit": 0.0 })) });
    all.push(Row {
        shared: None,
        sizes: [12, 6, 8, 3, 0],
        route: |l, bias| ds3_groups(l, bias, [3, 4, 2], f64::NEG_INFINITY, 1.0),
        routed_scale: 2.5,
        fields: [FIELDS[0], FIELDS[1], "/num_experts", "", ""],
        ..configured(deepseek("beam"), json!({ "n_routed_experts": null, "num_experts": 8 }))
    });
    let hy_v3 = json!({ "num_experts": 8, "moe_intermediate_size": 6, "num_shared_experts": 2,
                        "router_scaling_factor": 2.5, "mlp_layer_types": ["dense", "sparse"] });
    all.push(Row {
        moe: &[1],
        sizes: [12, 6, 8, 3, 12],
        router: "router.gate.weight",
        correction: Some(("model.layers.1.mlp.expert_bias", 1)),
        shared: Some(["shared_mlp.gate_proj.weight", "shared_mlp.up_proj.weight", "shared_mlp.down_proj.weight"]),
        route: |l, bias| ds3(l, bias, 3, 2.5),
        fields: ["/hidden_size", "/moe_intermediate_size", "/num_experts", "", "/num_shared_experts"],
        ..row("hy_v3", hy_v3)
    });
    let nemotron = json!({
        "num_hidden_layers": null, "layers_block_type": ["mamba", "moe", "attention"], "mlp_hidden_act": "relu2",
        "moe_latent_size": null, "moe_shared_expert_intermediate_size": 10,
    });
    for (kinds, layers) in [
        (json!({}), Lies::Each(["", "experts.{e}.up_proj.weight", "experts.{e}.down_proj.weight"])),
        (
            json!({ "layers_block_type": null, "hybrid_override_pattern": "ME*", "mlp_hidden_act": null }),
            Lies::UpOnly(["experts.up_proj", "experts.down_proj"]),
        ),
    ] {
        all.push(Row {
            block: "backbone.layers.1.mixer",
            sizes: [12, 6, 8, 3, 10],
            correction: Some(("backbone.layers.1.mixer.gate.e_score_correction_bias", 1)),
            experts: layers,
            shared: Some(["", "shared_experts.up_proj.weight", "shared_experts.down_proj.weight"]),
            activation: relu_squared,
            shared_activation: relu_squared,
            fields: [FIELDS[0], FIELDS[1], FIELDS[2], "", "/moe_shared_expert_intermediate_size"],
            ..configured(configured(deepseek("nemotron_h"), nemotron.clone()), kinds)
        });
    }

    // the text model of minimax_m3_vl alone, named as in its code
    all.push(Row {
        moe: &[1],
        correction: Some(("model.layers.1.mlp.gate.e_score_correction_bias", 1)),
        experts: FUSED,
        shared: Some(["shared_experts.gate_up_proj.weight", "", "shared_experts.down_proj.weight"]),
        activation: swiglu_oai,
        shared_activation: swiglu_oai,
        route: |l, bias| ds3(l, bias, 3, 1.0),
        routed_scale: 2.0,
        fields: ["/hidden_size", "/intermediate_size", "/num_local_experts", "", "/shared_intermediate_size"],
        ..row(
            "minimax_m3_vl",
            json!({ "model_type": "minimax_m3_vl_text", "num_local_experts": 8, "intermediate_size": 6,
                    "dense_intermediate_size": 20, "shared_intermediate_size": 10, "routed_scaling_factor": 2.0,
                    "moe_layer_freq": [0, 1] }),
        )
    });
    // a shared expert clamped like the routed ones
    for (score, route) in [
        ("sigmoid", (|l, bias| ds3(l, bias, 3, 1.5)) as fn(&[f64], &[f64]) -> Routes),
        ("softmax", |l, bias| {
            let p = softmax(l);
            times(normalized(of(&top(&plus(&p, bias), 3), &p), 1e-20), 1.5)
        }),
    ] {
        all.push(Row {
            block: "layers.1.ffn",
            sizes: [12, 6, 8, 3, 6],
            correction: Some(("layers.1.ffn.gate.bias", 1)),
            experts: W123,
            shared: Some(["shared_experts.w1.weight", "shared_experts.w3.weight", "shared_experts.w2.weight"]),
            activation: clamped_at_half,
            shared_activation: clamped_at_half,
            route,
            fields: [FIELDS[0], FIELDS[1], FIELDS[2], "", ""],
            ..row(
                "deepseek_v4",
                json!({ "n_routed_experts": 8, "moe_intermediate_size": 6, "scoring_func": score, "swiglu_limit": 0.5,
                        "routed_scaling_factor": 1.5, "n_shared_experts": 1,
                        "mlp_layer_types": ["hash_moe", "moe"] }),
            )
        });
    }
    for (biased, norm, route) in [
        (false, true, (|l, _| normalized_by_millionth(l, &[0.0; 8])) as fn(&[f64], &[f64]) -> Routes),
        (true, true, normalized_by_millionth),
        (true, false, |l, bias| {
            let s = sigmoids(l);
            times(of(&top(&plus(&s, bias), 3), &s), 1.5)
        }),
    ] {
        all.push(Row {
            moe: &[1],
            block: "model.layers.1.feed_forward",
            correction: biased.then_some(("model.layers.1.feed_forward.expert_bias", 1)),
            experts: W123,
            route,
            ..row(
                "lfm2_moe",
                json!({ "num_experts": 8, "moe_intermediate_size": 6, "num_dense_layers": 1, "use_expert_bias": biased,
                        "norm_topk_prob": norm, "routed_scaling_factor": 1.5 }),
            )
        });
    }
    let own = json!({ "num_experts": 8, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 10 });
    let own_fields = ["/hidden_size", "/moe_intermediate_size", "/num_experts", "", "/shared_expert_intermediate_size"];
    let shared = |family: &'static str, more| Row {
        shared: Some(SHARED_EXPERT),
        fields: own_fields,
        ..row(family, with(own.clone(), more))
    };
    for (cap, route) in [(1.5, laguna as fn(&[f64], &[f64]) -> Routes), (0.0, laguna_uncapped)] {
        all.push(Row {
            moe: &[1],
            correction: Some(("model.layers.1.mlp.experts.e_score_correction_bias", 1)),
            route,
            routed_scale: 2.5,
            ..shared(
                "laguna",
                json!({ "moe_router_logit_softcapping": cap, "moe_routed_scaling_factor": 2.5,
                        "mlp_layer_types": ["dense", "sparse"], "moe_apply_router_weight_on_input": false }),
            )
        });
    }
    all.push(Row {
        correction: Some(("model.layers.1.moe.router.expert_bias", 1)),
        route: kolibri,
        experts: PER_EXPERT,
        ..shared("kolibri1", json!({}))
    });
    all.push(Row {
        correction: Some(("model.layers.1.moe.router.expert_bias", 1)),
        route: |l, bias| normalized(kolibri(l, bias), 0.0),
        fields: [own_fields[0], own_fields[1], "/num_local_experts", "", own_fields[4]],
        shared: Some(SHARED_EXPERTS),
        ..shared("kolibri1", json!({ "num_experts": null, "num_local_experts": 8, "norm_topk_prob": true }))
    });
    for norm in [true, false] {
        all.push(Row {
            moe: &[2],
            block: "model.layers.2.mlp",
            route: if norm {
                |l, _| normalized(of(&top(l, 3), &sigmoids(l)), 0.0)
            } else {
                |l, _| of(&top(l, 3), &sigmoids(l))
            },
            ..shared("flint", json!({ "num_hidden_layers": 3, "norm_topk_prob": norm }))
        });
    }
    all
}
