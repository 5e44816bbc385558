//! What `inspect` and `run` say of layers that are more than routes and a sum, and of those that do not run.

use super::support::{Model, fmoe, golden};
use fused_moe::checkpoint::write_safetensors;
use fused_moe::{HostView, Shape};
use std::path::Path;
use tempfile::TempDir;

#[test]
fn a_line_for_each_part_of_a_layer() {
    let ran = fmoe(["inspect", &golden("../gemma4")]).succeeds();
    for line in [
        "routing    Each token goes to the 3 of 8 experts with the largest softmax score, weighted by",
        "activation gelu_tanh(gate) * up\n",
        "router     reads the token through an RMSNorm",
        "shared     every token goes to one of width 28: gelu_tanh(gate) * up\n",
        "around     norms before the experts",
        "beside     the residual and its factor",
        "layers     2, of them 2 with experts: 0-1\n",
    ] {
        assert!(ran.stdout.contains(&format!("\n{line}")), "{line}: {ran}");
    }
    let ran = fmoe(["inspect", &golden("../gemma4"), "--json"]).succeeds();
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    let kind = &json["kinds"][0];
    assert_eq!((&kind["layers"], &kind["sizes"]["shared_intermediate"]), (&serde_json::json!([1]), &28.into()));
}

/// Layers that differ are told apart.
#[test]
fn a_kind_for_layers_that_differ() {
    let model = Model::new().write();
    let config = serde_json::json!({
        "model_type": "deepseek_v4", "hidden_size": 4, "moe_intermediate_size": 2, "n_routed_experts": 2,
        "num_experts_per_tok": 1, "num_hidden_layers": 3, "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "n_shared_experts": 0, "vocab_size": 3, "routed_scaling_factor": 1.5, "scoring_func": "sqrtsoftplus",
    });
    std::fs::write(model.path().join("config.json"), config.to_string()).unwrap();
    let numbers: Vec<f32> = (0..24).map(|i| (i as f32).sin()).collect();
    let mut views = vec![("layers.0.ffn.gate.tid2eid".to_owned(), HostView::of(&[0u32, 1, 0][..], [3, 1]).unwrap())];
    for layer in 0..3 {
        let mut add = |name: &str, shape: &[usize]| {
            let shape = if let [n] = *shape { Shape::from([n]) } else { Shape::from([shape[0], shape[1]]) };
            let count = shape.rows() * shape.cols();
            views.push((format!("layers.{layer}.ffn.{name}"), HostView::of(&numbers[..count], shape).unwrap()));
        };
        add("gate.weight", &[2, 4]);
        if layer > 0 {
            add("gate.bias", &[2]);
        }
        for expert in 0..2 {
            for (name, shape) in [("w1", [2, 4]), ("w3", [2, 4]), ("w2", [4, 2])] {
                add(&format!("experts.{expert}.{name}.weight"), &shape);
            }
        }
    }
    let views = views.iter().map(|(name, view)| (name.as_str(), *view));
    write_safetensors(model.file("model.safetensors"), views).unwrap();
    let ran = fmoe(["inspect", model.name()]).succeeds();
    let (first, second) = ran.stdout.split_once("layers 1-2\n").unwrap();
    assert!(first.contains("layers 0\nsizes ") && first.contains("that a table has for its token id"), "{ran}");
    assert!(second.contains("score plus a correction bias") && !second.contains("table"), "{ran}");
    let ran = fmoe(["run", model.name(), "--all", "--tokens", "8"]).succeeds();
    assert_eq!(ran.stdout.matches("layer   ").count(), 3, "{ran}");
}

#[test]
fn a_model_of_which_nothing_runs() {
    let dense = Model::new().with("mlp_only_layers", vec![0, 1]).write();
    let ran = fmoe(["inspect", dense.name()]).fails(1);
    assert!(ran.stdout.contains("layers     2, of them 0 with experts: none\n"), "{ran}");
    assert!(ran.stdout.contains("layer 0 has no experts by decoder_sparse_step = 1, mlp_only_layers = [0,1]"), "{ran}");
    let parts = ["layer 0 has no experts by", "mlp_only_layers = [0,1]", "model.layers.0.mlp.gate.weight is there"];
    fmoe(["run", dense.name()]).errs(parts);
    fmoe(["run", dense.name(), "--layer", "1"]).errs(["layer 1 has no experts by", "config.json was changed"]);
    let ran = fmoe(["run", dense.name(), "--all"]).fails(1);
    assert!(ran.stderr.contains("warning: layer 0 cannot run: ") && ran.stderr.contains("layer 1 cannot"), "{ran}");
}

#[test]
fn all_layers_but_those_that_cannot_run() {
    let missing = "model.layers.0.mlp.experts.2.down_proj.weight";
    let model = Model::new().without(missing).write();
    let out = model.file("out.safetensors");
    let ran = fmoe(["run", model.name(), "--all", "--tokens", "4", "--output", &out]).fails(1);
    assert!(ran.stderr.contains(&format!("warning: layer 0 cannot run: {missing} [16, 8] is missing")), "{ran}");
    assert!(ran.stdout.contains("layer   1 ") && ran.stdout.contains("written"), "{ran}");
}

#[test]
fn the_model_types_that_can_be_read() {
    let ran = fmoe(["families"]).succeeds();
    assert!(ran.stdout.lines().all(|line| line.len() < 120), "{ran}");
    let names: Vec<&str> = ran.stdout.split_whitespace().collect();
    assert!(names.is_sorted() && names.contains(&"qwen3_moe") && names.len() > 70, "{ran}");
    let json: Vec<String> = serde_json::from_str(&fmoe(["families", "--json"]).succeeds().stdout).unwrap();
    assert_eq!(json, names);

    let model = Model::new().with("model_type", "qwen3_mo").write();
    let ran = fmoe(["inspect", model.name()])
        .errs(["model type \"qwen3_mo\" is not known, perhaps qwen3_moe", "`fmoe families`"]);
    assert!(ran.stderr.lines().all(|line| line.len() < 300), "{ran}");
}

#[test]
fn remedies_that_fit() {
    let says = |field: &str, value: serde_json::Value, parts: [&str; 2]| {
        fmoe(["inspect", Model::new().with("num_hidden_layers", 1).write().name()]).succeeds();
        let model = Model::new().with(field, value).write();
        fmoe(["run", model.name()]).errs(parts);
    };
    says("hidden_act", "sinc".into(), ["field hidden_act expected silu, ", "fmoe has no layer for this"]);
    says(
        "num_experts_per_tok",
        5.into(),
        ["num_experts_per_tok = 5, num_experts = 4: a token cannot", "correct config.json"],
    );
    let model = Model::new().write();
    super::support::rewrite(&model, "F32", "I32");
    fmoe(["run", model.name()])
        .errs(["gate.weight is I32", "convert the model with save_pretrained to F32, F16 or BF16"]);
}

#[test]
fn a_part_by_its_last_word() {
    let model = golden("../switch_transformers");
    for part in ["decoder", "encoder"] {
        let ran = fmoe(["inspect", &model, "--part", part]).succeeds();
        assert!(ran.stdout.contains(&format!("family switch_transformers_{part}\n")), "{ran}");
    }
    fmoe(["run", &model, "--part", "coder"]).errs(["no part coder; it has switch_transformers_decoder, switch"]);
}

#[test]
fn slots_that_no_expert_carries_out() {
    let ran = fmoe(["run", &golden("../switch_transformers"), "--tokens", "100"]).succeeds();
    assert!(
        ran.stdout.contains("48 slots;") && ran.stdout.contains("\n         52 slots dropped, their expert"),
        "{ran}"
    );
    let ran = fmoe(["run", &golden("../longcat_flash"), "--tokens", "100"]).succeeds();
    let count = |words: &str| -> usize {
        let before = ran.stdout.split(words).next().unwrap();
        before.split_whitespace().next_back().unwrap().parse().unwrap()
    };
    assert_eq!(count(" slots;") + count(" slots of experts without weights"), 400, "{ran}");
    let ran = fmoe(["run", &golden("../switch_transformers"), "--tokens", "2"]).succeeds();
    assert!(!ran.stdout.contains("dropped"), "{ran}");
}

#[test]
fn token_ids_beside_the_input() {
    let model = golden("../deepseek_v4_hash");
    let file = |name: &str| golden(&format!("../deepseek_v4_hash/golden.safetensors:{name}"));
    for i in 0..2 {
        let (input, output) = (file(&format!("input.{i}")), file(&format!("output_f64.{i}")));
        let ran = fmoe(["run", &model, "--input", &input, "--expect", &output]).succeeds();
        assert!(ran.stdout.contains("output   matches"), "{ran}");
        let ids = file(&format!("input_ids.{i}"));
        fmoe(["run", &model, "--input", &input, "--expect", &output, "--ids", &ids]).succeeds();
    }
    let run = |ids: &str| fmoe(["run", &model, "--input", &file("input.0"), "--ids", &file(ids)]);
    run("input_ids.1").errs(["input_ids.1 of ", "has 10 token ids, the input has 37 tokens", "one for each"]);
    run("input.0").errs(["is F32, expected token ids in I64, I32 or U32"]);
    run("ids").errs(["holds no tensor \"ids\""]);
    let folder = tempfile::tempdir().unwrap();
    let many = folder.path().join("ids.safetensors");
    write_safetensors(&many, [("a", HostView::of(&[128u32; 37][..], [37]).unwrap())]).unwrap();
    let run = fmoe(["run", &model, "--input", &file("input.0"), "--ids", many.to_str().unwrap()]);
    run.errs(["has token id 128, the layer's table has 0 to 127", "tokenizer"]);
    let other = golden("golden.safetensors:input.0");
    fmoe(["run", &golden(""), "--input", &other, "--ids", &file("input_ids.0")]).errs(["no layer of this run chooses"]);
}

/// A zaya of two layers: H 8, M 3, E 2.
fn zaya() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let config = serde_json::json!({
        "model_type": "zaya", "num_hidden_layers": 2, "hidden_size": 8, "moe_intermediate_size": 4, "num_experts": 2,
        "num_experts_per_tok": 1, "router_hidden_size": 3, "rms_norm_eps": 1e-5,
    });
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let mut tensors: Vec<(String, Vec<f32>, Shape)> = Vec::new();
    for layer in 0..2 {
        let mut add = |name: &str, shape: Shape, scale: f32| {
            let count = shape.dims().iter().product::<usize>();
            let seed = tensors.len();
            let numbers = (0..count).map(|i| ((i * 37 + seed * 11) as f32 * 0.618).sin() * scale).collect();
            tensors.push((format!("model.layers.{layer}.mlp.{name}"), numbers, shape));
        };
        add("gate.down_proj.weight", [3, 8].into(), 1.0);
        add("gate.down_proj.bias", [3].into(), 1.0);
        if layer > 0 {
            add("gate.router_states_scale", [3].into(), 2.0);
        }
        add("gate.router_mlp.norm.weight", [3].into(), 2.0);
        for name in ["fc1", "fc2"] {
            add(&format!("gate.router_mlp.{name}.weight"), [3, 3].into(), 1.0);
            add(&format!("gate.router_mlp.{name}.bias"), [3].into(), 1.0);
        }
        add("gate.router_mlp.out_proj.weight", [3, 3].into(), 2.0);
        add("gate.balancing_biases", [3].into(), 0.1);
        add("experts.gate_up_proj", [2, 8, 8].into(), 1.0);
        add("experts.down_proj", [2, 8, 4].into(), 1.0);
    }
    let views = tensors.iter().map(|(name, numbers, shape)| (name.as_str(), HostView::of(numbers, *shape).unwrap()));
    write_safetensors(folder.path().join("model.safetensors"), views).unwrap();
    folder
}

#[test]
fn a_router_takes_up_the_state_of_the_one_before() {
    let folder = zaya();
    let model = folder.path().to_str().unwrap();
    let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let x: Vec<f32> = (0..12 * 8).map(|i| (i as f32 * 0.73).sin()).collect();
    let [input, all, first] = ["x.safetensors", "all.safetensors", "first.safetensors"].map(file);
    write_safetensors(&input, [("x", HostView::of(&x, [12, 8]).unwrap())]).unwrap();

    let ran = fmoe(["run", model, "--all", "--input", &input, "--output", &all]).succeeds();
    assert_eq!(ran.stderr, "", "{ran}");
    fmoe(["run", model, "--layer", "0", "--input", &input, "--output", &first]).succeeds();
    let state = floats(&first, "router_state");
    assert_eq!((&state, state.len()), (&floats(&all, "router_state.0"), 36));
    let both = file("both.safetensors");
    let with_state = |rows: usize, state: &[f32]| {
        let views = [HostView::of(&x, [12, 8]).unwrap(), HostView::of(state, [rows, state.len() / rows]).unwrap()];
        write_safetensors(&both, ["input", "router_state"].into_iter().zip(views)).unwrap();
        fmoe(["run", model, "--layer", "1", "--input", &format!("{both}:input")])
    };
    let expected = format!("{all}:output.1");
    let ran = with_state(12, &state).args(["--expect", &expected, "--tolerance", "0"]).succeeds();
    assert_eq!(ran.stderr, "", "{ran}");
    // the first router takes up none
    let ran = fmoe(["run", model, "--all", "--input", &format!("{both}:input"), "--output", &first]).succeeds();
    assert_eq!(ran.stderr, "", "{ran}");
    assert_eq!(floats(&first, "output.1"), floats(&all, "output.1"));
    with_state(9, &state).errs(["tensor router_state of", "shape [9, 4], layer 1 takes [12, 3]"]);

    let ran = fmoe(["run", model, "--layer", "1", "--input", &input, "--expect", &expected]).fails(1);
    assert!(ran.stderr.contains("warning: layer 1: its router takes up the state of the layer before"), "{ran}");
}

fn floats(file: &str, name: &str) -> Vec<f32> {
    let bytes = std::fs::read(Path::new(file)).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    file.tensor(name).unwrap().data().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

#[test]
fn an_output_is_tried_before_anything_runs() {
    let model = Model::new().write();
    let started = std::time::Instant::now();
    let ran = fmoe(["run", model.name(), "--tokens", "2", "--output", "/proc/out.safetensors"]);
    let ran = ran.errs(["/proc/out.safetensors: cannot write into /proc", "permissions"]);
    assert!(ran.stdout.is_empty() && started.elapsed().as_secs() < 20, "{ran}");
}

#[test]
fn adapters_by_the_names_of_their_drivers() {
    fmoe(["run", "--adapter", ""]).misuses(["--adapter: the name is empty"]);
    fmoe(["run", "--adapter", " "]).misuses(["--adapter: the name is empty"]);
    if fused_moe::wgpu::adapters().iter().any(|adapter| adapter.name.contains("llvmpipe")) {
        let ran = fmoe(["run", "--adapter", "lavapipe"]).succeeds();
        assert!(ran.stdout.contains("llvmpipe"), "{ran}");
        fmoe(["run", "--adapter", "mesa"]).succeeds();
    }
}

/// The loader's words are for those who have such a GPU.
#[test]
fn no_driver_in_plain_words() {
    let found = fused_moe::cuda::driver();
    let Err(error) = found else { return };
    if error.to_string().contains("No such file") {
        let ran = fmoe(["run"]).succeeds();
        assert!(ran.choice.contains("no NVIDIA driver here (looked for libcuda.so"), "{ran}");
        assert!(!ran.choice.contains("shared object"), "{ran}");
    }
}
