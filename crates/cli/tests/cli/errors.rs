//! Bad input: an error that says what is wrong and what to do, exit code 1, no panic, no half-written file.

use super::support::{Model, PROGRAM, fmoe, golden, input, raw};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

#[test]
fn no_such_checkpoint() {
    fmoe(["inspect", "/nonexistent/model"]).errs(["/nonexistent/model", "No such file"]);
    let empty = tempfile::tempdir().unwrap();
    fmoe(["run", empty.path().to_str().unwrap()]).errs(["model.safetensors"]);
}

#[test]
fn truncated_weights() {
    let model = Model::new().write();
    let file = model.file("model.safetensors");
    let whole = fs::read(&file).unwrap();
    for length in [0, 7, 100, whole.len() - 1] {
        fs::write(&file, &whole[..length]).unwrap();
        for command in ["run", "inspect"] {
            fmoe([command, model.name()]).errs(["model.safetensors"]);
        }
    }
}

#[test]
fn lying_headers() {
    let model = Model::new().write();
    let file = model.path().join("model.safetensors");
    let name = "model.layers.0.mlp.gate.weight";
    for (header, data) in [
        (format!(r#"{{"{name}":{{"dtype":"F32","shape":[4,16],"data_offsets":[0,8]}}}}"#), 8),
        (format!(r#"{{"{name}":{{"dtype":"F32","shape":[4,16],"data_offsets":[0,256]}}}}"#), 8),
        (format!(r#"{{"{name}":{{"dtype":"F32","shape":[18446744073709551615,16],"data_offsets":[0,8]}}}}"#), 8),
        (format!(r#"{{"{name}":{{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}}}"#), 8),
        ("{".to_owned(), 0),
        ("not json".to_owned(), 100),
    ] {
        raw(&file, &header, &vec![0; data]);
        fmoe(["run", model.name()]).errs(["model.safetensors"]);
        let file = format!("{}", file.display());
        fmoe(["run", &golden(""), "--input", &file]).errs(["model.safetensors"]);
    }
    let mut endless = u64::MAX.to_le_bytes().to_vec();
    endless.extend([0; 64]);
    fs::write(&file, endless).unwrap();
    fmoe(["run", model.name()]).errs(["model.safetensors"]);
}

#[test]
fn missing_shards() {
    let model = Model::new().write();
    fs::rename(model.file("model.safetensors"), model.file("model-00001-of-00002.safetensors")).unwrap();
    let index = serde_json::json!({ "weight_map": {
        "model.layers.0.mlp.gate.weight": "model-00001-of-00002.safetensors",
        "model.layers.1.mlp.gate.weight": "model-00002-of-00002.safetensors",
    }});
    fs::write(model.file("model.safetensors.index.json"), index.to_string()).unwrap();
    fmoe(["run", model.name()]).errs(["model-00002-of-00002.safetensors"]);
}

#[test]
fn missing_and_misshapen_tensors_are_named_together() {
    let (one, two) = ("model.layers.0.mlp.experts.1.up_proj.weight", "model.layers.0.mlp.experts.3.down_proj.weight");
    let model = Model::new().without(one).shaped(two, [16, 9]).write();
    fmoe(["run", model.name()]).errs([one, two, "[8, 16]", "[16, 8]", "[16, 9]"]);
}

#[test]
fn unknown_model_type() {
    let model = Model::new().with("model_type", "qwen4_moe").write();
    fmoe(["run", model.name()]).errs(["qwen4_moe", "qwen3_moe"]);
}

#[test]
fn impossible_sizes() {
    let model = Model::new().with("num_experts_per_tok", 5).write();
    fmoe(["run", model.name()]).errs(["config.json", "5"]);
    for field in ["hidden_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok"] {
        for value in [serde_json::json!(0), serde_json::json!(-1), serde_json::json!("x"), serde_json::json!(u64::MAX)]
        {
            let model = Model::new().with(field, value).write();
            fmoe(["run", model.name()]).errs(["config.json"]);
        }
    }
    let model = Model::new().write();
    fs::write(model.file("config.json"), "{").unwrap();
    fmoe(["run", model.name()]).errs(["config.json"]);
    fs::remove_file(model.file("config.json")).unwrap();
    fmoe(["run", model.name()]).errs(["config.json"]);
}

#[test]
fn no_such_layer() {
    fmoe(["run", &golden(""), "--layer", "7"]).errs(["layer 7", "fmoe inspect"]);
}

#[test]
fn inputs_that_do_not_fit() {
    let model = Model::new().write();
    let run = |file: &str| fmoe(["run", model.name(), "--input", file]);
    let wide = input(&model, "wide.safetensors", "f32", &[2, 17]);
    run(&wide).errs(["tensor x of", "[2, 17]", "[T, 16]"]);
    let whole = input(&model, "ids.safetensors", "u32", &[2, 16]);
    run(&whole).errs(["tensor x of", "U32 [2, 16]", "BF16"]);
    let flat = input(&model, "flat.safetensors", "f32", &[16]);
    run(&flat).errs(["tensor x of", "[16]", "[T, H]"]);
    run(&format!("{flat}:y")).errs(["no tensor \"y\"", "\n  x"]);
    run("/nonexistent.safetensors").errs(["/nonexistent.safetensors"]);
    run(&golden("golden.safetensors")).errs(["none is named", "input.0"]);
    let right = input(&model, "x.safetensors", "f32", &[2, 16]);
    run(&right).args(["--expect", &wide]).errs(["tensor x of", "[2, 17]", "[2, 16]"]);
}

#[test]
fn token_counts_that_do_not_fit() {
    fmoe(["run", "--tokens", "99999999999"]).errs(["--tokens 99999999999", "at most", "workspace"]);
    fmoe(["run", "--tokens", "18446744073709551615"]).errs(["--tokens"]);
    fmoe(["run", "--tokens", "-1"]).fails(2);
}

#[test]
fn outputs_that_cannot_be_written() {
    let model = Model::new().write();
    let run = |file: &str| fmoe(["run", model.name(), "--tokens", "2", "--output", file]);
    run(model.name()).errs(["is a directory"]);
    let socket = model.file("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    run(&socket).errs(["is no regular file"]);
    run(&model.file("nowhere/out.safetensors")).errs(["nowhere"]);
    run("/dev/null/out.safetensors").errs(["/dev/null"]);
    run("/proc/out.safetensors").errs(["/proc/out.safetensors"]);
}

#[test]
fn outputs_over_what_is_read() {
    let model = Model::new().write();
    let x = input(&model, "x.safetensors", "f32", &[2, 16]);
    let y = input(&model, "y.safetensors", "f32", &[2, 16]);
    let weights = model.file("model.safetensors");
    let link = model.file("link.safetensors");
    std::os::unix::fs::symlink(&weights, &link).unwrap();
    let before = fs::read(&weights).unwrap();
    for (output, what) in [
        (&x, "the file of --input"),
        (&y, "the file of --expect"),
        (&weights, "a file of the checkpoint"),
        (&link, "a file of the checkpoint"),
        (&model.file("config.json"), "a file of the checkpoint"),
        (&model.file("./x.safetensors"), "the file of --input"),
    ] {
        let run = fmoe(["run", model.name(), "--input", &format!("{x}:x"), "--expect", &y]);
        run.args(["--output", output]).errs([what, "another name"]);
    }
    assert_eq!(fs::read(&weights).unwrap(), before);
}

#[test]
fn numbers_that_make_no_sense() {
    for tolerance in ["nan", "inf", "-1", "x"] {
        fmoe(["run", "--tolerance", tolerance]).fails(2);
    }
    fmoe(["run", "--tolerance", "0.1", "--tokens", "3"]).fails(2);
    let ran = fmoe(["run", &golden(""), "--tolerance", "0.1"]).fails(2);
    assert!(ran.stderr.contains("--tolerance needs --expect"), "{ran}");
    for threads in ["0", "1025", "99999999999999999999"] {
        fmoe(["bench", "--threads", threads]).fails(2);
    }
}

#[test]
fn errors_without_a_remedy_promise_none() {
    let command = format!("'{PROGRAM}' devices > /dev/full");
    let ran = Command::new("sh").args(["-c", &command]).output().unwrap();
    let stderr = String::from_utf8_lossy(&ran.stderr);
    assert_eq!(ran.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("No space left") && stderr.contains("help: make room"), "{stderr}");
    fmoe(["run"]).env("TMPDIR", "/nonexistent").errs(["/nonexistent", "TMPDIR"]);
}

#[test]
fn a_disk_that_is_full_leaves_nothing() {
    let model = Model::new().write();
    let out = model.file("out.safetensors");
    fs::write(&out, "what was there").unwrap();
    // 64 kB at most in a file; SIGXFSZ is ignored, so that writing fails as it does on a full disk
    let command = format!(
        "trap '' XFSZ; ulimit -f 64; exec '{PROGRAM}' run '{}' --backend cpu --tokens 4000 --output '{out}'",
        model.name()
    );
    let ran = Command::new("sh").args(["-c", &command]).output().unwrap();
    let stderr = String::from_utf8_lossy(&ran.stderr);
    assert_eq!(ran.status.code(), Some(1), "{stderr}");
    assert!(
        stderr.starts_with("error: ") && stderr.contains("out.safetensors") && stderr.contains("\nhelp: "),
        "{stderr}"
    );
    assert_eq!(fs::read_to_string(&out).unwrap(), "what was there");
    let left: Vec<_> = fs::read_dir(model.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 3, "{left:?}");
}

#[test]
fn unknown_backends_and_instruction_sets() {
    for command in ["run", "check", "bench"] {
        for backend in ["abacus", "cuda:", "cuda:x", "cuda:-1", ""] {
            fmoe([command, "--backend", backend]).misuses([&format!("--backend {backend}: no such"), "cpu"]);
        }
    }
    let forced = |isa: &str| fmoe(["run", "--tokens", "1", "--backend", "cpu"]).env("FMOE_CPU_ISA", isa);
    forced("mmx").errs(["cpu: ", "FMOE_CPU_ISA=mmx: expected one of scalar", "fmoe devices"]);
    fmoe(["bench", "--threads", "1"]).env("FMOE_CPU_ISA", "mmx").errs(["FMOE_CPU_ISA=mmx"]);
    forced("").succeeds();
    forced("scalar").succeeds();
}

#[test]
fn devices_with_an_instruction_set_that_is_not_there() {
    let devices = || fmoe(["devices"]).env("FMOE_CPU_ISA", "mmx").env("CUDA_VISIBLE_DEVICES", "").without_adapters();
    let ran = devices().fails(1);
    assert!(ran.stdout.contains("FMOE_CPU_ISA=mmx: expected one of") && ran.stdout.contains("chosen: none\n"), "{ran}");
    assert_eq!(ran.stderr, "");
    let ran = devices().args(["--json"]).fails(1);
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert!(json["chosen"].is_null(), "{ran}");
    // an adapter in software can be named, and is not chosen
    if fused_moe::wgpu::adapters().iter().any(|adapter| adapter.software) {
        let ran = fmoe(["devices"]).env("FMOE_CPU_ISA", "mmx").env("CUDA_VISIBLE_DEVICES", "");
        let ran = ran.env("VK_LOADER_DRIVERS_SELECT", "*lvp*").fails(1);
        assert!(ran.stdout.contains("chosen: none, only by name\n"), "{ran}");
    }
}

#[test]
fn checks_that_are_none() {
    let check = |arguments: &[&str]| fmoe(["check", "--backend", "cpu"]).args(arguments);
    check(&["--filter", "no such case"]).errs(["no such case", "names are stage/case/format"]);
    // those of the other suite, and of the larger ones
    for (arguments, help) in [
        (&["down_backward"][..], "with --backward"),
        (&["down_backward", "--full"], "with --backward"),
        (&["permute/Even", "--backward"], "without --backward"),
        (&["permute/Even", "--backward", "--full"], "without --backward"),
        (&["T=4099"], "with --full"),
        (&["C=131 N=97"], "with --backward --full"),
        (&["T=4099", "--backward"], "with --full, without --backward"),
    ] {
        let ran = check(&[&["--filter"], arguments].concat()).errs(["no case has this in its name"]);
        assert!(ran.stderr.ends_with(&format!("\nhelp: there are such cases {help}\n")), "{ran}");
    }
    fmoe(["check", "--golden", "/nonexistent"]).errs(["/nonexistent"]);
    // before a compiler is looked for
    let compile = |arguments: &[&str]| fmoe(["check"]).args(arguments).env("FMOE_NVRTC", "/nonexistent").fails(2);
    for architecture in [
        "nonsense", "sm_", "sm_a", "sm_90b", "sm_90af", "sm_75", "sm_80a", "sm_90f", "sm_140", "sm_999", "90",
        "sm_+90", "sm_090", "sm_9000", "",
    ] {
        let ran = compile(&[&format!("--compile-only={architecture}")]);
        assert!(ran.stderr.contains("as in sm_80, sm_90a or sm_100f"), "{ran}");
    }
    for architecture in ["sm_80", "sm_90", "sm_90a", "sm_100", "sm_100a", "sm_100f", "sm_121a"] {
        fmoe(["check", "--compile-only", architecture]).env("FMOE_NVRTC", "/nonexistent").errs(["NVRTC"]);
    }
    for other in
        [&["--full"][..], &["--backward"], &["--json"], &["--filter", "x"], &["--backend", "cuda"], &["--adapter", "0"]]
    {
        let ran = compile(&[&["--compile-only"], other].concat());
        assert!(ran.stderr.contains("cannot be used with") && ran.stderr.contains(other[0]), "{ran}");
    }
}

#[test]
fn benches_that_are_none() {
    fmoe(["bench", "--shape", "qwen"]).misuses(["qwen", "qwen3-30b-a3b", "olmoe"]);
    let shape =
        |h: &str, e: &str, k: &str| fmoe(["bench", "--hidden", h, "--intermediate", "8", "--experts", e, "--top-k", k]);
    shape("16", "4", "2").args(["--tokens", "1,0"]).misuses(["--tokens 0"]);
    shape("16", "4", "2").args(["--tokens", "99999999999999"]).errs(["--tokens 99999999999999", "at most"]);
    shape("16", "4", "5").misuses(["K = 5", "E = 4"]);
    shape("0", "4", "2").misuses(["layer:", "0"]);
    shape("16", "5000", "2").misuses(["layer:", "5000"]);
    shape("18446744073709551615", "4", "2").errs(["memory"]);
    // more than there is, though no more than can be counted
    let layer = shape("1000000000", "4000", "2").args(["--backend", "cpu"]);
    let ran =
        layer.errs([": a layer takes 328 TB in bf16; ", "B of memory can be had, less 8.0 TB for the random weights"]);
    assert!(!ran.stderr.contains(" 0 B"), "{ran}");
    let backward = shape("16", "4", "2").args(["--backward", "--backend", "cpu", "--tokens", "99999999999999"]);
    backward.errs(["--tokens 99999999999999", "B of memory can be had, less ", "fewer tokens"]);
    fmoe(["bench", "--backward", "--beside", "cpu"]).fails(2);
    fmoe(["bench", "--hidden", "16"]).fails(2);
    fmoe(["bench", "--from", "y"]).fails(2);
    fmoe(["bench", "--numerics", "exact"]).fails(2);
    fmoe(["bench", "--backward", "--numerics", "batch-invariant"]).fails(2);
}

#[test]
fn results_that_cannot_be_kept_are_not_measured() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "what was there").unwrap();
    let shape = "bench --hidden 16 --intermediate 8 --experts 4 --top-k 2 --tokens 1";
    for (option, path) in [
        ("--json", "/nonexistent/x.json".into()),
        ("--json", folder.path().to_path_buf()),
        ("--record", file.clone()),
        ("--record", "/proc/records".into()),
        ("--record", "/dev/full".into()),
    ] {
        let ran = fmoe(shape.split(' ')).args([option, path.to_str().unwrap()]);
        let ran = ran.errs(["cannot write", path.to_str().unwrap()]);
        assert!(ran.stdout.is_empty(), "{ran}");
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "what was there");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    let refused = |path: &Path, why: &str| {
        let ran = fmoe(shape.split(' ')).args(["--json", path.to_str().unwrap()]);
        let ran = ran.errs([path.to_str().unwrap(), "cannot write", why]);
        assert!(ran.stdout.is_empty(), "{ran}");
    };
    let link = folder.path().join("link");
    symlink("/nonexistent/x.json", &link).unwrap();
    refused(&link, "symbolic link");
    // nobody reads it, and nobody may write it
    let pipe = folder.path().join("pipe");
    assert!(Command::new("mkfifo").args(["-m", "444"]).arg(&pipe).status().unwrap().success());
    refused(&pipe, "permission denied");
}

/// What is in the way of the day's file is left as it is, and nothing is measured.
#[test]
fn records_that_cannot_be_appended_to_are_not_measured() {
    let folder = tempfile::tempdir().unwrap();
    let records = folder.path().join("records");
    for suffix in ["", "-backward"] {
        let bench = || {
            let shape = "bench --hidden 16 --intermediate 8 --experts 4 --top-k 2 --tokens 1 --backend cpu";
            let backward = Some("--backward").filter(|_| !suffix.is_empty());
            fmoe(shape.split(' ')).args(backward).args(["--record", records.to_str().unwrap()])
        };
        bench().succeeds();
        let device = fs::read_dir(&records).unwrap().next().unwrap().unwrap().path();
        let find = |entry: std::io::Result<fs::DirEntry>| {
            let path = entry.unwrap().path();
            (path.to_str().unwrap().ends_with("-backward.csv") != suffix.is_empty()).then_some(path)
        };
        let day = fs::read_dir(&device).unwrap().find_map(find).unwrap();
        let text = fs::read_to_string(&day).unwrap();
        let refused = |why: &str| {
            let ran = bench().errs([day.to_str().unwrap(), why, "another directory"]);
            assert!(ran.stdout.is_empty(), "{ran}");
        };
        // the columns of another version, the beginning of a header, and no text
        for other in [text.replace(",isa", ""), text.replace("date,", "day,"), "date".into()] {
            fs::write(&day, &other).unwrap();
            refused("has other columns");
            assert_eq!(fs::read_to_string(&day).unwrap(), other);
        }
        fs::write(&day, [0xff; 2000]).unwrap();
        refused("has other columns");
        fs::remove_file(&day).unwrap();
        fs::create_dir(&day).unwrap();
        refused("is no regular file");
        fs::remove_dir(&day).unwrap();
        for place in ["/dev/full", "/dev/stdin"] {
            symlink(place, &day).unwrap();
            refused("is no regular file");
            fs::remove_file(&day).unwrap();
        }
        symlink("/nonexistent/day.csv", &day).unwrap();
        let ran = bench().errs([day.to_str().unwrap(), "symbolic link"]);
        assert!(ran.stdout.is_empty(), "{ran}");
        fs::remove_file(&day).unwrap();
        // nobody reads it
        assert!(Command::new("mkfifo").arg(&day).status().unwrap().success());
        refused("is no regular file");
        fs::remove_file(&day).unwrap();
        // a row that was cut short, and a file that is empty
        fs::write(&day, format!("{text}2026")).unwrap();
        bench().succeeds();
        assert!(fs::read_to_string(&day).unwrap().starts_with(&format!("{text}2026\n20")));
        fs::write(&day, "").unwrap();
        bench().succeeds();
        assert_eq!(fs::read_to_string(&day).unwrap().lines().next(), text.lines().next());
        // a header that was cut short of its end, and lines that end as on Windows
        let header = text.lines().next().unwrap();
        fs::write(&day, header).unwrap();
        bench().succeeds();
        assert!(fs::read_to_string(&day).unwrap().starts_with(&format!("{header}\n20")));
        let lines = text.replace('\n', "\r\n");
        fs::write(&day, &lines).unwrap();
        bench().succeeds();
        assert!(fs::read_to_string(&day).unwrap().starts_with(&format!("{lines}20")));
        // what is in the way of the folder
        fs::remove_dir_all(&device).unwrap();
        fs::write(&device, "").unwrap();
        let ran = bench().errs([device.to_str().unwrap(), "is no directory"]);
        assert!(ran.stdout.is_empty(), "{ran}");
        fs::remove_file(&device).unwrap();
    }
}

#[test]
fn the_path_is_read_before_the_device() {
    let run = fmoe(["run", "/nonexistent", "--backend", "cuda"]).env("CUDA_VISIBLE_DEVICES", "");
    run.errs(["error: /nonexistent"]);
}

#[test]
fn no_device_to_measure() {
    // hides devices where there are any
    let bench = |arguments: &str| fmoe(format!("bench {arguments}").split(' ')).env("CUDA_VISIBLE_DEVICES", "");
    bench("--backend cuda").errs(["cuda:", "fmoe devices"]);
    bench("--backend cuda --threads 4").misuses(["--threads 4", "the CPU backend's", "leave --threads out"]);
}
