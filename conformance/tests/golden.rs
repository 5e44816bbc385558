//! Golden data on the CPU backend.

use fused_moe_conformance::golden::{GoldenError, check_golden};
use fused_moe_cpu::Cpu;
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

#[test]
fn a_folder_that_is_none() {
    let error = check_golden(&Cpu::new().unwrap(), Path::new("nowhere")).unwrap_err();
    assert!(matches!(error, GoldenError::File { .. }), "{error}");
}
