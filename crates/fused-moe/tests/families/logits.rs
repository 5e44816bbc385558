//! The largest logits.

use crate::block::{FUSED, Lies, PER_EXPERT, Row, SHARED_EXPERTS, row, with};
use crate::rules::*;
use serde_json::json;

const FIELDS: [&str; 5] = ["/hidden_size", "/intermediate_size", "/num_local_experts", "", ""];

pub(crate) fn rows() -> Vec<Row> {
    let granite = json!({ "num_local_experts": 8, "intermediate_size": 6, "residual_multiplier": 0.22 });
    let granite_row = |family: &'static str, more| Row {
        block: "model.layers.1.block_sparse_moe",
        router: "router.weight",
        experts: FUSED,
        route: |l, _| softmax_of_top(l, 3),
        fields: FIELDS,
        ..row(family, with(granite.clone(), more))
    };
    let hybrid = |width| Row {
        router: "router.layer.weight",
        experts: Lies::Fused(["input_linear.weight", "output_linear.weight"]),
        ..granite_row("granitemoehybrid", json!({ "shared_intermediate_size": width }))
    };
    let cohere = json!({ "num_experts": 8, "intermediate_size": 6, "num_shared_experts": 2,
                         "expert_selection_fn": "sigmoid", "shared_expert_combination_strategy": "sum",
                         "mlp_layer_types": ["dense", "sparse"] });
    let shared = |row: Row| Row {
        shared: Some(["../shared_mlp.input_linear.weight", "", "../shared_mlp.output_linear.weight"]),
        fields: [FIELDS[0], FIELDS[1], FIELDS[2], "", "/shared_intermediate_size"],
        ..row
    };
    let mut all = vec![
        granite_row("granitemoe_swa", json!({})),
        shared(granite_row("granitemoe_swa", json!({ "shared_intermediate_size": 10 }))),
        hybrid(0),
        shared(hybrid(10)),
    ];
    for norm in [true, false] {
        all.push(Row {
            moe: &[1],
            sizes: [12, 6, 8, 3, 12],
            experts: PER_EXPERT,
            shared: Some(SHARED_EXPERTS),
            route: if norm {
                |l, _| normalized(of(&top(l, 3), &sigmoids(l)), 0.0)
            } else {
                |l, _| of(&top(l, 3), &sigmoids(l))
            },
            fields: ["/hidden_size", "/intermediate_size", "/num_experts", "", "/num_shared_experts"],
            ..row("cohere2_moe", with(cohere.clone(), json!({ "norm_topk_prob": norm })))
        });
    }
    all.push(Row {
        router: "router.weight",
        router_bias: Some("router.bias"),
        experts: Lies::Turned(
            ["experts.gate_up_proj", "experts.down_proj"],
            ["experts.gate_up_proj_bias", "experts.down_proj_bias"],
        ),
        activation: swiglu_oai,
        route: |l, _| times(softmax_of_top(l, 3), 1.0 / 3.0),
        fields: FIELDS,
        ..row("openai_privacy_filter", json!({ "num_local_experts": 8, "intermediate_size": 6 }))
    });
    all
}
