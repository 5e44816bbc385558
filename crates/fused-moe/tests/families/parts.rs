//! Several language models in one directory, and other ways to say the same.

use crate::block::{Row, with};
use crate::common::model::{Model, file, tensors};
use crate::common::{Extra, path, specified};
use crate::disk::Block;
use crate::{blocks, rows};
use fused_moe::checkpoint::{Checkpoint, Error, known_model_types};
use fused_moe::config::Selection;
use serde_json::{Value, json};

pub(crate) fn rows_of(family: &str) -> Vec<Row> {
    rows().into_iter().filter(|row| row.family == family).collect()
}

#[test]
fn thinker_and_talker() {
    let (thinker, talker) = (&rows_of("qwen3_omni_moe")[0], &rows_of("qwen3_omni_moe_talker")[0]);
    let model = Model::new(&thinker.config, &Row::file_of(&[thinker, talker]));
    let checkpoint = Checkpoint::open(model.path()).unwrap();
    assert_eq!(checkpoint.parts(), ["qwen3_omni_moe", "qwen3_omni_moe_talker"]);
    let first = checkpoint.inspect();
    assert_eq!((first.family, first.parts.len()), ("qwen3_omni_moe", 2));
    assert!(checkpoint.layer(1).unwrap().config.shared.is_none());

    let talking = Checkpoint::open_part(model.path(), "qwen3_omni_moe_talker").unwrap();
    assert_eq!(talking.layers(), [1]);
    let layer = talking.layer(1).unwrap();
    assert!(layer.name == "talker.model.layers.1.mlp" && layer.config.shared.unwrap().gated);
    for (word, family) in [("thinker", "qwen3_omni_moe"), ("talker", "qwen3_omni_moe_talker")] {
        assert_eq!(Checkpoint::open_part(model.path(), word).unwrap().inspect().family, family);
    }
    let error = Checkpoint::open_part(model.path(), "singer").unwrap_err();
    assert!(matches!(&error, Error::NoSuchPart { .. }));
    assert!(error.to_string().ends_with("no part singer; it has qwen3_omni_moe, qwen3_omni_moe_talker"), "{error}");

    // one that is not stored need not be described well
    let mut config = talker.config.clone();
    config["thinker_config"]["text_config"]["num_hidden_layers"] = json!(-1);
    let model = Model::new(&config, &Row::file_of(&[talker]));
    assert_eq!(Checkpoint::open(model.path()).unwrap().inspect().family, "qwen3_omni_moe_talker");
}

/// A language model without a type of its own is what the whole is.
#[test]
fn an_inner_config_without_a_type() {
    let row = &rows_of("glm4v_moe")[0];
    let mut config = row.config.clone();
    config["text_config"]["model_type"] = json!(null);
    let model = Model::new(&config, &Row::file_of(&[row]));
    assert_eq!(Checkpoint::open(model.path()).unwrap().layer(1).unwrap().config.experts, 8);
}

/// What is no description of a language model is passed over.
#[test]
fn an_inner_config_that_is_none() {
    for inner in [json!(null), json!([1]), json!(3), json!("text"), json!({}), json!({ "model_type": null })] {
        let mut config = rows_of("kolibri1")[0].config.clone();
        for key in ["text_config", "thinker_config", "language_config"] {
            config[key] = inner.clone();
        }
        let model = Model::new(&config, &Row::file_of(&[&rows_of("kolibri1")[0]]));
        assert!(Checkpoint::open(model.path()).unwrap().layer(1).is_ok(), "{inner}");
    }
    let config = json!({ "model_type": "mixtral", "text_config": { "model_type": 3 } });
    let error = Checkpoint::open(Model::new(&config, &file(&tensors())).path()).unwrap_err();
    assert!(error.to_string().ends_with("field model_type expected a text, got 3"), "{error}");
}

#[test]
fn no_experts_no_layers() {
    let mut config = rows_of("granitemoehybrid")[0].config.clone();
    config["num_local_experts"] = json!(0);
    let model = Model::new(&config, &file(&tensors()));
    let checkpoint = Checkpoint::open(model.path()).unwrap();
    assert!(checkpoint.layers().is_empty());
    assert!(matches!(checkpoint.layer(0), Err(Error::DenseLayer { .. })));
    assert!(!checkpoint.inspect().runs());
}

/// A shared expert that nothing asks for is not left out in silence.
#[test]
fn a_shared_expert_that_config_does_not_have() {
    for row in rows_of("deepseek_v32").iter().chain(&rows_of("granitemoehybrid")[1..]) {
        for value in [json!(null), json!(0)] {
            let mut config = row.config.clone();
            let field = row.fields[4].trim_start_matches('/');
            config[field] = value.clone();
            let model = Model::new(&config, &Row::file_of(&[row]));
            let error = Checkpoint::open(model.path()).unwrap().layer(1).unwrap_err().to_string();
            assert!(error.contains(" is absent or 0") && error.contains(field), "{error}");
        }
    }
}

#[test]
fn a_required_flag() {
    let row = &rows_of("flint")[0];
    let mut config = row.config.clone();
    config["norm_topk_prob"] = json!(null);
    let model = Model::new(&config, &Row::file_of(&[row]));
    let error = Checkpoint::open(model.path()).unwrap().layer(2).unwrap_err().to_string();
    assert!(error.contains("field norm_topk_prob or moe_renormalize is missing"), "{error}");
}

/// The golden's model with another config.json, and with 16 bytes of another table.
fn hash(change: impl Fn(&mut Value), table: Option<[i64; 2]>) -> Result<Checkpoint, Error> {
    let text = std::fs::read(path("deepseek_v4_hash").join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&text).unwrap();
    change(&mut config);
    let mut bytes = std::fs::read(path("deepseek_v4_hash").join("model.safetensors")).unwrap();
    if let Some(entries) = table {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        let start = header["layers.0.ffn.gate.tid2eid"]["data_offsets"][0].as_u64().unwrap() as usize + 8 + length;
        // row 5 of three
        let entries = entries.map(i64::to_le_bytes).concat();
        bytes[start + 15 * 8..start + 17 * 8].copy_from_slice(&entries);
    }
    Checkpoint::open(Model::new(&config, &bytes).path())
}

#[test]
fn experts_by_token_id() {
    let layer_error = |checkpoint: Checkpoint| checkpoint.layer(0).unwrap_err().to_string();
    let checkpoint = hash(|_| {}, None).unwrap();
    let layer = checkpoint.layer(0).unwrap();
    assert_eq!(layer.config.routing.selection, Selection::Table);
    assert_eq!(layer.weights.table.as_ref().unwrap().vocabulary, 128);
    let out = specified(&layer, &[0.5; 48], Extra { token_ids: Some(&[7]), ..Extra::default() });
    assert_eq!(out.routes.experts, layer.weights.table.as_ref().unwrap().experts[21..24]);

    for (table, entry) in [([0, 8], "expert 8"), ([-1, 0], "expert -1"), ([i64::MIN, 9], "expert -9223372036854775808")]
    {
        let error = layer_error(hash(|_| {}, Some(table)).unwrap());
        assert!(error.contains(&format!("names {entry} in row 5, expected one of 0 to 7")), "{error}");
    }
    let error = layer_error(hash(|config| config["vocab_size"] = json!(129), None).unwrap());
    assert!(error.contains("tid2eid expected [129, 3], got [128, 3]"), "{error}");
    let error = layer_error(hash(|config| config["num_experts_per_tok"] = json!(2), None).unwrap());
    assert!(error.contains("tid2eid expected [128, 2], got [128, 3]"), "{error}");
    // older files count the layers
    let older = hash(
        |config| {
            config["mlp_layer_types"] = json!(null);
            config["num_hash_layers"] = json!(1);
        },
        None,
    );
    assert_eq!(older.unwrap().layer(0).unwrap().config.routing.selection, Selection::Table);
    let plain = hash(|config| config["mlp_layer_types"] = json!(["moe", "moe"]), None).unwrap();
    assert!(layer_error(plain).contains("gate.bias [8] is missing"));
}

pub(crate) fn block_of(family: &str) -> Block {
    blocks().into_iter().find(|block| block.family == family).unwrap()
}

/// Both stacks of a model lie in one file: the one that writes comes first.
#[test]
fn encoder_and_decoder() {
    let checkpoint = Checkpoint::open(path("switch_transformers")).unwrap();
    assert_eq!(checkpoint.parts(), ["switch_transformers_decoder", "switch_transformers_encoder"]);
    assert_eq!(checkpoint.layer(1).unwrap().name, "decoder.block.1.layer.2.mlp");
    let encoder = Checkpoint::open_part(path("switch_transformers"), "switch_transformers_encoder").unwrap();
    assert_eq!(encoder.layer(1).unwrap().name, "encoder.block.1.layer.1.mlp");
    for word in ["encoder", "decoder"] {
        let part = Checkpoint::open_part(path("switch_transformers"), word).unwrap().inspect().family;
        assert_eq!(part, format!("switch_transformers_{word}"));
    }
    // what both are called is neither
    for word in ["coder", "transformers", "", "_encoder"] {
        assert!(matches!(Checkpoint::open_part(path("switch_transformers"), word), Err(Error::NoSuchPart { .. })));
    }

    let known: Vec<&str> = known_model_types().collect();
    for name in ["switch_transformers", "nllb_moe", "nllb-moe"] {
        assert_eq!(known.iter().filter(|known| **known == name).count(), 1);
    }
}

/// The family decides which norms there are, not what happens to be stored.
#[test]
fn a_norm_of_another_family() {
    let block = block_of("axk1");
    let model = block.model();
    let has_norm = |family: &str| {
        std::fs::write(
            model.join("config.json"),
            with(block.config.clone(), json!({ "model_type": family })).to_string(),
        )
        .unwrap();
        Checkpoint::open(model.path()).unwrap().layer(1).unwrap().config.norms.out.is_some()
    };
    assert_eq!(["axk1", "axk2"].map(has_norm), [true, false]);
}

/// Random choices cannot be held to anything.
#[test]
fn a_second_expert_by_chance() {
    let block = block_of("nllb_moe_decoder");
    let model = block.model();
    let mut config = block.config.clone();
    config["second_expert_policy"] = json!("sampling");
    std::fs::write(model.join("config.json"), config.to_string()).unwrap();
    let error = Checkpoint::open(model.path()).unwrap().layer(3).unwrap_err().to_string();
    assert!(error.contains("field second_expert_policy expected all, got \"sampling\""), "{error}");
}

/// What config.json asks for and the layer does not have is no layer without it.
#[test]
fn biases_that_are_not_read() {
    let with_bias = |name: &str, field: &str, value: Value| {
        let text = std::fs::read(path(name).join("config.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&text).unwrap();
        config[field] = value;
        let model = Model::new(&config, &std::fs::read(path(name).join("model.safetensors")).unwrap());
        let checkpoint = Checkpoint::open(model.path()).unwrap();
        checkpoint.layer(1).map(|_| ()).map_err(|error| error.to_string())
    };
    for (name, field) in [("nemotron_h_latent", "mlp_bias"), ("ernie4_5_moe", "use_bias")] {
        let with_bias = |value| with_bias(name, field, value);
        assert_eq!((with_bias(json!(false)), with_bias(json!(null))), (Ok(()), Ok(())));
        let error = with_bias(json!(true)).unwrap_err();
        let words = format!("field {field} expected false, as biases of experts are not read, got true");
        assert!(error.contains(&words), "{error}");
    }
}

/// What config.json does not ask for is not left out in silence.
#[test]
fn tensors_that_nothing_asks_for() {
    let golden = |name: &str, pointer: &str, value: Value| {
        let text = std::fs::read(path(name).join("config.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&text).unwrap();
        *config.pointer_mut(pointer).unwrap() = value;
        let model = Model::new(&config, &std::fs::read(path(name).join("model.safetensors")).unwrap());
        Checkpoint::open(model.path()).unwrap().layer(1).unwrap_err().to_string()
    };
    let error = golden("nemotron_h_latent", "/moe_latent_size", json!(null));
    assert!(
        error.contains("fc1_latent_proj.weight is there, and moe_latent_size of config.json is absent or 0"),
        "{error}"
    );
    let error = golden("inkling", "/text_config/n_shared_experts", json!(0));
    assert!(error.contains("mlp.shared_experts.shared_w2_weight is there, and n_shared_experts of"), "{error}");
    assert!(error.contains("gate.weight expected [8, 48], got [10, 48]"), "{error}");
    let error = golden("longcat_flash", "/zero_expert_num", json!(3));
    assert!(error.contains("classifier.weight expected [11, 48], got [12, 48]"), "{error}");
    assert!(error.contains("e_score_correction_bias expected [11], got [12]"), "{error}");
}

/// The factor on all weights is read when the layer is.
#[test]
fn a_factor_in_a_tensor() {
    let bytes = std::fs::read(path("inkling").join("model.safetensors")).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let name = "model.llm.layers.1.mlp.gate.global_scale";
    let start = header[name]["data_offsets"][0].as_u64().unwrap() as usize + 8 + length;
    let config = serde_json::from_slice(&std::fs::read(path("inkling").join("config.json")).unwrap()).unwrap();
    let scale = |factor: f32| {
        let mut bytes = bytes.clone();
        bytes[start..start + 4].copy_from_slice(&factor.to_le_bytes());
        let model = Model::new(&config, &bytes);
        let checkpoint = Checkpoint::open(model.path()).unwrap();
        checkpoint.layer(1).map(|layer| layer.config.routing.weights.scale)
    };
    assert_eq!(scale(0.25).unwrap(), 2.0);
    let error = scale(f32::INFINITY).unwrap_err().to_string();
    assert!(error.contains(&format!("{name} expected a finite number, got inf")), "{error}");

    // inkling2 need not have it
    let mut block = block_of("inkling2");
    let scale = |block: &Block| {
        let model = block.model();
        Checkpoint::open(model.path()).unwrap().layer(1).unwrap().config.routing.weights.scale
    };
    assert_eq!(scale(&block), 2.0);
    block.tensors.push(("gate.global_scale".into(), vec![1], [0.5, 0.5]));
    assert_eq!(scale(&block), 1.0);
}

/// One norm is that of every expert: a row for each of them is not left out in silence.
#[test]
fn a_norm_of_each_expert() {
    let mut block = block_of("muse_spark");
    let norm = block.tensors.iter_mut().find(|(name, ..)| name == "experts.post_expert_norm.weight").unwrap();
    norm.1 = vec![8, 5];
    let model = block.model();
    let error = Checkpoint::open(model.path()).unwrap().layer(1).unwrap_err().to_string();
    assert!(error.contains("experts.post_expert_norm.weight expected [5], got [8, 5]"), "{error}");
}
