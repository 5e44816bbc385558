//! Layers straight from the files that models are published in.
//!
//! [`Checkpoint::open`] takes a Hugging Face model directory; one table of model families says where a family keeps
//! its numbers and its tensors.

mod describe;
mod directory;
mod error;
mod families;
mod family;
mod file;
mod inspect;
mod layer;
mod model_config;
mod parts;
mod resolve;
mod write;

pub use error::{Error, HeaderError, Result, TensorProblem};
pub use inspect::{LayerSummary, Sizes, Summary};
pub use layer::CheckpointLayer;
pub use model_config::{known_families, known_model_types};
pub use write::{WriteError, write_safetensors};

use directory::Files;
use family::Family;
use model_config::ModelConfig;
use std::path::{Path, PathBuf};

/// A model on disk, memory-mapped: nothing of a tensor is read before a layer is prepared.
///
/// ```
/// use fused_moe::checkpoint::Checkpoint;
/// let checkpoint = Checkpoint::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/qwen3_moe"))?;
/// let layer = checkpoint.layer(1)?;
/// assert_eq!((layer.config.experts, layer.config.top_k), (8, 3));
/// # Ok::<(), fused_moe::checkpoint::Error>(())
/// ```
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    files: Files,
    config: ModelConfig,
    family: &'static Family,
    count: usize,
    moe: Vec<usize>,
}

impl Checkpoint {
    /// Opens a model directory (`config.json` beside `model.safetensors`, `model.safetensors.index.json` with its
    /// shards, or one other `.safetensors` file), or a `.safetensors` file with `config.json` beside it.
    ///
    /// The files are mapped: while the checkpoint lives they must be neither changed nor cut. Replacing them by
    /// renaming, as [`write_safetensors`] does, is safe.
    ///
    /// Errors: everything in [`Error`] but what concerns a single layer.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let files = Files::open(path)?;
        let (config, family) = ModelConfig::open(&files.config)?;
        let count = resolve::layer_count(&config, family)?;
        let moe = resolve::moe_layers(&config, family, count)?;
        Ok(Self { path: path.into(), files, config, family, count, moe })
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files that its tensors lie in, without symbolic links: what must not be written while it lives.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.real_paths()
    }

    /// The layers that have experts, whether or not their tensors are in these files.
    pub fn layers(&self) -> &[usize] {
        &self.moe
    }

    /// The first MoE layer whose tensors are in these files: a checkpoint may hold a part of its model.
    pub fn first_stored_layer(&self) -> Option<usize> {
        self.moe.iter().copied().find(|&index| layer::is_stored(&self.files, self.family, index))
    }

    /// Layer `index` of the model, counted from 0 over all its layers.
    ///
    /// Errors: `NoSuchLayer`, `DenseLayer`; `ConfigMissing`, `ConfigValue` and `Config` when config.json does not
    /// describe a layer; `Tensors` with everything that is missing, misshapen or of a format that cannot be read,
    /// `Quantised` if config.json says why; `MixedFormats`; `Layer` if all that does not make a layer. What is returned
    /// passes a backend's checks.
    pub fn layer(&self, index: usize) -> Result<CheckpointLayer<'_>> {
        if index >= self.count {
            return Err(Error::NoSuchLayer { path: self.path.clone(), layer: index, count: self.count });
        }
        if self.moe.binary_search(&index).is_err() {
            return Err(Error::DenseLayer { path: self.path.clone(), layer: index, moe: self.moe.clone() });
        }
        let config = resolve::layer_config(&self.config, self.family, index)?;
        layer::load(self, index, config)
    }

    /// What the checkpoint holds, without reading a tensor.
    pub fn inspect(&self) -> Summary {
        inspect::summary(self)
    }
}
