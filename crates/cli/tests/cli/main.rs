//! The program from outside: every command on small data, and every bad input to an error of its own.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic)]

mod cuda;
mod errors;
mod layers;
mod support;
mod wgpu;

use fused_moe::HostView;
use fused_moe::checkpoint::write_safetensors;
use support::{Model, fmoe, golden, input};

#[test]
fn run_matches_the_layer_that_comes_along() {
    let ran = fmoe(["run"]).succeeds();
    assert!(ran.stdout.contains("output   matches"), "{ran}");
    assert!(ran.stdout.contains("H 48, I 20, E 8, K 3; weights f32"), "{ran}");
    assert!(ran.stdout.contains("111 slots; tokens per expert"), "{ran}");
    assert_eq!(ran.stderr, "", "no progress and no colours away from a terminal");
    assert!(!ran.stdout.contains('\x1b'), "{ran}");
}

#[test]
fn run_on_random_tokens() {
    let ran = fmoe(["run", "--tokens", "5", "--seed", "3"]).succeeds();
    assert!(ran.stdout.contains("15 slots") && ran.stdout.contains("random tokens, seed 3"), "{ran}");
    assert!(!ran.stdout.contains("output   "), "{ran}");
    let ran = fmoe(["run", "--tokens", "0"]).succeeds();
    assert!(ran.stdout.contains("[0, 48]") && ran.stdout.contains("0 slots"), "{ran}");
    let ran = fmoe(["run", "--tolerance", "0.5"]).succeeds();
    assert!(ran.stdout.contains("5.0e-1 allowed"), "{ran}");
}

#[test]
fn experts_by_token_id() {
    let model = golden("../deepseek_v4_hash");
    let ran = fmoe(["run", &model, "--tokens", "200"]).succeeds();
    assert!(ran.stdout.contains("600 slots") && ran.stdout.contains("0 of 8 experts unused"), "{ran}");
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("x.safetensors");
    let view = HostView::of(&[0.5f32; 96][..], [2, 48]).unwrap();
    write_safetensors(&input, [("x", view)]).unwrap();
    fmoe(["run", &model, "--input", input.to_str().unwrap()])
        .errs(["layer 0: chooses experts by token id, and tensor x of ", "--ids FILE[:TENSOR]"]);
}

#[test]
fn parts_are_named() {
    let model = golden("");
    let ran = fmoe(["inspect", &model, "--part", "qwen3_moe"]).succeeds();
    assert!(ran.stdout.contains("family qwen3_moe") && !ran.stdout.contains("parts "), "{ran}");
    fmoe(["run", &model, "--part", "talker"]).errs(["no part talker; it has qwen3_moe", "--part"]);
}

#[test]
fn short_runs_draw_no_bar() {
    let Ok(out) = std::process::Command::new("script")
        .args(["-qec", &format!("'{}' run", support::PROGRAM), "/dev/null"])
        .stdin(std::process::Stdio::null())
        .output()
    else {
        return;
    };
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(text.contains("matches") && !text.contains("layers [") && !text.contains("\x1b[2K"), "{text:?}");
}

#[test]
fn run_reads_writes_and_compares() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.safetensors");
    let (input, expected) = (golden("golden.safetensors:input.1"), golden("golden.safetensors:output_f64.1"));
    let model = golden("");
    let common = ["run", &model, "--input", &input];
    let ran = fmoe(common).args(["--expect", &expected, "--output", out.to_str().unwrap()]).succeeds();
    assert!(ran.stdout.contains("output   matches") && ran.stdout.contains("written"), "{ran}");
    // the only tensor of a file needs no name, and the shape is the input's
    let again = format!("{}", out.display());
    let ran = fmoe(common).args(["--expect", &again, "--tolerance", "0"]).succeeds();
    assert!(ran.stdout.contains("largest error 0.0e0"), "{ran}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file stays");
    let ran = fmoe(common).args(["--expect", &input]).fails(1);
    assert!(ran.stdout.contains("output   does not match"), "{ran}");
}

#[test]
fn run_takes_every_float_format() {
    let model = Model::new().write();
    for (format, bytes) in [("f32", 4), ("f16", 2), ("bf16", 2)] {
        let file = input(&model, "x.safetensors", format, &[2, 3, 16]);
        let out = model.path().join("y.safetensors");
        let ran = fmoe(["run", model.name(), "--input", &file, "--output", out.to_str().unwrap()]).succeeds();
        assert!(ran.stdout.contains(&format!("input    {format} [2, 3, 16]")), "{ran}");
        let length = std::fs::metadata(&out).unwrap().len();
        assert!(length >= 96 * bytes && length < 96 * bytes + 200, "{format}: {length}");
    }
    let file = input(&model, "x.safetensors", "f64", &[6, 16]);
    let ran = fmoe(["run", model.name(), "--input", &file]).succeeds();
    assert!(ran.stderr.contains("warning: tensor x of") && ran.stderr.contains("f64, converted to f32"), "{ran}");
}

#[test]
fn run_all_layers() {
    let model = Model::new().write();
    let out = model.path().join("all.safetensors");
    let ran = fmoe(["run", model.name(), "--all", "--tokens", "4", "--output", out.to_str().unwrap()]).succeeds();
    assert_eq!(ran.stdout.lines().filter(|line| line.starts_with("layer   ")).count(), 2, "{ran}");
    let file = format!("{}:output.1", out.display());
    // the same layer alone gives the same
    let x = input(&model, "x.safetensors", "f32", &[4, 16]);
    fmoe(["run", model.name(), "--all", "--input", &x, "--output", out.to_str().unwrap()]).succeeds();
    let ran = fmoe(["run", model.name(), "--layer", "1", "--input", &x, "--expect", &file, "--tolerance", "0"]);
    ran.succeeds();
}

#[test]
fn run_warns_of_nan() {
    let model = Model::new().write();
    let file = support::input_of(&model, "x.safetensors", &[2, 16], |i| if i == 3 { f32::NAN } else { 1.0 });
    let ran = fmoe(["run", model.name(), "--input", &file]).succeeds();
    assert!(ran.stderr.contains("1 element of the input is NaN or infinite"), "{ran}");
    assert!(ran.stderr.contains("16 elements of the output are NaN or infinite, as is some of the input"), "{ran}");
    assert!(ran.stderr.contains("a token without a finite router score"), "{ran}");
}

#[test]
fn run_warns_of_overflow() {
    let model = Model::new().write();
    let file = support::input_of(&model, "x.safetensors", &[2, 16], |i| if i < 16 { 1e38 } else { 1.0 });
    let ran = fmoe(["run", model.name(), "--input", &file]).succeeds();
    assert!(ran.stderr.contains("elements of the output are NaN or infinite, though the input was finite"), "{ran}");
}

#[test]
fn inspect_in_words_and_json() {
    let model = Model::new().write();
    let ran = fmoe(["inspect", model.name()]).succeeds();
    for part in ["qwen3_moe", "H 16, I 8, E 4, K 2", "softmax", "0-1", "yes"] {
        assert!(ran.stdout.contains(part), "{part} is missing: {ran}");
    }
    let ran = fmoe(["inspect", model.name(), "--json"]).succeeds();
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(json["kinds"][0]["sizes"]["experts"], 4);
    assert_eq!(json["layers"].as_array().unwrap().len(), 2);
}

#[test]
fn inspect_says_what_does_not_run() {
    let model = Model::new().without("model.layers.1.mlp.experts.2.down_proj.weight").write();
    let ran = fmoe(["inspect", model.name()]).succeeds();
    assert!(ran.stdout.contains("no") && ran.stdout.contains("experts.2.down_proj.weight"), "{ran}");
}

#[test]
fn devices_in_words_and_json() {
    let ran = fmoe(["devices"]).succeeds();
    assert!(ran.stdout.contains("cpu") && ran.stdout.contains("chosen:"), "{ran}");
    let ran = fmoe(["devices", "--json"]).succeeds();
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert!(json["devices"].as_array().unwrap().iter().any(|device| device["name"] == "cpu"), "{json}");
    let ran = fmoe(["devices", "--json", "--timing"]).fails(2);
    assert!(ran.stderr.contains("cannot be used with"), "{ran}");
}

#[test]
fn check_some_cases() {
    let ran = fmoe(["check", "--filter", "permute"]).succeeds();
    assert!(ran.stdout.contains("permute") && ran.stdout.contains("0 failed"), "{ran}");
    let ran = fmoe(["check", "--filter", "permute", "--json"]).succeeds();
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert!(!json["results"].as_array().unwrap().is_empty());
}

#[test]
fn check_some_gradients() {
    let check = |filter: &str| fmoe(["check", "--backward", "--backend", "cpu", "--filter", filter]);
    let ran = check("down_backward").succeeds();
    assert!(ran.stdout.contains("down_backward") && ran.stdout.contains("0 failed"), "{ran}");
    let ran = check("z_loss").args(["--json"]).succeeds();
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    let results = json["results"].as_array().unwrap();
    assert!(!results.is_empty() && results.iter().all(|result| result["message"].is_null()), "{json}");
    check("no such case").errs(["no such case"]);
    fmoe(["check", "--backward", "--golden", "/nonexistent"]).fails(2);
    fmoe(["check", "--backward", "--compile-only"]).fails(2);
}

#[test]
fn check_golden_folders() {
    let (good, other) = (golden(""), golden("../mixtral"));
    let ran = fmoe(["check", "--golden", &good, &other]).succeeds();
    assert!(ran.stdout.contains("qwen3_moe") && ran.stdout.contains("mixtral"), "{ran}");
    // weights that are not those of the golden output
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "meta.json", "model.safetensors", "golden.safetensors"] {
        let from = if file == "golden.safetensors" { golden("../qwen3_vl_moe/") } else { good.clone() };
        std::fs::copy(format!("{from}/{file}"), folder.path().join(file)).unwrap();
    }
    let ran = fmoe(["check", "--golden", folder.path().to_str().unwrap()]).fails(1);
    assert!(ran.stdout.contains("took other routes"), "{ran}");
}

#[test]
fn a_golden_folder_that_cannot_run_leaves_the_others() {
    let unknown = Model::new().with("model_type", "qwen4_moe").write();
    let ran = fmoe(["check", "--golden", unknown.name(), &golden("")]).fails(1);
    assert!(ran.stdout.contains("qwen4_moe") && ran.stdout.contains("2 folders, 1 failed"), "{ran}");
    let ran = fmoe(["check", "--json", "--golden", unknown.name(), &golden("")]).fails(1);
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((&json[0]["passed"], &json[1]["passed"]), (&false.into(), &true.into()));
    assert!(json[0]["error"].as_str().unwrap().contains("qwen4_moe"), "{ran}");
    assert_eq!(json[1]["results"][0]["other_routes"], 0);
    fmoe(["check", "--golden", Model::new().write().name()]).errs(["golden.safetensors", "input.0"]);
}

#[test]
fn bench_a_small_shape() {
    let folder = tempfile::tempdir().unwrap();
    let (json, records) = (folder.path().join("bench.json"), folder.path().join("records"));
    for (routing, numerics) in [("uniform", "fast"), ("zipf", "batch-invariant"), ("one", "fast")] {
        let shape = "bench --hidden 64 --intermediate 32 --experts 8 --top-k 2 --threads 2";
        let ran = fmoe(shape.split(' '))
            .args(["--routing", routing, "--numerics", numerics, "--dtype", "F32", "--tokens", "1, 5"])
            .args(["--json", json.to_str().unwrap(), "--record", records.to_str().unwrap()])
            .succeeds();
        assert!(ran.stdout.contains("GB/s") && ran.stdout.contains("checked: "), "{ran}");
        let rows: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
        assert_eq!((&rows[0]["tokens"], &rows[1]["tokens"]), (&1.into(), &5.into()));
        assert!(rows[0]["median_us"].as_f64().unwrap() > 0.0);
        assert_eq!((&rows[0]["from"], &rows[0]["calls"]), (&"x".into(), &1.into()));
        assert_eq!(rows[0]["numerics"], numerics);
        assert!(ran.stdout.contains(&format!("numerics {numerics}")), "{ran}");
        let larger = |a: &str, b: &str| rows[1][a].as_f64().unwrap().max(rows[1][b].as_f64().unwrap());
        assert_eq!(rows[1]["floor_us"], larger("byte_floor_us", "flop_floor_us"));
        if routing == "one" {
            assert_eq!(rows[1]["touched_experts"], 2.0);
        }
    }
    let device = std::fs::read_dir(&records).unwrap().next().unwrap().unwrap().path();
    let file = std::fs::read_dir(device).unwrap().next().unwrap().unwrap().path();
    let text = std::fs::read_to_string(file).unwrap();
    assert_eq!(text.lines().count(), 1 + 3 * 2, "a header and a line a batch size:\n{text}");
    let columns = |line: &str| line.split(',').count();
    assert!(text.lines().all(|line| columns(line) >= columns(text.lines().next().unwrap())), "{text}");
}

#[test]
fn bench_names_the_instruction_set() {
    let best = fused_moe::cpu::arch::Isa::best().to_string();
    for backward in [None, Some("--backward")] {
        for (forced, named) in [("scalar", "scalar"), ("", best.as_str())] {
            let folder = tempfile::tempdir().unwrap();
            let json = folder.path().join("bench.json");
            let shape = "bench --hidden 64 --intermediate 32 --experts 8 --top-k 2 --threads 1 --tokens 1 --record";
            let ran = fmoe(shape.split(' '))
                .args([folder.path().join("records").to_str().unwrap(), "--json", json.to_str().unwrap()])
                .args(backward)
                .env("FMOE_CPU_ISA", forced)
                .succeeds();
            for part in [format!(", {named}, 1 thread\n"), format!("bf16 multiply-adds of {named}, ")] {
                assert!(ran.stdout.contains(&part), "{part}: {ran}");
            }
            let rows: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
            assert_eq!(rows[0]["isa"], named);
            let recorded = ran.stderr.trim().strip_prefix("recorded in ").unwrap();
            let text = std::fs::read_to_string(recorded).unwrap();
            let last: Vec<_> = text.lines().map(|line| line.rsplit(',').next().unwrap()).collect();
            assert_eq!(last, ["isa", named], "{text}");
        }
    }
}

#[test]
fn one_is_no_plural() {
    let ran = fmoe(["run", "--tokens", "1", "--backend", "cpu"]).succeeds();
    assert!(ran.stdout.contains("3 slots;") && ran.stdout.contains(" of 8 experts unused"), "{ran}");
    let model = Model::new().with("num_experts_per_tok", 1).write();
    let ran = fmoe(["run", model.name(), "--tokens", "1", "--backend", "cpu"]).succeeds();
    assert!(ran.stdout.contains(" 1 slot;") && ran.stdout.contains(" of 4 experts unused"), "{ran}");
    let shape = "bench --hidden 64 --intermediate 32 --experts 8 --top-k 2 --backend cpu --tokens 1 --threads 1";
    let ran = fmoe(shape.split(' ')).succeeds();
    assert!(ran.stdout.contains(", 1 thread\n") && ran.stdout.contains("checked: 1 row of "), "{ran}");
    let ran = fmoe(shape.split(' ')).args(["--backward"]).succeeds();
    assert!(ran.stdout.contains("weights  one layer of "), "{ran}");
    let ran = fmoe(["check", "--golden", &golden("")]).succeeds();
    assert!(ran.stdout.contains("\n1 folder, 0 failed"), "{ran}");
}

/// Paragraphs break where the terminal ends, and not where the source text did.
#[test]
fn help_flows() {
    let run = |command: &str| fmoe([command, "--help"]).succeeds().stdout;
    for (command, beginning) in [("check", "--golden compares"), ("run", "The input is"), ("bench", "The floor is")] {
        let help = run(command);
        let start = help.rfind(&format!("\n{beginning}")).unwrap() + 1;
        let lines: Vec<&str> = help[start..].trim_end().split('\n').collect();
        assert!(lines.len() > 2, "{help}");
        for pair in lines.windows(2) {
            let next = pair[1].split(' ').next().unwrap();
            assert!(
                pair[0].len() + 1 + next.len() > 100 && pair[0].len() <= 100,
                "{:?} ends too early: {help}",
                pair[0]
            );
        }
    }
}

#[test]
fn bench_from_logits() {
    let bench = |from: &str| {
        let ran =
            fmoe("bench --hidden 64 --intermediate 32 --experts 64 --top-k 2 --tokens 1,9 --backend cpu".split(' '))
                .args(["--from", from, "--json", "-"])
                .succeeds();
        serde_json::from_str::<serde_json::Value>(&ran.stdout).unwrap()
    };
    let (x, logits) = (bench("x"), bench("logits"));
    assert_eq!(logits[1]["from"], "logits");
    // one token: its experts alone, and 4 bytes a logit in place of the router
    let (bytes, flops) = (2 * 3 * 64 * 32 * 2 + 2 * 64 * 2, 2 * 2 * 3 * 64 * 32);
    assert_eq!((&logits[0]["bytes"], &logits[0]["flops"]), (&(bytes + 4 * 64).into(), &flops.into()));
    let router = 64 * 64;
    assert_eq!((&x[0]["bytes"], &x[0]["flops"]), (&(bytes + 2 * router).into(), &(flops + 2 * router).into()));
}

#[test]
fn bench_a_training_step() {
    let folder = tempfile::tempdir().unwrap();
    let records = folder.path().join("records");
    for (dtype, routing, from) in [("f32", "uniform", "x"), ("bf16", "zipf", "x"), ("f16", "one", "logits")] {
        let shape = "bench --backward --hidden 64 --intermediate 32 --experts 8 --top-k 2 --threads 2 --tokens 3,70";
        let ran = fmoe(shape.split(' '))
            .args(["--dtype", dtype, "--routing", routing, "--from", from, "--record", records.to_str().unwrap()])
            .succeeds();
        assert!(ran.stdout.contains("of forward") && ran.stdout.contains("checked: "), "{ran}");
    }
    let device = std::fs::read_dir(&records).unwrap().next().unwrap().unwrap().path();
    let file = std::fs::read_dir(device).unwrap().next().unwrap().unwrap().path();
    assert!(file.to_str().unwrap().ends_with("-backward.csv"), "{file:?}");
    assert_eq!(std::fs::read_to_string(file).unwrap().lines().count(), 1 + 3 * 2);

    let shape =
        "bench --backward --hidden 64 --intermediate 32 --experts 8 --top-k 2 --tokens 9 --backend cpu --json -";
    let ran = fmoe(shape.split(' ')).succeeds();
    let rows: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    // x, the pre-activations of two slots, and an id and a weight for each
    assert_eq!(rows[0]["kept_bytes_a_token"], 2 * (64 + 2 * 2 * 32) + 2 * 8);
    let time = |name: &str| rows[0][name].as_f64().unwrap();
    assert!(["forward_us", "saving_us", "backward_us"].iter().all(|name| time(name) > 0.0), "{rows}");
    assert!((time("backward_us") / time("forward_us") - time("of_forward")).abs() < 0.02, "{rows}");
    let products = 9 * (2 * 3 * 64 * 32 + 8 * 64);
    assert_eq!(rows[0]["flops"], 2 * 2 * products);
    assert_eq!(rows[0]["from"], "x");
}

#[test]
fn help_has_examples() {
    for command in ["run", "inspect", "check", "bench", "devices", "families"] {
        let ran = fmoe([command, "--help"]).succeeds();
        assert!(ran.stdout.contains("Examples:"), "{ran}");
    }
}

#[test]
fn help_lists_the_shapes() {
    let (help, error) = (fmoe(["bench", "--help"]).succeeds().stdout, fmoe(["bench", "--shape", "?"]).fails(2).stderr);
    let (_, names) = error.rsplit_once("help: ").unwrap();
    let names: Vec<_> =
        names.split([' ', ',', '\n']).filter(|word| word.contains(|c: char| c.is_ascii_digit())).collect();
    assert!(names.len() > 3, "{error}");
    assert!(names.iter().all(|name| help.contains(name)), "{names:?}\n{help}");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let model = Model::new().write();
    let command = format!("'{}' inspect '{}' | head -1", support::PROGRAM, model.name());
    let out = std::process::Command::new("sh").args(["-c", &command]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stderr), "");
    let closed = std::process::Command::new("sh").args(["-c", &format!("{command} >&-")]).output().unwrap();
    assert!(!String::from_utf8_lossy(&closed.stderr).contains("panicked"));
}

#[test]
fn the_readme_lists_every_family() {
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../README.md")).unwrap();
    for family in fused_moe::checkpoint::known_families() {
        assert!(readme.contains(&format!("`{family}`")), "{family}");
    }
}
