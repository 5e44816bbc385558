//! The tensors of one layer.

mod around;
mod experts;
mod router;
mod tensors;

use super::Checkpoint;
use super::directory::Files;
use super::error::{Error, LISTED, Result, TensorProblem};
use super::family::Family;
use super::model_config::ALIKE;
use super::resolve;
use fused_moe_core::config::LayerConfig;
use fused_moe_core::problem::LayerProblem;
use fused_moe_core::weights::LayerWeights;
use fused_moe_core::{Backend, Options};
use std::collections::HashSet;
use std::sync::OnceLock;
use tensors::Tensors;

type Contract<T> = fused_moe_core::Result<T>;

/// One MoE layer of a checkpoint: its description, and its tensors where they lie in the mapped file.
#[derive(Clone, Debug)]
pub struct CheckpointLayer<'a> {
    /// Its number in the model.
    pub index: usize,
    /// What its tensors' names begin with.
    pub name: String,
    /// What it computes.
    pub config: LayerConfig,
    /// What it is made of.
    pub weights: LayerWeights<'a>,
    /// Whether a call says where its sequences begin ([`Forward::sequences`](fused_moe_core::operation::Forward)): the
    /// layer has a capacity, and each sequence its own.
    pub by_sequence: bool,
    /// What of the block is no part of the layer, if it has more.
    pub beside: Option<&'static str>,
}

impl CheckpointLayer<'_> {
    /// The layer on a device: [`Backend::prepare`] of its description and weights. The checkpoint is not needed
    /// afterwards.
    ///
    /// Errors: the backend's.
    pub fn prepare<B: Backend>(&self, backend: &B, options: &Options) -> Result<B::Layer, B::Error> {
        backend.prepare(&self.config, &self.weights, options)
    }
}

/// What the files do not hold as a layer takes it: copies of what lies or reads otherwise, made when it is first asked for.
#[derive(Debug, Default)]
pub(super) struct Copies {
    router: OnceLock<Vec<u8>>,
    correction: OnceLock<Vec<u8>>,
    expert_scale: OnceLock<Vec<u8>>,
}

/// The description of a layer, and its tensors.
pub(super) fn load(checkpoint: &Checkpoint, index: usize) -> Result<CheckpointLayer<'_>> {
    let Checkpoint { files, family, .. } = checkpoint;
    let name = block(files, family, index);
    let mut tensors = Tensors::new(files, &name);
    let mut config = resolve::layer_config(&checkpoint.config, family, index)?;
    let invalid = |source: fused_moe_core::Error| {
        let path = checkpoint.path.clone();
        Error::Layer { path, layer: index, source: source.into() }
    };
    if let Some(factor) = tensors.factor(family) {
        config.routing.weights.scale *= factor;
    }
    let first = checkpoint.moe.first() == Some(&index);
    let biased = checkpoint.config.flag(family.router_biased, index)?;
    let vocabulary = match &family.table {
        Some(table) => checkpoint.config.optional_size(table.vocabulary, index)?,
        None => None,
    };
    let copies = checkpoint.copies(index);
    let bias = if biased { family.router_bias } else { &[] };
    let weights = LayerWeights {
        router: tensors.router(family, &config, copies),
        router_bias: tensors.vector(bias, [1, config.choices()]),
        router_norm: tensors.router_norm(family, &config),
        correction_bias: tensors.correction(family, &config, copies),
        expert_scale: tensors.expert_scale(family, &config, copies),
        table: tensors.table(family, &config, vocabulary),
        latent: tensors.latent(&family.around, &config),
        experts: tensors.experts(family, &config).map_err(invalid)?,
        shared: tensors.shared(family, &config).map_err(invalid)?,
        norms: tensors.norms(&family.around, &config),
        router_mlp: tensors.router_mlp(family, &config, first),
    };
    let (problems, read) = (tensors.problems, tensors.read);
    if !problems.is_empty() || weights.router.is_none() {
        let read: HashSet<String> = read.into_iter().collect();
        let of_layer = prefix(&name, index);
        let others: Vec<&str> = files.names(of_layer).filter(|name| !read.contains(*name)).collect();
        return Err(unfit(checkpoint, index, nearest(problems, &others, of_layer.len())));
    }
    LayerProblem::new(&config, &weights, &Options::default()).map_err(invalid)?;
    let by_sequence = family.capacity.is_some_and(|capacity| !capacity.whole_call);
    Ok(CheckpointLayer { index, name, config, weights, by_sequence, beside: family.beside })
}

/// What the names of a layer's tensors begin with, given the name of its block.
fn prefix(block: &str, index: usize) -> &str {
    let number = format!(".{index}.");
    match block.find(&number) {
        Some(at) => block.get(..at + number.len()).unwrap_or(block),
        None => block,
    }
}

/// Adds to what is missing the likest names of the same layer that nothing has read; they have the first `common` bytes in
/// common.
fn nearest(mut problems: Vec<TensorProblem>, others: &[&str], common: usize) -> Vec<TensorProblem> {
    // a message has no more
    for problem in problems.iter_mut().take(LISTED) {
        let TensorProblem::Missing { names, nearest, .. } = problem else { continue };
        let likeness = |other: &str| {
            let own = |name: &str| name.get(common..).unwrap_or_default().to_owned();
            names.iter().map(|name| strsim::jaro_winkler(&own(name), &own(other))).fold(0.0, f64::max)
        };
        let scored = others.iter().map(|&other| (likeness(other), other)).filter(|(score, _)| *score >= ALIKE);
        *nearest = scored.max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, other)| other.to_owned());
    }
    problems
}

fn unfit(checkpoint: &Checkpoint, layer: usize, problems: Vec<TensorProblem>) -> Error {
    let path = checkpoint.path.clone();
    let unread = |p: &TensorProblem| matches!(p, TensorProblem::Missing { .. } | TensorProblem::Format { .. });
    let mixed = |p: &TensorProblem| matches!(p, TensorProblem::Mixed { .. });
    match checkpoint.config.quantisation() {
        Some(method) if problems.iter().any(unread) => {
            Error::Quantised { path, layer, method: method.into(), problems }
        }
        _ if problems.iter().any(mixed) && problems.iter().all(mixed) => Error::MixedFormats { path, layer, problems },
        _ => Error::Tensors { path, layer, problems },
    }
}

/// The router of a layer's block, if the files hold it.
pub(super) fn stored_router(files: &Files, family: &Family, index: usize) -> Option<String> {
    blocks(family, index).find_map(|block| router_of(files, family, &block))
}

fn router_of(files: &Files, family: &Family, block: &str) -> Option<String> {
    family.router.iter().map(|router| full(block, router)).find(|name| files.tensor(name).is_some())
}

/// The block that has the router; failing that, one that has any tensor; failing that, one where other layers are;
/// failing that, the family's first.
fn block(files: &Files, family: &Family, index: usize) -> String {
    let routed = |block: &String| router_of(files, family, block).is_some();
    let present = |block: &String| files.has_prefix(&format!("{block}."));
    let number = format!(".{index}");
    let beside = |block: &String| {
        block.find(&number).and_then(|at| block.get(..=at)).is_some_and(|layers| files.has_prefix(layers))
    };
    let mut candidates = blocks(family, index);
    candidates
        .clone()
        .find(routed)
        .or_else(|| candidates.clone().find(present))
        .or_else(|| candidates.clone().find(beside))
        .or_else(|| candidates.next())
        .unwrap_or_default()
}

fn blocks(family: &Family, index: usize) -> impl Iterator<Item = String> + Clone {
    let layer = index.to_string();
    let (roots, blocks) = (family.roots, family.blocks);
    roots.iter().flat_map(move |root| {
        let layer = layer.clone();
        blocks.iter().map(move |block| format!("{root}{}", block.replace("{l}", &layer)))
    })
}

/// The full name of a tensor that is named relative to a block.
fn full(block: &str, name: &str) -> String {
    match name.strip_prefix("../") {
        Some(name) => format!("{}.{name}", block.rsplit_once('.').map_or("", |(parent, _)| parent)),
        None => format!("{block}.{name}"),
    }
}
