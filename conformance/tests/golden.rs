//! Golden data on the CPU backend.
#![allow(clippy::unwrap_used)]

use fused_moe::HostView;
use fused_moe::checkpoint::write_safetensors;
use fused_moe_conformance::golden::{GoldenError, check_golden};
use fused_moe_cpu::Cpu;
use safetensors::{Dtype, SafeTensors};
use std::path::{Path, PathBuf};

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/fused-moe/tests/goldens")
}

#[test]
fn every_folder() {
    let cpu = Cpu::new().unwrap();
    let mut failures = Vec::new();
    for entry in std::fs::read_dir(goldens()).unwrap() {
        let folder = entry.unwrap().path();
        if !folder.is_dir() {
            continue;
        }
        let report = check_golden(&cpu, &folder).unwrap();
        assert_eq!(report.results.len(), 4);
        for result in &report.results {
            println!("{} {result:?}", folder.file_name().unwrap().to_string_lossy());
        }
        let wrong = report.results.into_iter().filter_map(|result| result.message);
        failures.extend(wrong.map(|message| format!("{}: {message}", folder.display())));
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

/// A copy of a folder without some of its files.
fn copy(family: &str, without: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(goldens().join(family)).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap();
        if !without.iter().any(|without| name == *without) {
            std::fs::copy(&path, folder.path().join(name)).unwrap();
        }
    }
    folder
}

#[test]
fn without_a_number_it_is_the_first_stored_layer() {
    let folder = copy("qwen3_moe", &["meta.json"]);
    let report = check_golden(&Cpu::new().unwrap(), folder.path()).unwrap();
    assert!(report.passed() && report.results.len() == 4, "{report:?}");
}

#[test]
fn single_precision_without_routes_will_do() {
    let folder = copy("qwen3_moe", &["golden.safetensors"]);
    let bytes = std::fs::read(goldens().join("qwen3_moe/golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let floats = |name: &str| -> Vec<f32> {
        let tensor = file.tensor(name).unwrap();
        match tensor.dtype() {
            Dtype::F64 => tensor.data().as_chunks().0.iter().map(|&b| f64::from_le_bytes(b) as f32).collect(),
            _ => tensor.data().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
        }
    };
    let (x, y) = (floats("input.0"), floats("output_f64.0"));
    let write = |y: &[f32]| {
        let x = HostView::of(&x, [x.len() / 48, 48]).unwrap();
        let y = HostView::of(y, [y.len() / 48, 48]).unwrap();
        write_safetensors(folder.path().join("golden.safetensors"), [("input.0", x), ("output.0", y)]).unwrap();
    };
    write(&y);
    let report = check_golden(&Cpu::new().unwrap(), folder.path()).unwrap();
    assert!(report.passed() && report.results.len() == 1, "{report:?}");
    write(&y[..48]);
    let error = check_golden(&Cpu::new().unwrap(), folder.path()).unwrap_err();
    assert!(
        error.to_string().contains("output.0 has 48 elements") && error.to_string().contains("; a golden folder has")
    );
}

#[test]
fn folders_that_are_none() {
    let cpu = Cpu::new().unwrap();
    let error = check_golden(&cpu, Path::new("nowhere")).unwrap_err();
    assert!(matches!(error, GoldenError::Checkpoint(_)), "{error}");
    let error = check_golden(&cpu, copy("mixtral", &["golden.safetensors"]).path()).unwrap_err();
    assert!(matches!(error, GoldenError::File { .. }), "{error}");
}

/// A router that reads nothing but the state it is handed: a positive one chooses expert 0, else it is expert 1 with weight
/// 1/3.
#[test]
fn the_state_of_the_router_before() {
    let folder = tempfile::tempdir().unwrap();
    let config = r#"{ "model_type": "zaya", "num_hidden_layers": 1, "hidden_size": 2, "moe_intermediate_size": 1,
                      "num_experts": 2, "num_experts_per_tok": 1, "router_hidden_size": 1, "rms_norm_eps": 1e-6 }"#;
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    let write = |name: &str, prefix: &str, tensors: &[(&str, &[usize], &[f32])]| {
        let named: Vec<String> = tensors.iter().map(|(name, ..)| format!("{prefix}{name}")).collect();
        let views = named.iter().zip(tensors).map(|(name, (_, shape, numbers))| {
            let view = match **shape {
                [a] => HostView::of(numbers, [a]),
                [a, b] => HostView::of(numbers, [a, b]),
                _ => HostView::of(numbers, [shape[0], shape[1], shape[2]]),
            };
            (&**name, view.unwrap())
        });
        write_safetensors(folder.path().join(name), views).unwrap();
    };
    let identity: &[f32] = &[1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0];
    write(
        "model.safetensors",
        "model.layers.0.mlp.",
        &[
            ("gate.down_proj.weight", &[1, 2], &[0.0; 2]),
            ("gate.down_proj.bias", &[1], &[0.0]),
            ("gate.router_states_scale", &[1], &[1.0]),
            ("gate.router_mlp.norm.weight", &[1], &[1.0]),
            ("gate.router_mlp.fc1.weight", &[1, 1], &[100.0]),
            ("gate.router_mlp.fc1.bias", &[1], &[0.0]),
            ("gate.router_mlp.fc2.weight", &[1, 1], &[1.0]),
            ("gate.router_mlp.fc2.bias", &[1], &[0.0]),
            ("gate.router_mlp.out_proj.weight", &[3, 1], &[1.0, 0.0, -1.0]),
            ("gate.balancing_biases", &[3], &[0.0, 0.1, -1.0]),
            ("experts.gate_up_proj", &[2, 2, 2], identity),
            ("experts.down_proj", &[2, 2, 1], &[1.0, 0.0, 0.0, 3.0]),
        ],
    );
    // silu(1) * 2
    let y = 2.0 / (1.0 + (-1f32).exp());
    let golden: [(&str, &[usize], &[f32]); 3] = [
        ("input.0", &[2, 2], &[1.0, 2.0, 1.0, 2.0]),
        ("output.0", &[2, 2], &[y, 0.0, 0.0, y]),
        ("router_state.0", &[2, 1], &[1.0, -1.0]),
    ];
    write("golden.safetensors", "", &golden);
    let report = check_golden(&Cpu::new().unwrap(), folder.path()).unwrap();
    assert!(report.passed(), "{report:?}");
    write("golden.safetensors", "", &golden[..2]);
    assert!(!check_golden(&Cpu::new().unwrap(), folder.path()).unwrap().passed());
}
