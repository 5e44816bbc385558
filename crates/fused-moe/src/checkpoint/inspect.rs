//! What a checkpoint holds, from its headers.

use super::describe::kind;
use super::family::Family;
use super::layer::{CheckpointLayer, stored_router};
use super::{Checkpoint, Error, TensorProblem};
use fused_moe_core::config::LayerConfig;
use fused_moe_core::weights::{ExpertMatrices, LayerWeights, Matrix};
use fused_moe_core::{DType, HostView};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// A checkpoint in short.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Summary {
    /// Where it was opened.
    pub path: PathBuf,
    /// The files that tensors lie in.
    pub files: Vec<PathBuf>,
    /// How many tensors they hold, of all kinds.
    pub tensors: usize,
    /// The entry of the table of families.
    pub family: &'static str,
    /// The model type in config.json.
    pub model_type: String,
    /// The language models that config.json describes, by family, if this is one of several.
    pub parts: Vec<&'static str>,
    /// What the block has that is no part of the layer, if it has more.
    pub beside: Option<&'static str>,
    /// How many layers the model has.
    pub layer_count: usize,
    /// Which of them have experts by config.json.
    pub moe_layers: Vec<usize>,
    /// What the MoE layers that can be read are, one entry for those that are alike.
    pub kinds: Vec<LayerKind>,
    /// Parameters of the MoE layers that are here.
    pub parameters: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes by number format.
    pub formats: BTreeMap<String, u64>,
    /// The MoE layers, one by one, and those that have a router and are dense by config.json.
    pub layers: Vec<LayerSummary>,
}

impl Summary {
    /// Whether any layer can run.
    pub fn runs(&self) -> bool {
        self.layers.iter().any(|layer| layer.problem.is_none())
    }
}

/// Layers that are alike in all but their weights, in words.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct LayerKind {
    /// Their numbers.
    pub layers: Vec<usize>,
    /// Their sizes.
    pub sizes: Sizes,
    /// Where a token goes and with what weights, in one sentence.
    pub routing: String,
    /// How the router makes its logits, where that is more than a product.
    pub router: Option<String>,
    /// What a routed expert computes between its matrices, as a formula.
    pub activation: String,
    /// What biases the routed experts have.
    pub biases: Option<String>,
    /// The expert that every token goes to.
    pub shared: Option<String>,
    /// Projections and norms around the experts.
    pub around: Option<String>,
}

impl LayerKind {
    fn is_like(&self, other: &Self) -> bool {
        let words = |kind: &Self| {
            let Self { layers: _, sizes, routing, router, activation, biases, shared, around } = kind.clone();
            (sizes, routing, router, activation, biases, shared, around)
        };
        words(self) == words(other)
    }
}

/// The sizes of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Sizes {
    /// H.
    pub hidden: usize,
    /// I.
    pub intermediate: usize,
    /// E.
    pub experts: usize,
    /// K.
    pub top_k: usize,
    /// S.
    pub shared_intermediate: Option<usize>,
    /// L.
    pub latent: Option<usize>,
}

/// One MoE layer.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct LayerSummary {
    /// Its number in the model.
    pub index: usize,
    /// What its tensors' names begin with, if it can be read.
    pub name: Option<String>,
    /// Its parameters.
    pub parameters: u64,
    /// Its bytes.
    pub bytes: u64,
    /// Bytes of one routed expert.
    pub expert_bytes: u64,
    /// Why it cannot run, if it cannot.
    pub problem: Option<String>,
}

pub(super) fn summary(checkpoint: &Checkpoint) -> Summary {
    let mut summary = Summary {
        path: checkpoint.path.clone(),
        files: checkpoint.files.paths().map(Into::into).collect(),
        tensors: checkpoint.files.len(),
        family: checkpoint.family.name,
        model_type: checkpoint.config.model_type().into(),
        parts: if checkpoint.parts.len() > 1 { checkpoint.parts.clone() } else { Vec::new() },
        beside: checkpoint.family.beside,
        layer_count: checkpoint.count,
        moe_layers: checkpoint.moe.clone(),
        kinds: Vec::new(),
        parameters: 0,
        bytes: 0,
        formats: BTreeMap::new(),
        layers: Vec::new(),
    };
    let dense = |index: &usize| checkpoint.moe.binary_search(index).is_err();
    let routed = |index: &usize| stored_router(&checkpoint.files, checkpoint.family, *index).is_some();
    for index in (0..checkpoint.count).filter(|index| !dense(index) || routed(index)) {
        let layer = checkpoint.layer(index);
        match layer.and_then(|layer| Ok((kind(&layer, &checkpoint.config, checkpoint.family)?, layer))) {
            Ok((kind, layer)) => summary.add(&layer, kind, checkpoint.family),
            Err(error) => summary.layers.push(LayerSummary {
                index,
                name: None,
                parameters: 0,
                bytes: 0,
                expert_bytes: 0,
                problem: Some(short(&error)),
            }),
        }
    }
    summary
}

impl Summary {
    fn add(&mut self, layer: &CheckpointLayer<'_>, kind: LayerKind, family: &Family) {
        match self.kinds.iter_mut().find(|known| known.is_like(&kind)) {
            Some(known) => known.layers.push(layer.index),
            None => self.kinds.push(kind),
        }
        let mut total = Tally::default();
        let weights = &layer.weights;
        for view in views(weights, family) {
            total.view(&view);
        }
        let mut expert_bytes = 0;
        let mut last_bias = None;
        for expert in weights.experts.iter() {
            let before = total.bytes();
            let bias = expert.down_bias.as_ref().and_then(|bias| bias.contiguous_row(0)).map(<[u8]>::as_ptr);
            // one bias of all experts is there once
            let shared = bias.is_some() && bias == last_bias;
            total.expert(&ExpertMatrices { down_bias: expert.down_bias.filter(|_| !shared), ..*expert });
            last_bias = bias;
            expert_bytes = total.bytes() - before;
        }
        if let Some(shared) = &weights.shared {
            total.expert(&shared.matrices);
        }
        self.parameters += total.parameters;
        self.bytes += total.bytes();
        for (format, bytes) in &total.formats {
            *self.formats.entry(format.clone()).or_default() += bytes;
        }
        self.layers.push(LayerSummary {
            index: layer.index,
            name: Some(layer.name.clone()),
            parameters: total.parameters,
            bytes: total.bytes(),
            expert_bytes,
            problem: None,
        });
    }
}

/// Everything in the files but the matrices of experts.
fn views<'a>(weights: &LayerWeights<'a>, family: &Family) -> impl Iterator<Item = HostView<'a>> {
    let norms = &weights.norms;
    let vectors = [
        weights.router,
        weights.router_bias,
        weights.router_norm,
        weights.correction_bias,
        weights.expert_scale.filter(|_| !family.expert_scale.is_empty()),
        norms.experts_in,
        norms.expert_out,
        norms.routed_out,
        norms.shared_in,
        norms.shared_out,
        norms.out,
        weights.shared.as_ref().and_then(|shared| shared.gate),
    ];
    let latent = weights.latent.map(|latent| [latent.down, latent.up]);
    let layers = weights.router_mlp.map(|mlp| {
        let biases = [mlp.down_bias, mlp.fc1_bias, mlp.fc2_bias, mlp.norm, mlp.state_scale];
        [mlp.down, mlp.fc1, mlp.fc2].into_iter().chain(biases.into_iter().flatten())
    });
    vectors.into_iter().flatten().chain(latent.into_iter().flatten()).chain(layers.into_iter().flatten())
}

pub(super) fn sizes(config: &LayerConfig) -> Sizes {
    Sizes {
        hidden: config.hidden,
        intermediate: config.intermediate,
        experts: config.experts,
        top_k: config.top_k,
        shared_intermediate: config.shared.map(|shared| shared.intermediate),
        latent: config.latent,
    }
}

/// An error without the list of every tensor.
fn short(error: &Error) -> String {
    match error {
        Error::Quantised { method, problems, .. } => {
            format!("quantised with {method}, which is not read yet: {}", first(problems))
        }
        Error::Tensors { problems, .. } | Error::MixedFormats { problems, .. } => first(problems),
        other => other.to_string(),
    }
}

fn first(problems: &[TensorProblem]) -> String {
    match problems {
        [] => String::new(),
        [one] => one.to_string(),
        [first, rest @ ..] => format!("{first}, and {} more tensors do not fit", rest.len()),
    }
}

#[derive(Default)]
struct Tally {
    parameters: u64,
    formats: BTreeMap<String, u64>,
}

impl Tally {
    fn add(&mut self, elements: usize, dtype: DType) {
        self.parameters += elements as u64;
        *self.formats.entry(dtype.to_string()).or_default() += (elements * dtype.size()) as u64;
    }

    fn view(&mut self, view: &HostView<'_>) {
        self.add(view.rows() * view.cols(), view.dtype());
    }

    fn expert(&mut self, expert: &ExpertMatrices<'_>) {
        let biases = [&expert.gate, &expert.gate_bias, &expert.up_bias, &expert.down_bias];
        let matrices = biases.into_iter().flatten().chain([&expert.up, &expert.down]);
        matrices.for_each(|matrix: &Matrix<'_>| self.add(matrix.rows() * matrix.cols(), matrix.dtype()));
    }

    fn bytes(&self) -> u64 {
        self.formats.values().sum()
    }
}
