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
