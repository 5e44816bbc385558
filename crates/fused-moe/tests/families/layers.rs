//! Which layers have experts, and how wide they are, as config.json says it.

use crate::block::{Row, with};
use crate::common::model::{Model, file};
use crate::common::path;
use crate::parts::{block_of, rows_of};
use fused_moe::checkpoint::Checkpoint;
use fused_moe::config::Normalize;
use serde_json::{Value, json};

/// The layers with experts of six, none of which is stored, or the error.
fn layers(family: &str, part: &str, more: Value) -> Result<Vec<usize>, String> {
    let base = json!({ "model_type": family, "num_hidden_layers": 6, "hidden_size": 4, "num_experts": 2 });
    let model = Model::new(&with(base, more), &file(&[("embed_tokens.weight".into(), vec![2, 4])]));
    let checkpoint =
        if part.is_empty() { Checkpoint::open(model.path()) } else { Checkpoint::open_part(model.path(), part) };
    checkpoint.map(|checkpoint| checkpoint.layers().to_vec()).map_err(|error| error.to_string())
}

#[test]
fn which_layers_have_experts() {
    let all = vec![0, 1, 2, 3, 4, 5];
    for (family, more, wanted) in [
        ("diffusion_gemma", json!({}), all.clone()),
        ("diffusion_gemma", json!({ "enable_moe_block": false }), vec![]),
        ("gemma4", json!({}), vec![]),
        ("inkling", json!({ "dense_mlp_idx": 4 }), vec![4, 5]),
        ("inkling", json!({ "dense_mlp_idx": 4, "mlp_layer_types": (["dense", "sparse"].repeat(3)) }), vec![1, 3, 5]),
        ("inkling", json!({}), all.clone()),
        ("minimax_m3_vl", json!({ "moe_layer_freq": [0, 0, 1, 0, 1, 1] }), vec![2, 4, 5]),
        ("minimax_m3_vl", json!({}), all.clone()),
        ("dots3_note", json!({ "moe_layer_freq": [1, 0, 0, 1, 0, 0] }), vec![0, 3]),
        ("dots3_note", json!({ "moe_layer_freq": 2 }), vec![2, 4]),
        ("dots3_note", json!({ "moe_layer_freq": 2, "first_k_dense_replace": 3 }), vec![4]),
        ("dots3_note", json!({}), vec![1, 2, 3, 4, 5]),
        ("step3p7", json!({ "moe_layers_enum": "1,4, 5," }), vec![1, 4, 5]),
        ("step3p7", json!({ "moe_layers_enum": [0, 2] }), vec![0, 2]),
        ("step3p7", json!({}), vec![3, 4, 5]),
        ("axk1", json!({}), vec![1, 2, 3, 4, 5]),
        ("axk1", json!({ "first_k_dense_replace": 0 }), all.clone()),
        ("exaone_moe", json!({}), vec![1, 2, 3, 4, 5]),
        ("mimo_v2_flash", json!({ "moe_layer_freq": [0, 1, 1, 0, 1, 1] }), vec![1, 2, 4, 5]),
        ("kolibri1", json!({ "first_k_dense_replace": 2 }), vec![2, 3, 4, 5]),
        ("llama4", json!({ "moe_layers": [] }), vec![]),
        ("flint", json!({}), vec![2, 3, 4, 5]),
        ("flint", json!({ "decoder_sparse_step": 2 }), vec![3, 5]),
        ("flint", json!({ "decoder_sparse_step": 2, "mlp_only_layers": [3] }), vec![1, 5]),
    ] {
        assert_eq!(layers(family, "", more.clone()).unwrap(), wanted, "{family} {more}");
    }
}

/// Where config.json says nothing, a layer that is mostly dense has experts if they are there.
#[test]
fn a_first_layer_with_a_router() {
    let mut row = rows_of("hy_v3").remove(0);
    row.config["mlp_layer_types"] = json!(null);
    (row.block, row.moe) = ("model.layers.0.mlp", &[0]);
    row.correction = Some(("model.layers.0.mlp.expert_bias", 1));
    let model = Model::new(&row.config, &Row::file_of(&[&row]));
    let checkpoint = Checkpoint::open(model.path()).unwrap();
    assert_eq!(checkpoint.layers(), [0, 1]);
    assert_eq!(checkpoint.layer(0).unwrap().name, "model.layers.0.mlp");
    std::fs::write(model.join("config.json"), with(row.config, json!({ "first_k_dense_replace": 1 })).to_string())
        .unwrap();
    let error = Checkpoint::open(model.path()).unwrap().layer(0).unwrap_err().to_string();
    assert!(error.contains("layer 0 has no experts by first_k_dense_replace = 1, and the tensor"), "{error}");
}

/// A step of 0 is a stack without experts where a model is trained so, and an error elsewhere.
#[test]
fn steps_of_no_layer() {
    for (family, sizes) in [
        ("switch_transformers", json!({ "num_layers": 6, "num_decoder_layers": 6 })),
        ("nllb_moe", json!({ "encoder_layers": 6, "decoder_layers": 6 })),
    ] {
        let steps = |encoder, decoder| {
            let steps = json!({ "encoder_sparse_step": encoder, "decoder_sparse_step": decoder });
            ["encoder", "decoder"]
                .map(|stack| layers(family, &format!("{family}_{stack}"), with(sizes.clone(), steps.clone())).unwrap())
        };
        let third = if family == "nllb_moe" { vec![2, 5] } else { vec![1, 4] };
        assert_eq!(steps(0, 3), [vec![], third.clone()], "{family}");
        assert_eq!(steps(3, 0), [third, vec![]], "{family}");
    }
    let error = layers("flint", "", json!({ "decoder_sparse_step": 0 })).unwrap_err();
    assert!(error.contains("field decoder_sparse_step expected a number from 1 on, got 0"), "{error}");
}

#[test]
fn layer_maps_that_are_none() {
    for (family, more, words) in [
        (
            "minimax_m3_vl",
            json!({ "moe_layer_freq": [0, 1] }),
            "field moe_layer_freq expected an entry for every layer, got [0,1]",
        ),
        (
            "minimax_m3_vl",
            json!({ "moe_layer_freq": [true] }),
            "moe_layer_freq[0] expected a number from 0 on, got true",
        ),
        (
            "step3p7",
            json!({ "moe_layers_enum": "3-5" }),
            "moe_layers_enum expected a list of layer numbers, got \"3-5\"",
        ),
        // of its other count, a layer has two
        ("longcat_flash", json!({}), "field num_layers is missing"),
    ] {
        let error = layers(family, "", more).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
}

/// Beside a dense width, the plain one is that of the experts.
#[test]
fn widths_of_inkling() {
    let text = std::fs::read(path("inkling").join("config.json")).unwrap();
    let golden: Value = serde_json::from_slice(&text).unwrap();
    let bytes = std::fs::read(path("inkling").join("model.safetensors")).unwrap();
    let width = |widths: Value| {
        let mut config = golden.clone();
        config["text_config"] = with(config["text_config"].clone(), widths);
        let model = Model::new(&config, &bytes);
        let checkpoint = Checkpoint::open(model.path()).unwrap();
        checkpoint.layer(1).map(|layer| layer.config.intermediate).map_err(|error| error.to_string())
    };
    let widths = |dense: Value, plain: u64, moe: Value| {
        width(json!({ "dense_intermediate_size": dense, "intermediate_size": plain, "moe_intermediate_size": moe }))
    };
    assert_eq!(widths(json!(33), 20, json!(7)), Ok(20));
    assert_eq!(widths(json!(33), 20, json!(null)), Ok(20));
    assert_eq!(widths(json!(null), 33, json!(20)), Ok(20));
    assert_eq!(widths(json!(null), 20, json!(null)), Ok(20));
    assert!(widths(json!(33), 7, json!(20)).unwrap_err().contains("w13_weight expected [8, 14, 48], got [8, 40, 48]"));
}

/// Where no dense layer has the shorter name, the experts may.
#[test]
fn other_names_of_fields() {
    let renamed = |config: &Value, names: &[(&str, &str)]| {
        let mut config = config.clone();
        for (from, to) in names {
            let value = config.as_object_mut().unwrap().remove(*from).unwrap();
            config[*to] = value;
        }
        config
    };
    for family in ["beam", "flint", "kolibri1", "laguna"] {
        let row = rows_of(family).remove(0);
        let config = renamed(
            &row.config,
            &[("moe_intermediate_size", "intermediate_size"), ("num_experts_per_tok", "moe_top_k")],
        );
        let model = Model::new(&config, &Row::file_of(&[&row]));
        let layer = *row.moe.last().unwrap();
        let checkpoint = Checkpoint::open(model.path()).unwrap();
        let config = checkpoint.layer(layer).unwrap_or_else(|error| panic!("{family}: {error}")).config;
        assert_eq!((config.intermediate, config.top_k), (6, 3), "{family}");
    }
    let block = block_of("zaya");
    let names = [("moe_intermediate_size", "intermediate_size"), ("rms_norm_eps", "norm_epsilon")];
    let model = block.model();
    std::fs::write(model.join("config.json"), renamed(&block.config, &names).to_string()).unwrap();
    let config = Checkpoint::open(model.path()).unwrap().layer(1).unwrap().config;
    assert_eq!((config.intermediate, config.router_mlp.unwrap().eps), (6, 0.04));

    // of two names of a shared width, that of the family's own
    let row = rows_of("dots3_note").remove(0);
    let config = with(row.config.clone(), json!({ "moe_shared_expert_intermediate_size": 99 }));
    let checkpoint = Checkpoint::open(Model::new(&config, &Row::file_of(&[&row])).path()).unwrap();
    assert_eq!(checkpoint.layer(1).unwrap().config.shared.unwrap().intermediate, 10);
}

/// The exponent of dbrx's norm of weights.
#[test]
fn norms_of_weights() {
    let text = std::fs::read(path("dbrx").join("config.json")).unwrap();
    let bytes = std::fs::read(path("dbrx").join("model.safetensors")).unwrap();
    for (p, normalize) in [(json!(2.0), Normalize::Lp { p: 2.0 }), (json!(null), Normalize::None)] {
        let mut config: Value = serde_json::from_slice(&text).unwrap();
        config["ffn_config"]["moe_normalize_expert_weights"] = p;
        let model = Model::new(&config, &bytes);
        let checkpoint = Checkpoint::open(model.path()).unwrap();
        assert_eq!(checkpoint.layer(1).unwrap().config.routing.weights.normalize, normalize);
    }
}
