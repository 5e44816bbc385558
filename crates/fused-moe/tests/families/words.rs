//! What is said of a layer.

use crate::block::{Row, with};
use crate::common::model::Model;
use crate::common::{goldens, path};
use crate::parts::{block_of, rows_of};
use crate::{blocks, rows};
use fused_moe::checkpoint::{Checkpoint, LayerKind, Summary};
use serde_json::{Value, json};

fn golden(name: &str) -> Summary {
    Checkpoint::open(path(name)).unwrap().inspect()
}

fn of_row(row: &Row) -> Summary {
    Checkpoint::open(Model::new(&row.config, &Row::file_of(&[row])).path()).unwrap().inspect()
}

fn made(family: &str) -> Summary {
    Checkpoint::open_part(block_of(family).model().path(), family).unwrap().inspect()
}

fn first(summary: Summary) -> LayerKind {
    summary.kinds.into_iter().next().unwrap()
}

/// A golden with a field of its config.json changed.
fn changed(name: &str, pointer: &str, value: Value) -> Summary {
    let text = std::fs::read(path(name).join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&text).unwrap();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    config.pointer_mut(parent).unwrap()[key] = value;
    let model = Model::new(&config, &std::fs::read(path(name).join("model.safetensors")).unwrap());
    Checkpoint::open(model.path()).unwrap().inspect()
}

/// One sentence that can be read at a glance, and the rest in phrases.
#[test]
fn every_layer_in_words() {
    let made =
        blocks().into_iter().map(|block| Checkpoint::open_part(block.model().path(), block.family).unwrap().inspect());
    let summaries: Vec<Summary> =
        goldens().iter().map(|name| golden(name)).chain(rows().iter().map(of_row)).chain(made).collect();
    for Summary { family, kinds, beside, .. } in &summaries {
        assert_eq!(kinds.len(), 1, "{family}");
        for LayerKind { routing, router, activation, biases, shared, around, .. } in kinds {
            println!("{family}\n  routing: {routing}");
            let others = [("biases", biases), ("router", router), ("shared", shared), ("around", around)];
            println!("  activation: {activation}");
            others
                .iter()
                .filter_map(|(name, text)| Some((name, text.as_ref()?)))
                .for_each(|(n, t)| println!("  {n}: {t}"));
            beside.iter().for_each(|beside| println!("  beside: {beside}"));
            assert!(routing.starts_with("Each token goes to the ") && routing.ends_with('.'), "{routing}");
            assert!(routing.len() < 300, "{family}: {}: {routing}", routing.len());
            assert!(routing.matches('.').count() < 4, "{routing}");
            for phrase in others.into_iter().filter_map(|(_, text)| text.as_ref()) {
                assert!(!phrase.ends_with('.') && phrase.len() < 160, "{family}: {phrase}");
            }
        }
    }
}

#[test]
fn where_a_token_goes() {
    for (summary, words) in [
        (
            golden("mixtral"),
            "2 of 8 experts with the largest softmax score, weighted by their softmax scores divided by their sum.",
        ),
        (golden("deepseek_v3"), "sigmoid score plus a correction bias within the best 2 of 4 groups"),
        (golden("deepseek_v3"), "divided by their sum (plus 1e-20) times 2.5."),
        (golden("deepseek_v2_group"), "groups by their best, the others counting as zero, weighted by"),
        (golden("deepseek_v2_group"), " times 16."),
        (golden("gpt_oss"), "with the largest router logit, weighted by the softmax over the chosen logits."),
        (
            golden("llama4"),
            "the one of 8 experts with the largest router logit, its input weighted by its sigmoid score.",
        ),
        (golden("phimoe"), "a sparse mixer with jitter 0.3 finds in two passes"),
        (
            golden("longcat_flash"),
            "the 4 of 12 (8 experts and 4 that return the token itself) with the largest softmax score plus",
        ),
        (
            golden("inkling"),
            "the 3 of 8 experts with the largest sigmoid score plus a correction bias and always to 2 more,",
        ),
        (golden("inkling"), "times 8 times a factor of the layer, gate.global_scale."),
        (golden("gemma4"), " divided by their sum times a factor of each expert."),
        (
            golden("deepseek_v4_hash"),
            "the 3 of 8 experts that a table has for its token id, weighted by their sqrt(softplus)",
        ),
        (
            golden("switch_transformers"),
            ", an expert taking at most 6 slots of a sequence, the first ones, the others adding nothing.",
        ),
        (golden("cohere2_moe"), "weighted by the softmax over the chosen logits times 0.5."),
        (of_row(&rows_of("laguna")[0]), " divided by their sum times 2.5."),
        (
            of_row(&rows_of("kolibri1")[0]),
            "the largest router logit plus a correction bias, weighted by their sigmoid scores.",
        ),
        (of_row(&rows_of("openai_privacy_filter")[0]), "softmax over the chosen logits times 0.33"),
        (
            made("zaya"),
            "the one of 9 (8 experts and 1 that returns zero) with the largest softmax score plus a correction bias, weighted",
        ),
        (made("zaya"), " by its softmax score or, where that returns zero, by 0."),
        (made("inkling2"), " times 2 times a factor of the layer, gate.global_scale, if it has one."),
        (
            made("nllb_moe_decoder"),
            "an expert taking at most 0.2 times as many slots as a call has tokens, rounded up, the first ones,",
        ),
        (made("nllb_moe_decoder"), "the others adding nothing, the weights of those that stay divided by their sum."),
    ] {
        let text = first(summary).routing;
        assert!(text.contains(words), "{text}");
    }
    let block = block_of("nllb_moe_decoder");
    let model = block.model();
    let config = with(block.config, json!({ "moe_eval_capacity_token_fraction": 1.0 }));
    std::fs::write(model.join("config.json"), config.to_string()).unwrap();
    let text = first(Checkpoint::open(model.path()).unwrap().inspect()).routing;
    assert!(text.contains("at most as many slots as a call has tokens, the first ones"), "{text}");
}

#[test]
fn what_is_more_than_routes() {
    type Phrase = fn(LayerKind) -> Option<String>;
    let (router, biases): (Phrase, Phrase) = (|kind| kind.router, |kind| kind.biases);
    let (shared, around): (Phrase, Phrase) = (|kind| kind.shared, |kind| kind.around);
    for (summary, of, words) in [
        (
            golden("gemma4"),
            router,
            "reads the token through an RMSNorm with a factor for each channel, logits times 0.14433756",
        ),
        (golden("gpt_oss"), router, "logits plus a bias"),
        (of_row(&rows_of("laguna")[0]), router, "logits capped at 1.5 by tanh"),
        (made("muse_spark"), router, "logits times 0.4"),
        (made("zaya"), router, "layers of its own of width 7, whose state goes on to the router of the next block"),
        (golden("gpt_oss"), biases, "of every expert: gate, up, down"),
        (golden("jetmoe"), biases, "one, added to the sum of the experts"),
        (made("nllb_moe_decoder"), biases, "of every expert: up, down"),
        (
            golden("qwen2_moe"),
            shared,
            "every token goes to one of width 28: silu(gate) * up, times a sigmoid gate of its own",
        ),
        (golden("cohere2_moe"), shared, "every token goes to one of width 20: silu(gate) * up, times 0.5"),
        (golden("gemma4"), shared, "every token goes to one of width 28: gelu_tanh(gate) * up"),
        (golden("step3p7"), shared, "every token goes to one of width 28: min(silu(gate), 0.7) * clamp(up, -0.7, 0.7)"),
        (of_row(&rows_of("hy_v4")[0]), shared, "every token goes to one of width 12: silu(gate) * up"),
        (golden("nemotron_h_latent"), around, "the experts work in a width of 16 between two projections"),
        (
            golden("gemma4"),
            around,
            "norms before the experts, behind their sum, before the shared expert, behind it and behind everything",
        ),
        (made("axk1"), around, "a norm behind everything"),
        (
            made("muse_spark"),
            around,
            "the experts work in a width of 5 between two projections; norms before the experts and behind each expert",
        ),
    ] {
        assert_eq!(of(first(summary)).as_deref(), Some(words));
    }
    let LayerKind { router, biases, shared, around, .. } = first(golden("mixtral"));
    assert_eq!([router, biases, shared, around], [None, None, None, None]);
    for (name, formula) in [
        ("mixtral", "silu(gate) * up"),
        ("gpt_oss", "(clamp(up, -1.5, 1.5) + 1) * min(gate, 1.5) * sigmoid(1.702 * min(gate, 1.5))"),
        ("step3p7", "min(silu(gate), 0.5) * clamp(up, -0.5, 0.5)"),
    ] {
        assert_eq!(first(golden(name)).activation, formula);
    }
    let sizes = first(golden("nemotron_h_latent")).sizes;
    assert_eq!((sizes.hidden, sizes.latent), (48, Some(16)));
    // a bias of the sum is there once
    assert_eq!(golden("jetmoe").parameters, 8 * 48 + 8 * 3 * 20 * 48 + 48);
}

#[test]
fn what_is_beside_the_layer() {
    for (summary, words) in [
        (golden("gemma4"), "layer_scalar"),
        (golden("jetmoe"), "self_attention"),
        (golden("longcat_flash"), "mlps.0"),
        (golden("granitemoe"), "residual_multiplier"),
        (golden("cohere2_moe"), "x + attention(x) + y"),
        (of_row(&rows_of("minimax")[0]), "mlp_alpha_factor * x + mlp_beta_factor * y"),
        (of_row(&rows_of("qwen4_exp")[0]), "hyper-connections"),
        (of_row(&rows_of("ernie4_5_vl_moe")[0]), "image tokens"),
    ] {
        let beside = summary.beside.unwrap();
        assert!(beside.contains(words), "{beside}");
    }
    assert_eq!(golden("mixtral").beside, None);
}

/// Layers of one kind are described once, with their numbers; what their tensors hold makes no kind.
#[test]
fn kinds_of_layers() {
    let kinds = |summary: Summary| -> Vec<(Vec<usize>, String, String)> {
        summary.kinds.into_iter().map(|kind| (kind.layers, kind.routing, kind.activation)).collect()
    };
    // layer 1 again under other numbers
    let copies = |name: &str, layers: usize, change: &dyn Fn(&mut Value)| {
        let text = std::fs::read(path(name).join("config.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&text).unwrap();
        change(&mut config);
        let bytes = std::fs::read(path(name).join("model.safetensors")).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        let (mut data, mut copied) = (Vec::new(), serde_json::Map::new());
        for layer in 0..layers {
            for (tensor, info) in header.as_object().unwrap().iter().filter(|(name, _)| name.contains("layers.1.")) {
                let [start, end] = [0, 1].map(|i| info["data_offsets"][i].as_u64().unwrap() as usize + 8 + length);
                let from = data.len();
                data.extend(&bytes[start..end]);
                let mut info = info.clone();
                info["data_offsets"] = json!([from, data.len()]);
                copied.insert(tensor.replace("layers.1.", &format!("layers.{layer}.")), info);
            }
        }
        let file = crate::common::model::raw(&Value::Object(copied).to_string(), &data);
        kinds(Checkpoint::open(Model::new(&config, &file).path()).unwrap().inspect())
    };
    let limits = copies("step3p7", 4, &|config| {
        let text = &mut config["text_config"];
        text["num_hidden_layers"] = json!(4);
        text["mlp_layer_types"] = json!(vec!["sparse"; 4]);
        text["swiglu_limits"] = json!([0, 0.5, 0, 0.5]);
        text["swiglu_limits_shared"] = json!([0, 0, 0, 0]);
    });
    let [plain, limited] = &limits[..] else { panic!("{limits:?}") };
    assert_eq!((&plain.0[..], &limited.0[..]), (&[0, 2][..], &[1, 3][..]));
    assert_eq!((&*plain.2, &*limited.2), ("silu(gate) * up", "min(silu(gate), 0.5) * clamp(up, -0.5, 0.5)"));

    let inkling = copies("inkling", 3, &|config| {
        let text = &mut config["text_config"];
        text["num_hidden_layers"] = json!(3);
        text["mlp_layer_types"] = json!(vec!["sparse"; 3]);
    });
    assert_eq!(inkling.len(), 1);
    assert_eq!(inkling[0].0, [0, 1, 2]);
    assert_eq!(golden("qwen3_moe").moe_layers, [0, 1]);
}

/// A sum of routed experts alone is not halved.
#[test]
fn an_average_with_nothing() {
    let row = rows_of("cohere2_moe").remove(0);
    let config = json!({ "num_shared_experts": 0, "shared_expert_combination_strategy": "average" });
    let alone = Row { config: with(row.config.clone(), config), shared: None, ..row };
    let text = first(of_row(&alone)).routing;
    assert!(text.ends_with("weighted by their sigmoid scores divided by their sum."), "{text}");
    let both = changed("cohere2_moe", "/shared_expert_combination_strategy", json!("sum"));
    assert!(!first(both).routing.contains(" times "));
}

/// The activation of aria's routed experts is fixed.
#[test]
fn an_activation_for_the_shared_expert_alone() {
    let kind = first(changed("aria_text", "/hidden_act", json!("gelu")));
    assert_eq!(kind.activation, "silu(gate) * up");
    assert!(kind.shared.unwrap().ends_with(": gelu(gate) * up"));
}
