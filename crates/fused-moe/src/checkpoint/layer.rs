//! The tensors of one layer.

use super::directory::Files;
use super::error::{Error, Result, TensorProblem};
use super::family::{Family, Layout, Names, Shared};
use fused_moe_core::config::{LayerConfig, Selection, SharedConfig};
use fused_moe_core::weights::{ExpertMatrices, ExpertWeights, LayerWeights, Matrix, Orientation, SharedWeights};
use fused_moe_core::{Backend, DType, HostView, Options, Shape};
use safetensors::Dtype;
use std::path::Path;

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

/// Finds the tensors that `config` asks for.
pub(super) fn load<'a>(
    files: &'a Files,
    path: &Path,
    family: &Family,
    index: usize,
    config: LayerConfig,
) -> Result<CheckpointLayer<'a>> {
    let name = block(files, family, index);
    let mut tensors = Tensors::new(files, &name);
    let weights = tensors.layer(family, &config);
    let problems = tensors.problems;
    match weights {
        Ok(Some(weights)) if problems.is_empty() => Ok(CheckpointLayer { index, name, config, weights }),
        Err(source) if problems.is_empty() => {
            Err(Error::Layer { path: path.into(), layer: index, source: source.into() })
        }
        _ => Err(Error::Tensors { path: path.into(), layer: index, problems }),
    }
}

/// Whether the files hold anything of a layer's block.
pub(super) fn is_stored(files: &Files, family: &Family, index: usize) -> bool {
    blocks(family, index).any(|block| family.router.iter().any(|router| files.tensor(&full(&block, router)).is_some()))
}

/// The block that has the router; failing that, one that has any tensor; failing that, the family's first.
fn block(files: &Files, family: &Family, index: usize) -> String {
    let routed = |block: &String| family.router.iter().any(|router| files.tensor(&full(block, router)).is_some());
    let present = |block: &String| files.has_prefix(&format!("{block}."));
    let mut candidates = blocks(family, index);
    candidates
        .clone()
        .find(routed)
        .or_else(|| candidates.clone().find(present))
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

/// Looks tensors up and collects what is wrong with them.
struct Tensors<'a, 'n> {
    files: &'a Files,
    block: &'n str,
    found: usize,
    problems: Vec<TensorProblem>,
}

impl<'a, 'n> Tensors<'a, 'n> {
    fn new(files: &'a Files, block: &'n str) -> Self {
        Self { files, block, found: 0, problems: Vec::new() }
    }

    fn layer(&mut self, family: &Family, config: &LayerConfig) -> Contract<Option<LayerWeights<'a>>> {
        let (hidden, experts) = (config.hidden, config.experts);
        let router = self.named(family.router, Shape::from([experts, hidden]), &[]);
        let router_bias = self.vector(family.router_bias, experts);
        let biased = matches!(config.routing.selection, Selection::TopK { bias: true, .. });
        let correction_bias = if biased { self.vector(family.correction_bias, experts) } else { None };
        let matrices = self.matrices(family.matrices, [experts, config.intermediate, hidden])?;
        let shared = match (&family.shared, &config.shared) {
            (Some(described), Some(shared)) => self.shared(described, shared, hidden)?,
            _ => None,
        };
        let (Some(router), Some(matrices)) = (router, matrices) else { return Ok(None) };
        Ok(Some(LayerWeights { router_bias, correction_bias, shared, ..LayerWeights::new(router, matrices) }))
    }

    fn shared(
        &mut self,
        described: &Shared,
        config: &SharedConfig,
        hidden: usize,
    ) -> Contract<Option<SharedWeights<'a>>> {
        let gate = self.vector(described.gate, hidden);
        let found = self.matrices(described.matrices, [1, config.intermediate, hidden])?;
        let matrices = found.as_ref().and_then(|one| one.iter().next()).copied();
        Ok(matrices.map(|matrices| SharedWeights { matrices, gate }))
    }

    /// The first layout whose tensors are all there with the right shapes; if there is none, the problems of the
    /// layout of which most is there.
    fn matrices(&mut self, layouts: &[Layout], sizes: [usize; 3]) -> Contract<Option<ExpertWeights<'a>>> {
        let mut nearest: Option<Self> = None;
        for layout in layouts {
            let mut attempt = Tensors::new(self.files, self.block);
            let experts = attempt.layout(*layout, sizes)?;
            if attempt.problems.is_empty() && experts.is_some() {
                return Ok(experts);
            }
            if nearest.as_ref().is_none_or(|nearest| attempt.found > nearest.found) {
                nearest = Some(attempt);
            }
        }
        self.problems.extend(nearest.into_iter().flat_map(|nearest| nearest.problems));
        Ok(None)
    }

    fn layout(&mut self, layout: Layout, [experts, inner, hidden]: [usize; 3]) -> Contract<Option<ExpertWeights<'a>>> {
        match layout {
            Layout::Apart { gate, up, down } => {
                let mut all = Vec::new();
                for expert in 0..experts {
                    let expert = expert.to_string();
                    let mut matrix = |name: &str, shape: [usize; 2]| {
                        self.named(&[&name.replace("{e}", &expert)], shape.into(), &[])
                            .map(|view| Matrix::new(view, Orientation::OutIn))
                            .transpose()
                    };
                    let gate = matrix(gate, [inner, hidden])?;
                    let (up, down) = (matrix(up, [inner, hidden])?, matrix(down, [hidden, inner])?);
                    if let (Some(gate), Some(up), Some(down)) = (gate, up, down) {
                        all.push(ExpertMatrices::new(Some(gate), up, down));
                    }
                }
                Ok(Some(ExpertWeights::per_expert(all)))
            }
            Layout::Joint { gate_up, down, layout, biases } => {
                let rows = inner.saturating_mul(2);
                let gate_up = self.stack(gate_up, experts, oriented(layout.gate_up, rows, hidden), false);
                let down = self.stack(down, experts, oriented(layout.down, hidden, inner), false);
                let biases = biases.map(|[gate_up, down]| {
                    let mut bias = |name, cols| self.named(&[name], Shape::from([experts, cols]), &[]);
                    (bias(gate_up, rows), bias(down, hidden))
                });
                let (Some(gate_up), Some(down)) = (gate_up, down) else { return Ok(None) };
                let stacked = ExpertWeights::stacked(gate_up, down, layout)?;
                match biases {
                    Some((gate_up, down)) => stacked.with_biases(gate_up, down, layout.order).map(Some),
                    None => Ok(Some(stacked)),
                }
            }
            Layout::Stacks { gate, up, down, layout, flat } => {
                let gate = self.stack(gate, experts, oriented(layout.gate_up, inner, hidden), flat);
                let up = self.stack(up, experts, oriented(layout.gate_up, inner, hidden), flat);
                let down = self.stack(down, experts, oriented(layout.down, hidden, inner), flat);
                let (Some(gate), Some(up), Some(down)) = (gate, up, down) else { return Ok(None) };
                ExpertWeights::stacked_apart(Some(gate), up, down, layout).map(Some)
            }
        }
    }

    /// `[experts, rows, cols]`; flat: `[experts * rows, cols]`; a stack of one may be a matrix.
    fn stack(&mut self, name: &str, experts: usize, [rows, cols]: [usize; 2], flat: bool) -> Option<HostView<'a>> {
        let matrix = [Shape::from([experts.saturating_mul(rows), cols])];
        let also: &[Shape] = if flat || experts == 1 { &matrix } else { &[] };
        self.named(&[name], Shape::from([experts, rows, cols]), also)
    }

    /// `[n]`, `[1, n]` or `[n, 1]`; nothing where the tensor has no name.
    fn vector(&mut self, names: Names, n: usize) -> Option<HostView<'a>> {
        if names.is_empty() {
            return None;
        }
        self.named(names, Shape::from([n]), &[[1, n].into(), [n, 1].into()])
    }

    /// The tensor of the first of these names that is there, as `shape`; on disk it may have another of `also`.
    fn named(&mut self, names: &[&str], shape: Shape, also: &[Shape]) -> Option<HostView<'a>> {
        let full_names = || names.iter().map(|name| full(self.block, name));
        let Some((name, tensor)) = full_names().find_map(|name| self.files.tensor(&name).map(|tensor| (name, tensor)))
        else {
            let names = full_names().collect();
            self.problems.push(TensorProblem::Missing { names, expected: shape });
            return None;
        };
        self.found += 1;
        let Some(dtype) = dtype(tensor.dtype) else {
            self.problems.push(TensorProblem::Format { name, format: tensor.dtype.to_string() });
            return None;
        };
        let fits = tensor.shape == shape.dims() || also.iter().any(|also| tensor.shape == also.dims());
        match HostView::new(tensor.data, dtype, 0, shape) {
            Ok(view) if fits => Some(view),
            _ => {
                self.problems.push(TensorProblem::Shape { name, expected: shape, actual: tensor.shape.to_vec() });
                None
            }
        }
    }
}

type Contract<T> = fused_moe_core::Result<T>;

fn oriented(orientation: Orientation, rows: usize, cols: usize) -> [usize; 2] {
    match orientation {
        Orientation::OutIn => [rows, cols],
        Orientation::InOut => [cols, rows],
    }
}

/// Formats that a layer's floating-point tensors may have.
fn dtype(stored: Dtype) -> Option<DType> {
    match stored {
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        _ => None,
    }
}
