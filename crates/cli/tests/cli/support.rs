//! Runs of the program, and small models for them.

use fused_moe::checkpoint::write_safetensors;
use fused_moe::{HostView, Shape};
use half::{bf16, f16};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_fmoe");

/// A command line.
pub(crate) struct Call(Command);

/// What a run left behind.
pub(crate) struct Ran {
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    /// What was said of the choice of a device, before all else.
    pub(crate) choice: String,
    code: Option<i32>,
}

pub(crate) fn fmoe<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Call {
    let mut command = Command::new(PROGRAM);
    // a layer of Mesa's looks for a desktop, and writes to standard error where there is none; help is as wide as COLUMNS
    command.args(arguments).current_dir(std::env::temp_dir()).env("NODEVICE_SELECT", "1").env("COLUMNS", "100");
    Call(command)
}

impl Call {
    pub(crate) fn args<S: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.0.args(arguments);
        self
    }

    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.0.env(name, value);
        self
    }

    /// With a Vulkan loader, if there is one, that finds no driver.
    pub(crate) fn without_adapters(self) -> Self {
        self.env("VK_DRIVER_FILES", "/nonexistent").env("VK_ICD_FILENAMES", "/nonexistent")
    }

    fn ran(mut self) -> Ran {
        let out = self.0.output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let (choice, stderr) = split(text(out.stderr));
        let ran = Ran { stdout: text(out.stdout), stderr, choice, code: out.status.code() };
        assert!(!ran.stderr.contains("panicked"), "{ran}");
        ran
    }

    pub(crate) fn succeeds(self) -> Ran {
        let ran = self.ran();
        assert_eq!(ran.code, Some(0), "{ran}");
        ran
    }

    pub(crate) fn fails(self, code: i32) -> Ran {
        let ran = self.ran();
        assert_eq!(ran.code, Some(code), "{ran}");
        ran
    }

    /// Fails with an error that has all these parts, and a remedy.
    pub(crate) fn errs<const N: usize>(self, parts: [&str; N]) -> Ran {
        self.says(1, parts)
    }

    /// A command line that makes no sense: as `errs`, with a code of its own.
    pub(crate) fn misuses<const N: usize>(self, parts: [&str; N]) -> Ran {
        self.says(2, parts)
    }

    fn says<const N: usize>(self, code: i32, parts: [&str; N]) -> Ran {
        let ran = self.fails(code);
        assert!(ran.stderr.starts_with("error: ") && ran.stderr.contains("\nhelp: "), "{ran}");
        for part in parts {
            assert!(ran.stderr.contains(part), "{part:?} is missing: {ran}");
        }
        ran
    }
}

fn is_about(line: &str) -> bool {
    line.starts_with("warning: kernels cannot be kept in ") || (line.starts_with("on ") && line.contains(", since "))
}

/// The line about the choice of a device or its kernels, where there is one, and the rest of standard error.
fn split(stderr: String) -> (String, String) {
    match stderr.split_once('\n') {
        Some((choice, rest)) if is_about(choice) => (choice.into(), rest.into()),
        _ => (String::new(), stderr),
    }
}

impl fmt::Display for Ran {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "exit {:?}\n--- stdout\n{}--- stderr\n{}\n{}---", self.code, self.stdout, self.choice, self.stderr)
    }
}

/// A file of the golden data of a small model.
pub(crate) fn golden(name: &str) -> String {
    format!("{}/../fused-moe/tests/goldens/qwen3_moe/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// A qwen3_moe model of two layers: H 16, I 8, E 4, K 2.
pub(crate) struct Model {
    config: serde_json::Value,
    tensors: BTreeMap<String, Vec<usize>>,
}

/// A model on disk.
pub(crate) struct Written(TempDir);

impl Model {
    pub(crate) fn new() -> Self {
        let config = serde_json::json!({
            "model_type": "qwen3_moe", "hidden_size": 16, "moe_intermediate_size": 8, "num_experts": 4,
            "num_experts_per_tok": 2, "num_hidden_layers": 2, "norm_topk_prob": true, "hidden_act": "silu",
            "decoder_sparse_step": 1, "mlp_only_layers": [],
        });
        let mut tensors = BTreeMap::new();
        for layer in 0..2 {
            let block = format!("model.layers.{layer}.mlp");
            tensors.insert(format!("{block}.gate.weight"), vec![4, 16]);
            for expert in 0..4 {
                for (name, shape) in [("gate_proj", [8, 16]), ("up_proj", [8, 16]), ("down_proj", [16, 8])] {
                    tensors.insert(format!("{block}.experts.{expert}.{name}.weight"), shape.to_vec());
                }
            }
        }
        Self { config, tensors }
    }

    pub(crate) fn with(mut self, field: &str, value: impl Into<serde_json::Value>) -> Self {
        self.config[field] = value.into();
        self
    }

    pub(crate) fn without(mut self, tensor: &str) -> Self {
        assert!(self.tensors.remove(tensor).is_some());
        self
    }

    pub(crate) fn shaped(mut self, tensor: &str, shape: [usize; 2]) -> Self {
        assert!(self.tensors.insert(tensor.into(), shape.to_vec()).is_some());
        self
    }

    pub(crate) fn write(self) -> Written {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), self.config.to_string()).unwrap();
        let data: Vec<(String, Vec<f32>, [usize; 2])> = self
            .tensors
            .into_iter()
            .enumerate()
            .map(|(seed, (name, shape))| {
                let count = shape.iter().product();
                let values = (0..count).map(|i| ((i * 37 + seed * 11) as f32 * 0.618).sin() * 0.4).collect();
                (name, values, [shape[0], shape[1]])
            })
            .collect();
        let views = data.iter().map(|(name, values, shape)| (name.as_str(), HostView::of(values, *shape).unwrap()));
        write_safetensors(folder.path().join("model.safetensors"), views).unwrap();
        Written(folder)
    }
}

impl Written {
    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn name(&self) -> &str {
        self.0.path().to_str().unwrap()
    }

    pub(crate) fn file(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }
}

/// Writes a tensor `x` beside a model.
pub(crate) fn input(model: &Written, file: &str, format: &str, shape: &[usize]) -> String {
    let value = |i: usize| (i as f32 * 0.73).sin();
    let count: usize = shape.iter().product();
    let path = model.file(file);
    let dims = match *shape {
        [n] => Shape::from([n]),
        [a, b] => Shape::from([a, b]),
        [a, b, c] => Shape::from([a, b, c]),
        _ => panic!("{shape:?}"),
    };
    let write = |view| write_safetensors(&path, [("x", view)]).unwrap();
    match format {
        "f32" => write(HostView::of(&(0..count).map(value).collect::<Vec<_>>(), dims).unwrap()),
        "f16" => write(HostView::of(&(0..count).map(|i| f16::from_f32(value(i))).collect::<Vec<_>>(), dims).unwrap()),
        "bf16" => write(HostView::of(&(0..count).map(|i| bf16::from_f32(value(i))).collect::<Vec<_>>(), dims).unwrap()),
        "u32" => write(HostView::of(&(0..count as u32).collect::<Vec<_>>(), dims).unwrap()),
        "f64" => {
            let bytes = (0..count).flat_map(|i| f64::from(value(i)).to_le_bytes()).collect::<Vec<u8>>();
            let header = format!(r#"{{"x":{{"dtype":"F64","shape":{shape:?},"data_offsets":[0,{}]}}}}"#, bytes.len());
            raw(Path::new(&path), &header, &bytes);
        }
        _ => panic!("{format}"),
    }
    path
}

/// Writes a tensor `x` in f32 beside a model.
pub(crate) fn input_of(model: &Written, file: &str, shape: &[usize; 2], value: impl Fn(usize) -> f32) -> String {
    let data: Vec<f32> = (0..shape[0] * shape[1]).map(value).collect();
    write_safetensors(model.file(file), [("x", HostView::of(&data, *shape).unwrap())]).unwrap();
    model.file(file)
}

/// Says of a model's tensors that they have another format of as many bytes.
pub(crate) fn rewrite(model: &Written, from: &str, to: &str) {
    let file = model.file("model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = std::str::from_utf8(&bytes[8..8 + length]).unwrap().replace(from, to);
    raw(Path::new(&file), &header, &bytes[8 + length..]);
}

/// Writes a safetensors file as it is told, right or wrong.
pub(crate) fn raw(path: &Path, header: &str, data: &[u8]) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    std::fs::write(path, bytes).unwrap();
}
