//! Families that a layer cannot express: refused at the door, with what is missing.

use crate::common::model::{Model, file, tensors};
use fused_moe::checkpoint::{Checkpoint, Error};
use serde_json::{Value, json};

fn refuse(config: Value) -> String {
    let model = Model::new(&config, &file(&tensors()));
    match Checkpoint::open(model.path()).unwrap_err() {
        error @ Error::Unsupported { .. } => error.to_string(),
        other => panic!("{other}"),
    }
}

#[test]
fn what_is_missing_is_named() {
    for (model_type, missing) in [
        ("longcat_flash", "identity experts"),
        ("muse_spark", "latent projections"),
        ("inkling_mm_model", "scores together"),
        ("inkling2", "softcapped"),
        ("zaya", "carries its state"),
        ("switch_transformers", "capacity"),
        ("nllb_moe", "capacity"),
        ("nllb-moe", "capacity"),
        ("jetmoe", "a bias that is added once"),
        ("axk1", "post_mlp_layernorm"),
        ("gemma4_text", "a dense MLP beside the experts"),
        ("diffusion_gemma", "a dense MLP beside the experts"),
    ] {
        let flat = refuse(json!({ "model_type": model_type, "hidden_size": 4 }));
        assert!(flat.contains(&format!("layers of {model_type} have ")) && flat.contains(missing), "{flat}");
        let nested = refuse(json!({ "model_type": "new", "text_config": { "model_type": model_type } }));
        assert!(nested.contains(missing), "{nested}");
    }
}

#[test]
fn a_field_that_asks_for_what_is_missing() {
    let config =
        |latent| json!({ "model_type": "nemotron_h", "layers_block_type": ["moe"], "moe_latent_size": latent });
    assert!(refuse(config(json!(16))).contains("latent projections"));
    for absent in [json!(null), json!(0)] {
        let model = Model::new(&config(absent), &file(&tensors()));
        assert_eq!(Checkpoint::open(model.path()).unwrap().layers(), [0]);
    }
}
