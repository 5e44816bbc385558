//! Errors where config.json contradicts itself or the files: they name its fields, its values and the tensors.

use crate::common::model::{Model, config, file, tensors};
use crate::common::path;
use crate::parts::block_of;
use fused_moe::checkpoint::{Checkpoint, Error, TensorProblem};
use serde_json::{Value, json};

/// A golden with some fields of its config.json changed.
fn golden(name: &str, changes: Value) -> Model {
    let mut config: Value = serde_json::from_slice(&std::fs::read(path(name).join("config.json")).unwrap()).unwrap();
    let nested = config["text_config"].is_object();
    let scope = if nested { &mut config["text_config"] } else { &mut config };
    changes.as_object().unwrap().iter().for_each(|(key, value)| scope[key] = value.clone());
    Model::new(&config, &std::fs::read(path(name).join("model.safetensors")).unwrap())
}

fn error(model: &Model) -> String {
    Checkpoint::open(model.path()).unwrap().layer(1).unwrap_err().to_string()
}

#[test]
fn numbers_that_do_not_fit_each_other() {
    for (name, changes, words) in [
        (
            "qwen3_moe",
            json!({ "num_experts_per_tok": 9 }),
            "num_experts_per_tok = 9, num_local_experts = 8: a token cannot go to more experts than there are",
        ),
        ("deepseek_v3", json!({ "n_group": 3 }), "n_group = 3, n_routed_experts = 16: groups must be of one size"),
        (
            "deepseek_v3",
            json!({ "topk_group": 5 }),
            "topk_group = 5, n_group = 4: no more groups can be kept than there are",
        ),
        (
            "deepseek_v3",
            json!({ "topk_group": 1, "num_experts_per_tok": 5 }),
            "num_experts_per_tok = 5, topk_group = 1, n_group = 4, n_routed_experts = 16: the groups that are kept have",
        ),
        ("deepseek_v3", json!({ "n_group": 0 }), "field n_group expected a number from 1 on, got 0"),
        ("deepseek_v3", json!({ "topk_group": 0 }), "field topk_group expected a number from 1 on, got 0"),
        (
            "phimoe",
            json!({ "num_experts_per_tok": 3 }),
            "field num_experts_per_tok expected 2, as a sparse mixer has two passes, got 3",
        ),
        ("qwen3_moe", json!({ "hidden_size": 0 }), "field hidden_size expected a number from 1 on, got 0"),
        ("qwen3_moe", json!({ "moe_intermediate_size": 0 }), "field moe_intermediate_size expected a number from 1 on"),
        ("qwen3_moe", json!({ "num_experts_per_tok": 0 }), "field num_experts_per_tok expected a number from 1 on"),
        ("qwen3_moe", json!({ "num_experts": 5000 }), "field num_experts expected at most 4096 experts, got 5000"),
        (
            "longcat_flash",
            json!({ "zero_expert_num": 4090 }),
            "n_routed_experts = 8, zero_expert_num = 4090: more than",
        ),
        (
            "inkling",
            json!({ "n_shared_experts": 4090 }),
            "n_routed_experts = 8, n_shared_experts = 4090: more than 4096",
        ),
    ] {
        let error = error(&golden(name, changes));
        assert!(error.contains("config.json: ") && error.contains(words), "{name}: {error}");
    }
}

/// Layers that are dense by config.json and have a router are no dense layers.
#[test]
fn experts_in_dense_layers() {
    for (name, changes, fields, tensor) in [
        ("qwen3_moe", json!({ "num_experts": 0 }), "num_experts = 0", "model.layers.1.mlp.gate.weight"),
        (
            "qwen3_moe",
            json!({ "mlp_only_layers": [0, 1] }),
            "decoder_sparse_step = 1, mlp_only_layers = [0,1]",
            "model.layers.1.mlp.gate.weight",
        ),
        (
            "deepseek_v3",
            json!({ "mlp_layer_types": null, "first_k_dense_replace": 5 }),
            "first_k_dense_replace = 5",
            "model.layers.1.mlp.gate.weight",
        ),
        (
            "exaone_moe",
            json!({ "mlp_layer_types": ["dense", "dense"] }),
            "mlp_layer_types[1] = \"dense\"",
            "model.layers.1.mlp.gate.weight",
        ),
        ("llama4", json!({ "moe_layers": [] }), "moe_layers = []", "model.layers.1.feed_forward.router.weight"),
    ] {
        let model = golden(name, changes);
        let error = error(&model);
        assert!(
            error.contains(&format!("layer 1 has no experts by {fields}, and the tensor {tensor} is there")),
            "{error}"
        );
        let summary = Checkpoint::open(model.path()).unwrap().inspect();
        let problem = summary.layers.iter().find(|layer| layer.index == 1).unwrap().problem.as_ref().unwrap();
        assert!(problem.contains(fields) && !summary.runs(), "{problem}");
    }
    // the rule of the family, where config.json says nothing
    let model = golden("exaone_moe", json!({ "mlp_layer_types": null, "first_k_dense_replace": null }));
    assert!(Checkpoint::open(model.path()).unwrap().layer(1).is_ok());
    let checkpoint = Checkpoint::open(golden("exaone_moe", json!({})).path()).unwrap();
    assert!(matches!(checkpoint.layer(0), Err(Error::DenseLayer { .. })));
}

/// Every size of config.json against every tensor that has it.
#[test]
fn sizes_that_are_not_those_of_the_tensors() {
    for (name, changes, words) in [
        ("qwen3_moe", json!({ "num_experts": 9 }), "gate.weight expected [9, 48], got [8, 48]"),
        ("qwen3_moe", json!({ "num_experts": 7 }), "gate.weight expected [7, 48], got [8, 48]"),
        ("qwen3_moe", json!({ "hidden_size": 40 }), "experts.0.down_proj.weight expected [40, 20], got [48, 20]"),
        ("qwen3_moe", json!({ "moe_intermediate_size": 21 }), "gate_proj.weight expected [21, 48], got [20, 48]"),
        ("qwen3_5_moe", json!({ "num_experts": 9 }), "experts.gate_up_proj expected [9, 40, 48], got [8, 40, 48]"),
        ("qwen3_5_moe", json!({ "hidden_size": 40 }), "experts.down_proj expected [8, 40, 20], got [8, 48, 20]"),
        ("qwen3_5_moe", json!({ "moe_intermediate_size": 21 }), "gate_up_proj expected [8, 42, 48], got [8, 40, 48]"),
        (
            "qwen3_5_moe",
            json!({ "shared_expert_intermediate_size": 29 }),
            "shared_expert.gate_proj.weight expected [29, 48], got [28, 48]",
        ),
        ("deepseek_v3", json!({ "n_shared_experts": 2 }), "gate_proj.weight expected [40, 48], got [20, 48]"),
        ("deepseek_v3", json!({ "n_routed_experts": 20 }), "gate.e_score_correction_bias expected [20], got [16]"),
        ("deepseek_v4_hash", json!({ "num_experts_per_tok": 4 }), "gate.tid2eid expected [128, 4], got [128, 3]"),
        ("gpt_oss", json!({ "intermediate_size": 21 }), "gate_up_proj_bias expected [8, 42], got [8, 40]"),
        ("dbrx", json!({ "d_model": 40 }), "experts.mlp.w1 expected [160, 40], got [160, 48]"),
    ] {
        let checkpoint = Checkpoint::open(golden(name, changes).path()).unwrap();
        let layer = if name == "deepseek_v4_hash" { 0 } else { 1 };
        let Error::Tensors { problems, .. } = checkpoint.layer(layer).unwrap_err() else { panic!("{name}") };
        let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
        assert!(problems.iter().any(|problem| problem.contains(words)), "{name}: {problems:#?}");
    }
}

/// What makes no sense is refused where it stands, and not where nothing reads it.
#[test]
fn numbers_that_make_no_sense() {
    let above = "a number above 0";
    for (name, field, values, expected) in [
        ("deepseek_v3", "routed_scaling_factor", [json!(0), json!(-1), json!(1e300)], above),
        ("deepseek_v3", "routed_scaling_factor", [json!("NaN"), json!("Infinity"), json!([])], above),
        ("minimax_m3_vl", "routed_scaling_factor", [json!(0.0), json!(-2.5), json!(1e39)], above),
        ("afmoe", "route_scale", [json!(0), json!(-1), json!("2")], above),
        ("gpt_oss", "swiglu_limit", [json!(0), json!(-7), json!(1e40)], above),
        ("step3p7", "moe_router_scaling_factor", [json!(0), json!(-1), json!("x")], above),
        ("dbrx", "ffn_config", [json!({ "moe_normalize_expert_weights": 0 }), json!(null), json!(null)], above),
        ("deepseek_v4", "swiglu_limit", [json!(-1), json!("inf"), json!(1e39)], "a number from 0 on"),
        ("gemma4", "rms_norm_eps", [json!(-1), json!(1e39), json!("x")], "a number from 0 on"),
        ("ernie4_5_moe", "moe_norm_min", [json!(-1), json!(1e39), json!({})], "a number from 0 on"),
        ("phimoe", "router_jitter_noise", [json!(-0.1), json!(1e39), json!("x")], "a number from 0 on"),
        ("switch_transformers", "expert_capacity", [json!(0), json!(0), json!(0)], "a number from 1 on"),
        ("switch_transformers", "expert_capacity", [json!(-3), json!(1.5), json!("6")], "a number from 0 on"),
    ] {
        for value in values.into_iter().filter(|value| !value.is_null()) {
            let ffn = field == "ffn_config";
            let change = if ffn { dbrx_ffn(&value) } else { json!({ field: value }) };
            let error = error(&golden(name, change));
            let field = if ffn { "moe_normalize_expert_weights" } else { field };
            // an empty list has no entry for the layer
            let said = error.contains(&format!("{field} expected {expected}, got "))
                || error.contains(&format!("field {field} expected an entry for every layer, got []"));
            assert!(said, "{name}, {value}: {error}");
        }
    }
    let block = block_of("nllb_moe_decoder");
    for (field, value, expected) in [
        ("moe_token_dropout", json!(1), "a number from 0 to less than 1"),
        ("moe_token_dropout", json!(1.5), "a number from 0 to less than 1"),
        ("moe_token_dropout", json!(-0.5), "a number from 0 to less than 1"),
        ("moe_eval_capacity_token_fraction", json!(1.01), "a number up to 1"),
        ("moe_eval_capacity_token_fraction", json!(1e300), "a number up to 1"),
    ] {
        let model = block.model();
        let config = crate::block::with(block.config.clone(), json!({ field: value }));
        std::fs::write(model.join("config.json"), config.to_string()).unwrap();
        let checkpoint = Checkpoint::open_part(model.path(), "decoder").unwrap();
        let error = checkpoint.layer(3).unwrap_err().to_string();
        assert!(error.contains(&format!("field {field} expected {expected}, got {value}")), "{error}");
    }
}

/// The golden's, with some of its fields changed.
fn dbrx_ffn(changes: &Value) -> Value {
    let config: Value = serde_json::from_slice(&std::fs::read(path("dbrx").join("config.json")).unwrap()).unwrap();
    json!({ "ffn_config": crate::block::with(config["ffn_config"].clone(), changes.clone()) })
}

/// Python writes numbers that JSON has not.
#[test]
fn numbers_that_are_no_json() {
    let open = |more: &str| {
        let text = config().to_string().replacen('{', &format!("{{{more},"), 1);
        let model = Model::new(&config(), &file(&tensors())).with("config.json", text.as_bytes());
        Checkpoint::open(model.path()).map(|checkpoint| checkpoint.layer(0).map(|_| ()).map_err(|e| e.to_string()))
    };
    for unused in [
        r#""time_step_limit": [0.0, Infinity]"#,
        r#""a":NaN,"b":-Infinity,"c":[NaN,{"d":Infinity}]"#,
        r#""NaN": "NaN \" Infinity \\", "Infinity": "\\\"NaN""#,
    ] {
        assert_eq!(open(unused).unwrap(), Ok(()), "{unused}");
    }
    for broken in [r#""a": nan"#, r#""a": +Infinity"#, r#""a": NaN NaN"#, r#""a": Infinit"#] {
        assert!(matches!(open(broken), Err(Error::Json { .. })), "{broken}");
    }
    let mut config = String::from_utf8(std::fs::read(path("deepseek_v3").join("config.json")).unwrap()).unwrap();
    config = config.replace("\"routed_scaling_factor\": 2.5", "\"routed_scaling_factor\": Infinity");
    let model = golden("deepseek_v3", json!({})).with("config.json", config.as_bytes());
    assert!(error(&model).contains("field routed_scaling_factor expected a number above 0, got \"Infinity\""));
}

/// Golden files with a tensor under another name, or without it.
fn renamed(name: &str, from: &str, to: &str) -> Error {
    let bytes = std::fs::read(path(name).join("model.safetensors")).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let renamed = header.as_object().unwrap().iter().map(|(name, info)| (name.replace(from, to), info.clone()));
    let header = Value::Object(renamed.collect()).to_string();
    let model =
        golden(name, json!({})).with("model.safetensors", &crate::common::model::raw(&header, &bytes[8 + length..]));
    Checkpoint::open(model.path()).unwrap().layer(1).unwrap_err()
}

/// What is missing is missing of the layout that the other tensors have, and the likest name is said.
#[test]
fn a_missing_tensor_of_the_nearest_layout() {
    for (name, from, to, missing, likest) in [
        ("qwen3_5_moe", "experts.down_proj", "experts.down", "experts.down_proj [8, 48, 20]", "experts.down"),
        (
            "qwen3_vl_moe",
            "experts.down_proj",
            "experts.proj_down",
            "experts.down_proj [8, 20, 48]",
            "experts.proj_down",
        ),
        ("deepseek_v4", "experts.3.w2", "experts.3.w_2", "experts.3.w2.weight [48, 20]", "experts.3.w_2.weight"),
        ("dbrx", "mlp.v1", "mlp.V1", "experts.mlp.v1 [160, 48]", "experts.mlp.V1"),
        ("gpt_oss", "router.weight", "router.weights", "mlp.router.weight [8, 48]", "mlp.router.weights"),
    ] {
        let error = renamed(name, from, to);
        let text = error.to_string();
        assert!(text.contains(&format!("{missing} is missing, the likest that is there is ")), "{text}");
        assert!(text.contains(likest), "{text}");
        let Error::Tensors { problems, .. } = error else { panic!("{text}") };
        let [TensorProblem::Missing { nearest: Some(nearest), .. }] = &problems[..] else { panic!("{text}") };
        assert!(nearest.ends_with(likest), "{nearest}");
    }
    // one that others have is no help
    let text = renamed("qwen3_moe", "layers.1.mlp.experts.3.up_proj", "layers.9.x").to_string();
    assert!(text.ends_with("experts.3.up_proj.weight [20, 48] is missing"), "{text}");
}

/// A layer of which nothing is there is looked for where the others are.
#[test]
fn a_missing_layer_is_named_like_its_neighbours() {
    let checkpoint = Checkpoint::open(path("deepseek_v4")).unwrap();
    assert!(checkpoint.layer(0).unwrap_err().to_string().contains("\n  layers.0.ffn.gate.weight [8, 48] is missing"));
    let checkpoint = Checkpoint::open(path("dbrx")).unwrap();
    let text = checkpoint.layer(0).unwrap_err().to_string();
    assert!(text.contains("\n  transformer.blocks.0.ffn.router.layer.weight [8, 48] is missing"), "{text}");
}
