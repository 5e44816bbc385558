//! Made-up checkpoints, written byte by byte so that they can be wrong.

use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A qwen3_moe with H = 4, I = 2, E = 2, K = 1 and one layer.
pub(crate) fn config() -> Value {
    json!({
        "model_type": "qwen3_moe", "num_hidden_layers": 1, "hidden_size": 4, "moe_intermediate_size": 2,
        "num_experts": 2, "num_experts_per_tok": 1, "norm_topk_prob": true, "decoder_sparse_step": 1,
    })
}

/// Its tensors.
pub(crate) fn tensors() -> Vec<(String, Vec<usize>)> {
    let mut all = vec![("model.layers.0.mlp.gate.weight".to_owned(), vec![2, 4])];
    for e in 0..2 {
        for (name, shape) in [("gate_proj", [2, 4]), ("up_proj", [2, 4]), ("down_proj", [4, 2])] {
            all.push((format!("model.layers.0.mlp.experts.{e}.{name}.weight"), shape.to_vec()));
        }
    }
    all
}

/// A file of F32 tensors.
pub(crate) fn file(tensors: &[(String, Vec<usize>)]) -> Vec<u8> {
    file_of(tensors, "F32", 4)
}

/// A file of tensors in a format of so many bytes.
pub(crate) fn file_of(tensors: &[(String, Vec<usize>)], format: &str, size: usize) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in tensors {
        let start = end;
        end += shape.iter().product::<usize>() * size;
        header.insert(name.clone(), json!({ "dtype": format, "shape": shape, "data_offsets": [start, end] }));
    }
    let data: Vec<u8> = (0..end / 4).flat_map(|i| (i as f32 * 0.01).to_le_bytes()).chain(vec![0; end % 4]).collect();
    raw(&Value::Object(header).to_string(), &data)
}

/// A file with this header, whatever it says.
pub(crate) fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// A directory of files.
pub(crate) struct Model {
    directory: TempDir,
}

impl Model {
    pub(crate) fn new(config: &Value, file: &[u8]) -> Self {
        Self::empty().with("config.json", config.to_string().as_bytes()).with("model.safetensors", file)
    }

    pub(crate) fn empty() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn with(self, name: &str, contents: &[u8]) -> Self {
        std::fs::write(self.directory.path().join(name), contents).unwrap();
        self
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }
}
