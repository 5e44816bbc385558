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
mod fit;
mod inspect;
mod layer;
mod model_config;
mod parts;
mod resolve;
mod write;

pub use error::{Error, HeaderError, Result, TensorProblem, layer_numbers};
pub use inspect::{LayerKind, LayerSummary, Sizes, Summary};
pub use layer::CheckpointLayer;
pub use model_config::{known_families, known_model_types};
pub use write::{WriteError, write_safetensors};

use directory::Files;
use family::Family;
use layer::Copies;
use model_config::ModelConfig;
use std::path::{Path, PathBuf};

/// A model on disk, memory-mapped: no weight is read before a layer is prepared, but for single numbers, and for routers
/// that lie the other way, tables of experts by token id and correction biases whose end is fixed, which
/// [`layer`](Self::layer) copies.
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
    parts: Vec<&'static str>,
    /// One for each of `moe`.
    copies: Vec<Copies>,
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
        Self::open_as(path.as_ref(), None)
    }

    /// Opens one of several language models in a directory, as [`parts`](Self::parts) has it: of a model that thinks and
    /// talks, the talker; of decoder and encoder, the encoder. The last word of a name will do: `encoder`.
    /// [`open`](Self::open) takes the first that has layers in
    /// these files.
    ///
    /// Errors: those of `open`, and `NoSuchPart`.
    pub fn open_part(path: impl AsRef<Path>, part: &str) -> Result<Self> {
        Self::open_as(path.as_ref(), Some(part))
    }

    fn open_as(path: &Path, part: Option<&str>) -> Result<Self> {
        let files = Files::open(path)?;
        let mut models = ModelConfig::open(&files.config)?;
        let parts: Vec<&'static str> = models.iter().map(|(_, family)| family.name).collect();
        let has_router = |family: &Family, index: usize| layer::stored_router(&files, family, index).is_some();
        let layers =
            |config: &ModelConfig, family: &Family| resolve::layers(config, family, |index| has_router(family, index));
        let stored = |(config, family): &(ModelConfig, &'static Family)| {
            layers(config, family).is_ok_and(|(_, moe)| moe.iter().any(|&index| has_router(family, index)))
        };
        let chosen = match part {
            None if models.len() == 1 => 0,
            None => models.iter().position(stored).unwrap_or(0),
            Some(part) => {
                let named = models.iter().position(|(_, family)| family.name == part);
                named.or_else(|| abbreviated(&models, part)).ok_or_else(|| Error::NoSuchPart {
                    path: path.into(),
                    part: part.into(),
                    parts: parts.clone(),
                })?
            }
        };
        let (config, family) = models.swap_remove(chosen);
        let (count, moe) = layers(&config, family)?;
        let copies = moe.iter().map(|_| Copies::default()).collect();
        Ok(Self { path: path.into(), files, config, family, count, moe, parts, copies })
    }

    /// The language models with experts that config.json describes, by family: most have one.
    pub fn parts(&self) -> &[&'static str] {
        &self.parts
    }

    fn copies(&self, index: usize) -> Option<&Copies> {
        self.copies.get(self.moe.binary_search(&index).ok()?)
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
        self.moe.iter().copied().find(|&index| layer::stored_router(&self.files, self.family, index).is_some())
    }

    /// Layer `index` of the model, counted from 0 over all its layers.
    ///
    /// Errors: `NoSuchLayer`, `DenseLayer`, `DenseWithExperts`; `ConfigMissing`, `ConfigValue`, `ConfigUnsupported`,
    /// `ConfigContradiction` and `Config` when config.json does not describe a layer; `Tensors` with everything that is
    /// missing, misshapen or of a format that cannot be read, `Quantised` if config.json says why; `MixedFormats`; `Layer`
    /// if all that does not make a layer. What is returned passes a backend's checks.
    pub fn layer(&self, index: usize) -> Result<CheckpointLayer<'_>> {
        if index >= self.count {
            return Err(Error::NoSuchLayer { path: self.path.clone(), layer: index, count: self.count });
        }
        if self.moe.binary_search(&index).is_ok() {
            return layer::load(self, index);
        }
        let path = self.path.clone();
        match layer::stored_router(&self.files, self.family, index) {
            Some(tensor) => {
                let fields = resolve::dense_by(&self.config, self.family, index)?;
                Err(Error::DenseWithExperts { path, layer: index, fields, tensor })
            }
            None => Err(Error::DenseLayer { path, layer: index, moe: self.moe.clone() }),
        }
    }

    /// What the checkpoint holds, from headers and what [`layer`](Self::layer) reads.
    pub fn inspect(&self) -> Summary {
        inspect::summary(self)
    }
}

/// The one model whose name, or whose type's name, ends in this word.
fn abbreviated(models: &[(ModelConfig, &'static Family)], word: &str) -> Option<usize> {
    let ends = |name: &str| name.strip_suffix(word).is_some_and(|name| name.ends_with('_'));
    let mut fitting = models
        .iter()
        .enumerate()
        .filter(|(_, (_, family))| ends(family.name) || family.model_types.iter().any(|name| ends(name)));
    match (fitting.next(), fitting.next()) {
        (Some((at, _)), None) => Some(at),
        _ => None,
    }
}
