//! Adapters of the wgpu backend: none, no Vulkan loader, wrong numbers and names, and what there is.

use super::support::{Call, Ran, fmoe};
use std::process::Command;

/// The names of the adapters here, in order. Where there is none, `cargo test -p fused-moe-wgpu` says so, and what needs
/// one is passed over, unless `FMOE_REQUIRE_ADAPTER` demands it.
fn adapters() -> Vec<String> {
    let names: Vec<_> = fused_moe::wgpu::adapters().into_iter().map(|adapter| adapter.name).collect();
    let required = std::env::var("FMOE_REQUIRE_ADAPTER").is_ok_and(|value| value == "1");
    assert!(!names.is_empty() || !required, "FMOE_REQUIRE_ADAPTER: there is no adapter");
    names
}

fn listed(ran: &Ran) -> Vec<serde_json::Value> {
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    let devices = json["devices"].as_array().unwrap().clone();
    devices.into_iter().filter(|device| device["name"].as_str().unwrap().starts_with("wgpu")).collect()
}

/// No adapter: listed so, an error when one is asked for.
#[cfg(target_os = "linux")]
fn unusable(call: impl Fn(&[&str]) -> Call) {
    let why = "no GPU was found through Vulkan, Metal or DX12";
    let ran = call(&["devices"]).succeeds();
    assert!(ran.stdout.contains(why), "{ran}");
    let ran = call(&["devices", "--json"]).succeeds();
    let [none] = listed(&ran).try_into().unwrap();
    assert!(none["name"] == "wgpu" && none["available"] == false, "{ran}");
    for adapter in [&[][..], &["--adapter", "0"], &["--adapter", "7"], &["--adapter", "radeon"]] {
        for command in ["run", "check", "bench"] {
            let ran = call(&[command, "--backend", "wgpu"]).args(adapter).errs(["error: wgpu: ", why, "Vulkan loader"]);
            assert!(ran.stdout.is_empty(), "{ran}");
        }
    }
    call(&["run", "--backend", "wgpu:1"]).errs(["error: wgpu: ", why]);
    let ran = call(&["run"]).succeeds();
    assert!(ran.choice.is_empty() || ran.choice.contains(why), "{ran}");
    assert!(ran.stdout.contains("output   matches") && ran.stderr.is_empty(), "{ran}");
}

#[test]
#[cfg(target_os = "linux")]
fn no_driver() {
    unusable(|arguments| fmoe(arguments).without_adapters());
}

#[test]
#[cfg(target_os = "linux")]
fn no_vulkan_loader() {
    let folder = tempfile::tempdir().unwrap();
    let (source, library) = (folder.path().join("none.c"), folder.path().join("libvulkan.so.1"));
    std::fs::write(&source, "int something;").unwrap();
    let made = Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([&library, &source]).status();
    assert!(made.is_ok_and(|status| status.success()), "cc makes no library");
    std::os::unix::fs::symlink(&library, folder.path().join("libvulkan.so")).unwrap();
    unusable(|arguments| fmoe(arguments).env("LD_LIBRARY_PATH", folder.path().to_str().unwrap()));
}

#[test]
fn no_such_adapter() {
    let names = adapters();
    let Some(first) = names.first() else { return };
    for adapter in ["99", "-1", "no such adapter", "18446744073709551616"] {
        let adapter = format!("--adapter={adapter}");
        for command in [&["run"][..], &["check"], &["bench"], &["run", "--backend", "wgpu"]] {
            fmoe(command).args([&adapter]).errs([&adapter.replace('=', " "), "no adapter has", "\n  0  ", first]);
        }
    }
    let ran = fmoe(["run", "--backend", "wgpu:99"]).errs(["wgpu: no adapter 99: there "]);
    assert!(ran.stdout.is_empty(), "{ran}");
    if names.len() > 1 {
        let letters: Vec<char> = names[1].to_lowercase().chars().filter(|c| c.is_alphabetic()).collect();
        if let Some(common) = names[0].to_lowercase().chars().find(|c| letters.contains(c)) {
            fmoe(["run", "--adapter", &common.to_string()]).errs(["several have this name", "\n  1  "]);
        }
    }
}

#[test]
fn adapters_of_another_backend() {
    for backend in ["cpu", "cuda", "auto", "wgpu:0"] {
        fmoe(["run", "--backend", backend, "--adapter", "0"]).misuses(["--adapter 0", backend, "--backend wgpu"]);
    }
    for backend in ["wgpu:x", "wgpu:", "wgpu:-1"] {
        fmoe(["run", "--backend", backend]).misuses([backend, "no such backend", "wgpu:0"]);
    }
}

#[test]
fn adapters_are_listed_and_those_in_software_not_chosen() {
    let ran = fmoe(["devices", "--json"]).succeeds();
    let (devices, numbers) = (listed(&ran), fused_moe::wgpu::adapters());
    assert_eq!(devices.len(), numbers.len().max(1), "{ran}");
    for (device, numbers) in devices.iter().zip(&numbers).filter(|(device, _)| device["available"] == true) {
        let description = device["description"].as_str().unwrap();
        for part in [&numbers.name, &numbers.api, &numbers.driver, "subgroups", "bindings of"] {
            assert!(description.contains(part), "{part}: {ran}");
        }
    }
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    let chosen = json["chosen"].as_str().unwrap();
    if numbers.iter().all(|adapter| adapter.software) {
        assert!(!chosen.starts_with("wgpu"), "{ran}");
    }
}

#[test]
fn checks_on_an_adapter() {
    let names = adapters();
    let Some(first) = names.first() else { return };
    let part: String = first.to_uppercase().chars().take(6).collect();
    for on in [&["--backend", "wgpu"][..], &["--adapter", "0"], &["--backend", "wgpu:0"], &["--adapter", &part]] {
        if names.len() == 1 || on[1] != part {
            let ran = fmoe(["check", "--filter", "accumulate"]).args(on).succeeds();
            assert!(ran.stdout.starts_with(&format!("wgpu: {first}")) && ran.stdout.contains(", 0 failed"), "{ran}");
        }
    }
}

#[test]
fn bench_on_an_adapter() {
    let names = adapters();
    let Some(first) = names.first() else { return };
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("bench.json");
    let shape = "bench --hidden 64 --intermediate 48 --experts 8 --top-k 2 --tokens 1,5 --dtype bf16 --backend wgpu";
    for beside in [None, Some("cpu")] {
        let option = beside.map(|name| ["--beside", name]).into_iter().flatten();
        let ran = fmoe(shape.split(' ')).args(["--json", json.to_str().unwrap()]).args(option).succeeds();
        for part in [first, "from logits", "GB/s read", "linear through wgpu", "checked: ", "clock"] {
            assert!(ran.stdout.contains(part), "{part}: {ran}");
        }
        let rows: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
        for (row, tokens) in rows.as_array().unwrap().iter().zip([1, 5]) {
            assert_eq!((&row["tokens"], &row["backend"], &row["calls"]), (&tokens.into(), &"wgpu".into(), &8.into()));
            assert_eq!((&row["from"], &row["runs"], row["isa"].is_null()), (&"logits".into(), &25.into(), true));
            let numbers = ["median_us", "read_gb_s", "arithmetic_gflop_s", "beside_us"].map(|name| row[name].as_f64());
            assert!(numbers[..3].iter().all(|number| number.is_some_and(|number| number > 0.0)), "{row}");
            assert_eq!((numbers[3].is_some_and(|us| us > 0.0), row["beside"].as_str()), (beside.is_some(), beside));
        }
        assert_eq!(rows.as_array().unwrap().len(), 2, "{rows}");
    }
    fmoe(shape.split(' ')).args(["--beside", "abacus"]).misuses(["--beside abacus: no such backend"]);
    fmoe(shape.split(' ')).args(["--threads", "2"]).misuses(["--threads 2", "wgpu"]);
}

#[test]
fn an_input_that_no_buffer_holds_says_how_many_tokens_one_holds() {
    if adapters().is_empty() {
        return;
    }
    // more than a token has in any layer
    let tokens = fused_moe::wgpu::adapters()[0].buffer_bytes.to_string();
    fmoe(["run", "--backend", "wgpu:0", "--tokens", &tokens]).errs([&tokens, "a buffer of this device", "tokens fit"]);
}
