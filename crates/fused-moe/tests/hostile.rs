//! Files that are wrong: every one is an error that names what is wrong, none a panic.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::model::{Model, config, file, file_of, raw, tensors};
use fused_moe::checkpoint::{Checkpoint, Error, HeaderError, TensorProblem};
use proptest::prelude::*;
use serde_json::{Value, json};

fn open(model: &Model) -> Error {
    Checkpoint::open(model.path()).unwrap_err()
}

fn layer(model: &Model, index: usize) -> Error {
    Checkpoint::open(model.path()).unwrap().layer(index).unwrap_err()
}

fn with_field(field: &str, value: Value) -> Model {
    let mut config = config();
    config[field] = value;
    Model::new(&config, &file(&tensors()))
}

fn header_error(bytes: &[u8]) -> HeaderError {
    let model = Model::new(&config(), bytes);
    match open(&model) {
        Error::Header { path, reason } => {
            assert_eq!(path, model.join("model.safetensors"));
            reason
        }
        other => panic!("{other}"),
    }
}

#[test]
fn the_made_up_model_is_right() {
    let model = Model::new(&config(), &file(&tensors()));
    let checkpoint = Checkpoint::open(model.path()).unwrap();
    assert_eq!(checkpoint.layers(), [0]);
    assert!(checkpoint.layer(0).is_ok());
}

#[test]
fn truncated_anywhere() {
    let whole = file(&tensors());
    for length in (0..whole.len()).step_by(7).chain([1, 7, 8, 9, whole.len() - 1]) {
        header_error(&whole[..length]);
    }
    assert!(matches!(header_error(&[]), HeaderError::TooShort { bytes: 0 }));
    let cut = header_error(&whole[..whole.len() - 1]);
    assert!(matches!(cut, HeaderError::DataLength { expected: 224, actual: 223 }), "{cut}");
    let tail = header_error(&[&whole[..], &[0]].concat());
    assert!(matches!(tail, HeaderError::DataLength { expected: 224, actual: 225 }), "{tail}");
}

#[test]
fn header_length_lies() {
    let whole = file(&tensors());
    let length = u64::from_le_bytes(whole[..8].try_into().unwrap());
    for lie in [0, 1, length - 1, length + 1, whole.len() as u64, 99_999_999, 100_000_001, u64::MAX / 2, u64::MAX] {
        let mut bytes = whole.clone();
        bytes[..8].copy_from_slice(&lie.to_le_bytes());
        let reason = header_error(&bytes);
        if lie > 100_000_000 {
            assert!(matches!(reason, HeaderError::TooLong { .. }), "{reason}");
        }
    }
}

#[test]
fn header_contents() {
    let zeros = [0; 64];
    let one = |shape: &str, offsets: &str| {
        raw(&format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#), &zeros)
    };
    for bytes in [
        one("[16]", "[0,128]"),
        one("[16]", "[64,128]"),
        one("[16]", "[64,0]"),
        one("[17]", "[0,64]"),
        one("[-1]", "[0,64]"),
        one("[18446744073709551615,18446744073709551615]", "[0,64]"),
        one("[18446744073709551616]", "[0,64]"),
        one("[0,18446744073709551615]", "[0,64]"),
        one("[4611686018427387903]", "[0,18446744073709551612]"),
        one("[1.5]", "[0,64]"),
        one("16", "[0,64]"),
        raw(r#"{"a":{"dtype":"F31","shape":[16],"data_offsets":[0,64]}}"#, &zeros),
        raw(r#"{"a":{"dtype":"F32","shape":[16]}}"#, &zeros),
        raw(
            r#"{"a":{"dtype":"F32","shape":[16],"data_offsets":[0,64]},"b":{"dtype":"F32","shape":[8],"data_offsets":[32,64]}}"#,
            &zeros,
        ),
        raw(
            r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[8],"data_offsets":[32,64]}}"#,
            &zeros,
        ),
        raw("[]", &zeros),
        raw("", &zeros),
        raw("{", &zeros),
        raw(&"[".repeat(100_000), &zeros),
        raw(&format!("{}1{}", r#"{"a":"#.repeat(100_000), "}".repeat(100_000)), &zeros),
    ] {
        header_error(&bytes);
    }
    let lie = header_error(&one("[17]", "[0,64]")).to_string();
    assert_eq!(lie, "tensor a of F32 [17] does not fill its 64 bytes exactly");
    let mut overlapping = String::from(r#"{"z":{"dtype":"F32","shape":[8],"data_offsets":[0,32]}"#);
    for name in ["e", "c", "b", "d"] {
        overlapping += &format!(r#","{name}":{{"dtype":"F32","shape":[12],"data_offsets":[16,64]}}"#);
    }
    let overlap = header_error(&raw(&(overlapping + "}"), &zeros)).to_string();
    assert_eq!(overlap, "tensor b lies in bytes 16 to 64 of the data, expected it to begin at 32");

    // Offsets that fit each other and overflow with the length of the header.
    let huge = u64::MAX / 8;
    let mut header = String::from("{");
    for i in 0..8u64 {
        let (start, end) = (i * huge, (i + 1) * huge);
        header += &format!(r#""{i}":{{"dtype":"U8","shape":[{huge}],"data_offsets":[{start},{end}]}},"#);
    }
    header.pop();
    header_error(&raw(&(header + "}"), &zeros));

    let mut bytes = file(&tensors());
    bytes[20] = 0xff;
    assert!(matches!(header_error(&bytes), HeaderError::Utf8(_)));
}

#[test]
fn paths() {
    let none = Checkpoint::open("/nowhere/at/all").unwrap_err();
    assert!(matches!(&none, Error::Io { path, .. } if path.ends_with("all")), "{none}");
    assert!(matches!(open(&Model::empty()), Error::NoWeights { .. }));

    let model = Model::empty().with("a.txt", b"hello").with("b.gguf", b"GGUF");
    assert!(matches!(Checkpoint::open(model.join("a.txt")), Err(Error::NotACheckpoint { .. })));
    assert!(matches!(Checkpoint::open(model.join("b.gguf")), Err(Error::Gguf { .. })));
    assert!(matches!(open(&model), Error::Gguf { .. }));

    let model = Model::empty().with("model.safetensors", &file(&tensors()));
    let error = open(&model);
    assert!(matches!(&error, Error::Io { path, .. } if path.ends_with("config.json")), "{error}");

    let model = Model::empty().with("a.safetensors", b"").with("b.safetensors", b"");
    let error = open(&model);
    assert!(error.to_string().contains("a.safetensors, b.safetensors"), "{error}");

    std::fs::create_dir(model.join("model.safetensors")).unwrap();
    let error = open(&model);
    assert!(matches!(&error, Error::NotAFile { path } if path.ends_with("model.safetensors")), "{error}");
    let model = Model::empty().with("model.safetensors", &file(&tensors()));
    std::fs::create_dir(model.join("config.json")).unwrap();
    assert!(matches!(open(&model), Error::NotAFile { path } if path.ends_with("config.json")));
}

#[test]
fn git_lfs_pointers() {
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n";
    let model = Model::new(&config(), pointer);
    assert!(open(&model).to_string().ends_with("run `git lfs pull` in its directory"));
    let model = Model::new(&config(), &file(&tensors())).with("config.json", pointer);
    assert!(matches!(open(&model), Error::GitLfs { path } if path.ends_with("config.json")));
}

#[test]
fn index() {
    let all = tensors();
    let index = |files: &[(&str, &str)]| json!({ "weight_map": serde_json::Map::from_iter(files.iter().map(|(a, b)| (a.to_string(), json!(b)))) });
    let with = |index: Value| {
        Model::empty()
            .with("config.json", config().to_string().as_bytes())
            .with("model.safetensors.index.json", index.to_string().as_bytes())
    };
    let error = open(&with(index(&[("a", "1.safetensors"), ("b", "2.safetensors"), ("c", "1.safetensors")])));
    assert!(error.to_string().contains("1.safetensors, 2.safetensors"), "{error}");

    let error =
        open(&with(index(&[("a", "1.safetensors"), (&all[0].0, "1.safetensors")])).with("1.safetensors", &file(&all)));
    assert!(matches!(&error, Error::Index { tensors, .. } if tensors == &["a (1.safetensors)"]), "{error}");

    for name in ["../1.safetensors", "/etc/passwd", "", ".", "..", "a/b"] {
        let error = open(&with(index(&[("a", name)])));
        assert!(matches!(error, Error::ShardName { .. }), "{name}: {error}");
    }
    for wrong in [json!({}), json!([]), json!({ "weight_map": 1 }), json!({ "weight_map": { "a": 1 } })] {
        assert!(matches!(open(&with(wrong)), Error::Json { .. }));
    }
}

#[test]
fn shards() {
    let all = tensors();
    let (first, second) = all.split_at(3);
    let map = all
        .iter()
        .enumerate()
        .map(|(i, (name, _))| (name.clone(), json!(if i < 3 { "1.safetensors" } else { "2.safetensors" })));
    let index = json!({ "weight_map": serde_json::Map::from_iter(map) });
    let model = Model::empty()
        .with("config.json", config().to_string().as_bytes())
        .with("model.safetensors.index.json", index.to_string().as_bytes())
        .with("1.safetensors", &file(first))
        .with("2.safetensors", &file(second));
    assert!(Checkpoint::open(model.path()).unwrap().layer(0).is_ok());
    std::fs::remove_file(model.join("2.safetensors")).unwrap();
    assert!(matches!(open(&model), Error::MissingShards { files, .. } if files == ["2.safetensors"]));
}

#[test]
fn all_missing_tensors_in_one_message() {
    let mut some = tensors();
    some.retain(|(name, _)| !name.contains("experts.1") && !name.contains("0.up_proj"));
    let error = layer(&Model::new(&config(), &file(&some)), 0);
    let text = error.to_string();
    for name in ["experts.0.up_proj", "experts.1.gate_proj", "experts.1.up_proj", "experts.1.down_proj"] {
        assert!(text.contains(&format!("model.layers.0.mlp.{name}.weight [")), "{text}");
    }
    let Error::Tensors { problems, .. } = error else { panic!("{text}") };
    assert_eq!(problems.len(), 4);
}

#[test]
fn misshapen_tensors() {
    let mut wrong = tensors();
    wrong[0].1 = vec![4, 2];
    wrong[1].1 = vec![8];
    wrong[2].1 = vec![1, 2, 2, 2];
    wrong[3].1 = vec![];
    let error = layer(&Model::new(&config(), &file(&wrong)), 0);
    let Error::Tensors { problems, .. } = &error else { panic!("{error}") };
    assert_eq!(problems.len(), 4, "{error}");
    assert!(error.to_string().contains("gate.weight expected [2, 4], got [4, 2]"), "{error}");
    assert!(error.to_string().contains("up_proj.weight expected [2, 4], got [1, 2, 2, 2]"), "{error}");
}

#[test]
fn formats() {
    for (format, size) in [("F8_E4M3", 1), ("U8", 1), ("F64", 8), ("I64", 8), ("U32", 4), ("BOOL", 1)] {
        let error = layer(&Model::new(&config(), &file_of(&tensors(), format, size)), 0);
        let Error::Tensors { problems, .. } = &error else { panic!("{error}") };
        assert_eq!(problems.len(), 7);
        assert!(matches!(&problems[0], TensorProblem::Format { format: found, .. } if found == format), "{error}");
        assert!(error.to_string().contains("mlp.gate.weight is"), "{error}");
    }
}

/// Rewrites the format of the tensors whose names contain a text; their data grow or shrink.
fn with_format(of: &str, format: &str) -> Vec<u8> {
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in tensors() {
        let (format, size) = if name.contains(of) { (format, 2) } else { ("F32", 4) };
        let start = end;
        end += shape.iter().product::<usize>() * size;
        header.insert(name, json!({ "dtype": format, "shape": shape, "data_offsets": [start, end] }));
    }
    raw(&Value::Object(header).to_string(), &vec![0; end])
}

#[test]
fn mixed_formats() {
    for (odd, side) in [("experts.1.up_proj", "up"), ("experts.0.down_proj", "down")] {
        let model = Model::new(&config(), &with_format(odd, "F16"));
        let error = layer(&model, 0);
        let Error::MixedFormats { problems, .. } = &error else { panic!("{error}") };
        assert_eq!(problems.len(), 1, "{side}: {error}");
        let problem = problems[0].to_string();
        if side == "up" {
            assert_eq!(problem, "model.layers.0.mlp.experts.1.up_proj.weight is f16, expected f32");
            assert!(error.to_string().contains(&problem), "{error}");
        }
        let summary = Checkpoint::open(model.path()).unwrap().inspect();
        assert_eq!(summary.layers[0].problem.as_deref(), Some(problem.as_str()));
    }
    for fits in ["down_proj", "mlp.gate", "none"] {
        let model = Model::new(&config(), &with_format(fits, "BF16"));
        let checkpoint = Checkpoint::open(model.path()).unwrap();
        let cpu = fused_moe::cpu::Cpu::new().unwrap();
        assert!(checkpoint.layer(0).unwrap().prepare(&cpu, &fused_moe::Options::default()).is_ok(), "{fits}");
    }
}

#[test]
fn mixed_formats_of_a_shared_expert() {
    let mut config = config();
    config["model_type"] = json!("qwen2_moe");
    config["shared_expert_intermediate_size"] = json!(2);
    let mut all = tensors();
    for (name, shape) in [("gate_proj", [2, 4]), ("up_proj", [2, 4]), ("down_proj", [4, 2])] {
        all.push((format!("model.layers.0.mlp.shared_expert.{name}.weight"), shape.to_vec()));
    }
    all.push(("model.layers.0.mlp.shared_expert_gate.weight".into(), vec![1, 4]));
    let whole = file(&all);
    let length = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&whole[8..8 + length]).unwrap();
    assert!(Checkpoint::open(Model::new(&config, &whole).path()).is_ok());
    let down = &mut header["model.layers.0.mlp.shared_expert.down_proj.weight"];
    *down = json!({ "dtype": "F16", "shape": [4, 2], "data_offsets": down["data_offsets"] });
    // Half of its bytes become those of another tensor.
    let start = down["data_offsets"][0].as_u64().unwrap();
    down["data_offsets"] = json!([start, start + 16]);
    header["rest"] = json!({ "dtype": "U8", "shape": [16], "data_offsets": [start + 16, start + 32] });
    let error = layer(&Model::new(&config, &raw(&header.to_string(), &whole[8 + length..])), 0);
    assert!(error.to_string().contains("shared_expert.down_proj.weight is f16, expected f32"), "{error}");
}

#[test]
fn quantised() {
    let mut config = config();
    config["num_experts"] = json!(8);
    config["quantization_config"] = json!({ "quant_method": "awq" });
    for (format, size) in [("F8_E4M3", 1), ("U8", 1), ("F32", 4)] {
        let model = Model::new(&config, &file_of(&tensors()[1..], format, size));
        let error = layer(&model, 0);
        let Error::Quantised { method, problems, .. } = &error else { panic!("{error}") };
        assert_eq!(method, "awq");
        let text = error.to_string();
        assert!(text.contains("quantised with awq, which is not read yet"), "{text}");
        assert!(text.contains(&format!("and {} more", problems.len() - 4)) && text.lines().count() == 6, "{text}");
        let summary = Checkpoint::open(model.path()).unwrap().inspect();
        assert!(summary.layers[0].problem.as_ref().unwrap().contains("quantised with awq"));
    }
    config["num_experts"] = json!(2);
    let checkpoint = Model::new(&config, &file(&tensors()));
    assert!(Checkpoint::open(checkpoint.path()).unwrap().layer(0).is_ok());
}

#[test]
fn model_types() {
    let error = open(&with_field("model_type", json!("qwen3_mo")));
    let Error::UnknownModel { nearest, .. } = &error else { panic!("{error}") };
    assert_eq!(nearest[0], "qwen3_moe");
    assert!(error.to_string().contains("perhaps qwen3_moe or"), "{error}");
    assert!(error.to_string().contains("qwen3_mo") && !error.to_string().contains("olmoe"), "{error}");
    for name in ["whisper", "bert", "", "5"] {
        let error = open(&with_field("model_type", json!(name))).to_string();
        assert!(error.ends_with("is not known"), "{error}");
    }
    assert!(matches!(open(&with_field("model_type", json!(null))), Error::ConfigMissing { .. }));
    for value in [json!(3), json!({})] {
        let error = open(&with_field("model_type", value.clone())).to_string();
        assert!(error.ends_with(&format!("field model_type expected a text, got {value}")), "{error}");
    }
    open(&with_field("model_type", json!("x".repeat(1 << 20))));
}

#[test]
fn config_that_is_no_object() {
    for text in ["[1, 2]", "null", "5"] {
        let error = open(&Model::new(&config(), &file(&tensors())).with("config.json", text.as_bytes()));
        assert!(error.to_string().contains("expected a JSON object, got"), "{error}");
    }
}

#[test]
fn config_json() {
    let files = [
        "",
        "{",
        "[]",
        "null",
        "\u{feff}{}",
        "{\"model_type\":\"qwen3_moe\"}",
        &"[".repeat(1 << 20),
        &"{\"a\":".repeat(1 << 16),
    ];
    for text in files {
        open(&Model::new(&config(), &file(&tensors())).with("config.json", text.as_bytes()));
    }
    open(&Model::new(&config(), &file(&tensors())).with("config.json", &[0xff, 0xfe]));
}

#[test]
fn config_numbers() {
    for field in ["num_experts", "num_experts_per_tok", "hidden_size", "moe_intermediate_size"] {
        for value in [json!(0), json!(u64::MAX), json!(u64::MAX / 2), json!(1u64 << 40), json!(4097)] {
            let error = layer(&with_field(field, value.clone()), 0);
            assert!(!error.to_string().is_empty(), "{field} {value}");
        }
        for value in [json!(-1), json!(1.5), json!("8"), json!(1e300), json!({}), json!(true)] {
            let error = layer(&with_field(field, value), 0);
            assert!(matches!(&error, Error::ConfigValue { field: found, .. } if found == field), "{error}");
        }
        let error = layer(&with_field(field, json!(null)), 0);
        assert!(matches!(&error, Error::ConfigMissing { fields, .. } if fields.iter().any(|f| f == field)), "{error}");
        assert!(error.to_string().contains("config.json"), "{error}");
    }
    let error = layer(&with_field("num_experts_per_tok", json!(3)), 0).to_string();
    assert!(error.contains("num_experts_per_tok = 3, num_experts = 2: a token cannot go"), "{error}");
    for value in [json!(u64::MAX), json!(70_000), json!(-3), json!("1"), json!([])] {
        open(&with_field("num_hidden_layers", value));
    }
    assert!(matches!(open(&with_field("decoder_sparse_step", json!(0))), Error::ConfigValue { .. }));
    assert!(matches!(open(&with_field("mlp_only_layers", json!("all"))), Error::ConfigValue { .. }));
    let error = layer(&with_field("hidden_act", json!("sinc")), 0);
    assert!(error.to_string().contains("sinc") && error.to_string().contains("gelu"), "{error}");
    assert!(matches!(layer(&with_field("norm_topk_prob", json!("yes")), 0), Error::ConfigValue { .. }));
}

#[test]
fn layers_that_are_not() {
    let mut config = config();
    config["num_hidden_layers"] = json!(6);
    config["mlp_only_layers"] = json!([1, 5]);
    let model = Model::new(&config, &file(&tensors()));
    let checkpoint = Checkpoint::open(model.path()).unwrap();
    assert_eq!(checkpoint.layers(), [0, 2, 3, 4]);
    assert_eq!(checkpoint.first_stored_layer(), Some(0));
    let dense = checkpoint.layer(5).unwrap_err().to_string();
    assert!(dense.contains("layer 5 is dense; its MoE layers are 0, 2-4"), "{dense}");
    let beyond = checkpoint.layer(6).unwrap_err().to_string();
    assert!(beyond.contains("no layer 6; the model has 6"), "{beyond}");
    assert!(checkpoint.layer(usize::MAX).is_err());
    let summary = checkpoint.inspect();
    assert_eq!(summary.layers.iter().filter(|layer| layer.problem.is_some()).count(), 3);
}

fn survive(model: &Model) {
    if let Ok(checkpoint) = Checkpoint::open(model.path()) {
        for index in [0, 1] {
            let _ = checkpoint.layer(index).map_err(|error| error.to_string());
        }
        checkpoint.inspect();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn flipped_header_bytes(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut bytes = file(&tensors());
        let header = bytes.len() - 224;
        for (at, value) in flips {
            bytes[at.index(header)] = value;
        }
        survive(&Model::new(&config(), &bytes));
    }

    #[test]
    fn flipped_config_bytes(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let mut bytes = config().to_string().into_bytes();
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        survive(&Model::new(&config(), &file(&tensors())).with("config.json", &bytes));
    }

    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        survive(&Model::new(&config(), &bytes));
    }
}
