//! What a checkpoint says of itself, and writing one.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::model::{Model, config, file, raw, tensors};
use common::{Extra, Golden, path, run, specified};
use fused_moe::checkpoint::{Checkpoint, WriteError, write_safetensors};
use fused_moe::{Backend, DType, Device, DeviceError, View, Visitor};
use serde_json::json;
use std::time::{Duration, Instant};

#[test]
fn summary() {
    let summary = Checkpoint::open(path("qwen2_moe")).unwrap().inspect();
    assert_eq!((summary.family, summary.layer_count), ("qwen2_moe", 2));
    let [kind] = &summary.kinds[..] else { panic!("{:?}", summary.kinds) };
    let sizes = kind.sizes;
    assert_eq!((sizes.hidden, sizes.intermediate, sizes.experts, sizes.top_k), (48, 20, 8, 3));
    assert_eq!(sizes.shared_intermediate, Some(28));
    assert_eq!(
        kind.routing,
        "Each token goes to the 3 of 8 experts with the largest softmax score, weighted by their softmax scores."
    );
    assert_eq!((&kind.layers[..], &summary.moe_layers[..]), (&[1][..], &[0, 1][..]));
    let expert = 3 * 20 * 48;
    let parameters = 8 * 48 + 8 * expert + 3 * 28 * 48 + 48;
    assert_eq!((summary.parameters, summary.bytes), (parameters, 4 * parameters));
    assert_eq!(summary.formats["f32"], 4 * parameters);
    assert!(summary.layers[0].problem.as_ref().unwrap().contains("and 28 more"), "{:?}", summary.layers[0]);
    assert_eq!(summary.layers[1].expert_bytes, 4 * expert);
    assert_eq!(summary.layers[1].name.as_deref(), Some("model.layers.1.mlp"));
    let text = serde_json::to_value(&summary).unwrap();
    assert_eq!(text["layers"][1]["index"], 1);
}

#[test]
fn a_file_alone() {
    let checkpoint = Checkpoint::open(path("mixtral").join("model.safetensors")).unwrap();
    assert_eq!(checkpoint.first_stored_layer(), Some(1));
    let model = Model::empty()
        .with("other.safetensors", &file(&tensors()))
        .with("config.json", config().to_string().as_bytes());
    assert!(Checkpoint::open(model.path()).unwrap().layer(0).is_ok());
}

/// Files of other writers need not pad their headers: tensors then lie at any byte.
#[test]
fn unaligned_tensors() {
    for name in ["qwen2_moe", "deepseek_v3", "gpt_oss"] {
        let golden = Golden::open(name);
        let bytes = std::fs::read(path(name).join("model.safetensors")).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header = std::str::from_utf8(&bytes[8..8 + length]).unwrap();
        for padding in 1..4 {
            let shifted = raw(&(header.to_owned() + &" ".repeat(padding)), &bytes[8 + length..]);
            let config = std::fs::read(path(name).join("config.json")).unwrap();
            let model = Model::empty().with("config.json", &config).with("model.safetensors", &shifted);
            let checkpoint = Checkpoint::open(model.path()).unwrap();
            let (aligned, shifted) = (golden.checkpoint.layer(1).unwrap(), checkpoint.layer(1).unwrap());
            let x = &golden.cases[1].x;
            assert_eq!(specified(&aligned, x, Extra::default()).y, specified(&shifted, x, Extra::default()).y);
            assert_eq!(
                run(&aligned, x, Extra::default(), DType::F32).y,
                run(&shifted, x, Extra::default(), DType::F32).y
            );
        }
    }
}

/// 192 GiB that are not there: whoever reads them takes minutes.
#[test]
fn nothing_of_a_tensor_is_read() {
    let (hidden, inner, experts) = (8192u64, 8192u64, 256);
    let mut header = serde_json::Map::new();
    let mut end = 0;
    let mut add = |name: String, shape: [u64; 2]| {
        let start = end;
        end += shape[0] * shape[1] * 2;
        header.insert(name, json!({ "dtype": "BF16", "shape": shape, "data_offsets": [start, end] }));
    };
    for l in 0..2 {
        add(format!("model.layers.{l}.mlp.gate.weight"), [experts, hidden]);
        for e in 0..experts {
            for (name, shape) in [("gate", [inner, hidden]), ("up", [inner, hidden]), ("down", [hidden, inner])] {
                add(format!("model.layers.{l}.mlp.experts.{e}.{name}_proj.weight"), shape);
            }
        }
    }
    let head = raw(&serde_json::Value::Object(header).to_string(), &[]);
    let mut config = config();
    config["hidden_size"] = json!(hidden);
    config["moe_intermediate_size"] = json!(inner);
    config["num_experts"] = json!(experts);
    config["num_hidden_layers"] = json!(2);
    let model = Model::new(&config, &head);
    let file = std::fs::OpenOptions::new().write(true).open(model.join("model.safetensors")).unwrap();
    file.set_len(head.len() as u64 + end).unwrap();

    let start = Instant::now();
    let summary = Checkpoint::open(model.path()).unwrap().inspect();
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!(summary.bytes, end);
    assert!(summary.layers.iter().all(|layer| layer.problem.is_none()));
}

#[test]
fn write_and_read_back() {
    let model = Model::empty().with("config.json", config().to_string().as_bytes());
    let file = model.join("model.safetensors");
    let data: Vec<f32> = (0..16).map(|i| i as f32).collect();
    let views: Vec<_> =
        tensors().into_iter().map(|(name, shape)| (name, View::of(&data, [shape[0], shape[1]]).unwrap())).collect();
    write_safetensors(&file, views.iter().map(|(name, view)| (name.as_str(), *view))).unwrap();
    let checkpoint = Checkpoint::open(model.path()).unwrap();
    assert_eq!(checkpoint.layer(0).unwrap().weights.router.unwrap().typed::<f32>().unwrap().row(1), &data[4..8]);

    let gaps = View::of(&data, [4, 4]).unwrap().columns(1, 2).unwrap();
    let ids = [1u32, 2, 3];
    write_safetensors(&file, [("gaps", gaps), ("ids", View::of(&ids, [3]).unwrap())]).unwrap();
    let bytes = std::fs::read(&file).unwrap();
    let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let numbers: Vec<f32> =
        read.tensor("gaps").unwrap().data().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    assert_eq!(numbers, [1.0, 2.0, 5.0, 6.0, 9.0, 10.0, 13.0, 14.0]);
    assert_eq!(std::fs::read_dir(model.path()).unwrap().count(), 2);
}

#[test]
fn a_failed_write_leaves_nothing() {
    let data = [0.0f32; 4];
    let view = View::of(&data, [4]).unwrap();
    let error = write_safetensors("/nowhere/at/all.safetensors", [("a", view)]).unwrap_err();
    assert!(matches!(&error, WriteError::Io { .. }) && error.to_string().contains("/nowhere/at/all"), "{error}");

    let model = Model::empty();
    let error = write_safetensors(model.join("a.safetensors"), [("a", view), ("a", view)]).unwrap_err();
    assert!(matches!(error, WriteError::Duplicate { .. }));
    std::fs::create_dir(model.join("taken")).unwrap();
    std::fs::write(model.join("taken/file"), b"").unwrap();
    assert!(write_safetensors(model.join("taken"), [("a", view)]).is_err());
    assert_eq!(std::fs::read_dir(model.path()).unwrap().count(), 1);
}

#[test]
#[cfg(unix)]
fn writing_over_what_is_there() {
    use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
    let data = [0.0f32; 4];
    let view = View::of(&data, [4]).unwrap();
    let model = Model::empty().with("old", b"old");
    let (old, new) = (model.join("old"), model.join("new"));

    std::fs::set_permissions(&old, std::fs::Permissions::from_mode(0o640)).unwrap();
    write_safetensors(&old, [("a", view)]).unwrap();
    assert_eq!(std::fs::metadata(&old).unwrap().permissions().mode() & 0o777, 0o640);

    std::fs::create_dir(model.join("links")).unwrap();
    let (link, dangling) = (model.join("links/a"), model.join("links/b"));
    symlink("../old", &link).unwrap();
    symlink(&new, &dangling).unwrap();
    for (link, target) in [(&link, &old), (&dangling, &new)] {
        write_safetensors(link, [("linked", view)]).unwrap();
        assert!(std::fs::symlink_metadata(link).unwrap().is_symlink());
        let bytes = std::fs::read(target).unwrap();
        assert!(safetensors::SafeTensors::deserialize(&bytes).unwrap().tensor("linked").is_ok());
    }
    let circle = model.join("links/circle");
    symlink("circle", &circle).unwrap();
    assert!(matches!(write_safetensors(&circle, [("a", view)]), Err(WriteError::Io { .. })));

    let pipe = model.join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    symlink(&pipe, model.join("links/pipe")).unwrap();
    for path in [pipe.clone(), model.join("links/pipe"), model.join("links")] {
        let error = write_safetensors(&path, [("a", view)]).unwrap_err();
        assert!(matches!(error, WriteError::NotAFile { .. }), "{error}");
        assert!(error.to_string().contains("not a regular file; nothing was written"), "{error}");
    }
    assert!(std::fs::symlink_metadata(&pipe).unwrap().file_type().is_fifo());
    assert_eq!(std::fs::read_dir(model.path()).unwrap().count(), 4);
}

#[test]
#[cfg(unix)]
fn files_of_a_checkpoint() {
    let model = Model::empty().with("blob", &file(&tensors())).with("config.json", config().to_string().as_bytes());
    std::os::unix::fs::symlink("blob", model.join("model.safetensors")).unwrap();
    let checkpoint = Checkpoint::open(model.path()).unwrap();
    assert_eq!(checkpoint.files().collect::<Vec<_>>(), [model.join("blob").canonicalize().unwrap()]);
    assert_eq!(checkpoint.inspect().files, [model.join("model.safetensors")]);
}

#[test]
fn devices() {
    struct Name;
    impl Visitor for Name {
        type Output = &'static str;
        fn visit<B: Backend>(self, backend: &B) -> &'static str {
            backend.name()
        }
    }
    let list = Device::list();
    let cpu = list.iter().find(|device| device.name == "cpu").unwrap();
    assert_eq!(cpu.available, Ok(()));
    assert!(!cpu.description.is_empty());
    assert!(list.is_sorted_by_key(|device| std::cmp::Reverse(device.preference)));
    let best = list.iter().find(|device| device.available.is_ok()).unwrap().name.split(':').next().unwrap();
    assert_eq!(Device::by_name("cpu").unwrap().visit(Name), "cpu");
    assert_eq!(Device::by_name("auto").unwrap().visit(Name), best);
    assert!(matches!(Device::by_name("tpu"), Err(DeviceError::Unknown { known, .. }) if known.contains(&"cpu")));
    // a word about the choice if and only if the first could not be had
    let why = Device::best_and_why().unwrap().1;
    assert_eq!(why.is_some(), list[0].available.is_err());
    if let (Some(why), Err(reason)) = (why, &list[0].available) {
        assert!(why.starts_with(best) && why.contains(reason), "{why}");
    }
}
