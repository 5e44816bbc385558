//! The tensors of one layer.

use super::Checkpoint;
use super::directory::Files;
use super::error::{Error, Result, TensorProblem};
use super::family::{ByTable, Family, Layout, Names, Shared};
use fused_moe_core::config::{LayerConfig, Selection, SharedConfig};
use fused_moe_core::problem::LayerProblem;
use fused_moe_core::weights::{
    ExpertMatrices, ExpertWeights, GateUpOrder, LayerWeights, Matrix, Orientation, SharedWeights, Table,
};
use fused_moe_core::{Backend, DType, HostView, Options, Shape};
use safetensors::Dtype;
use std::sync::OnceLock;

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
pub(super) fn load(checkpoint: &Checkpoint, index: usize, config: LayerConfig) -> Result<CheckpointLayer<'_>> {
    let Checkpoint { files, family, .. } = checkpoint;
    let name = block(files, family, index);
    let mut tensors = Tensors::new(files, &name);
    let vocabulary = match &family.table {
        Some(table) => checkpoint.config.optional_size(table.vocabulary, index)?,
        None => None,
    };
    let router = tensors.router(family, &config, checkpoint.turned(index));
    let weights = tensors.layer(family, &config, router, vocabulary);
    let problems = tensors.problems;
    if !problems.is_empty() {
        return Err(unfit(checkpoint, index, problems));
    }
    let invalid = |source: fused_moe_core::Error| {
        let path = checkpoint.path.clone();
        Error::Layer { path, layer: index, source: source.into() }
    };
    let Some(weights) = weights.map_err(invalid)? else { return Err(unfit(checkpoint, index, problems)) };
    LayerProblem::new(&config, &weights, &Options::default()).map_err(invalid)?;
    Ok(CheckpointLayer { index, name, config, weights })
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
    /// The matrices before and after the activation, with their formats.
    formats: [Vec<(String, DType)>; 2],
}

/// How many formats an expert's matrices may have.
#[derive(Clone, Copy)]
enum Formats {
    One,
    /// One before the activation and one after it.
    TwoSides,
}

/// Which of an expert's matrices.
#[derive(Clone, Copy)]
enum Side {
    GateUp,
    Down,
}

impl<'a, 'n> Tensors<'a, 'n> {
    fn new(files: &'a Files, block: &'n str) -> Self {
        Self { files, block, found: 0, problems: Vec::new(), formats: Default::default() }
    }

    /// `[E, H]`; one that lies the other way is copied to `turned`.
    fn router(
        &mut self,
        family: &Family,
        config: &LayerConfig,
        turned: Option<&'a OnceLock<Vec<u8>>>,
    ) -> Option<HostView<'a>> {
        let shape = Shape::from([config.experts, config.hidden]);
        let (Orientation::InOut, Some(turned)) = (family.router_lies, turned) else {
            return self.named(family.router, shape, &[]);
        };
        let stored = self.named(family.router, Shape::from([config.hidden, config.experts]), &[])?;
        let matrix = Matrix::new(stored, Orientation::InOut).ok()?;
        let bytes = turned.get_or_init(|| {
            let row = config.hidden * stored.dtype().size();
            let mut bytes = vec![0; config.experts * row];
            for (e, row) in bytes.chunks_exact_mut(row).enumerate() {
                matrix.copy_row(e, row);
            }
            bytes
        });
        HostView::new(bytes, stored.dtype(), 0, shape).ok()
    }

    fn layer(
        &mut self,
        family: &Family,
        config: &LayerConfig,
        router: Option<HostView<'a>>,
        vocabulary: Option<usize>,
    ) -> Contract<Option<LayerWeights<'a>>> {
        let (hidden, experts) = (config.hidden, config.experts);
        let router_bias = self.vector(family.router_bias, [1, experts]);
        let biased = matches!(config.routing.selection, Selection::TopK { bias: true, .. });
        let correction_bias =
            if biased { self.vector(family.correction_bias, [family.correction_rows, experts]) } else { None };
        let table = match &family.table {
            Some(table) if config.routing.selection == Selection::Table => self.table(table, config, vocabulary),
            _ => None,
        };
        let matrices = self.matrices(family.matrices, [experts, config.intermediate, hidden], Formats::TwoSides)?;
        let shared = match (&family.shared, &config.shared) {
            (Some(described), Some(shared)) => self.shared(described, shared, hidden)?,
            (Some(described), None) => {
                self.no_shared(described);
                None
            }
            _ => None,
        };
        let (Some(router), Some(matrices)) = (router, matrices) else { return Ok(None) };
        Ok(Some(LayerWeights { router_bias, correction_bias, table, shared, ..LayerWeights::new(router, matrices) }))
    }

    /// Experts by token id, as the numbers that backends read.
    fn table(&mut self, described: &ByTable, config: &LayerConfig, vocabulary: Option<usize>) -> Option<Table<'a>> {
        let full_names = || described.names.iter().map(|name| full(self.block, name));
        let found = full_names().find_map(|name| self.files.tensor(&name).map(|tensor| (name, tensor)));
        let rows = |rows| Shape::from([vocabulary.unwrap_or(rows), config.top_k]);
        let Some((name, tensor)) = found else {
            let names = full_names().collect();
            self.problems.push(TensorProblem::Missing { names, expected: rows(1) });
            return None;
        };
        self.found += 1;
        let expected = rows(tensor.shape.first().copied().unwrap_or(1));
        if tensor.shape != expected.dims() {
            self.problems.push(TensorProblem::Shape { name, expected, actual: tensor.shape.to_vec() });
            return None;
        }
        let entries: Vec<i64> = match tensor.dtype {
            Dtype::I64 => tensor.data.as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect(),
            Dtype::U32 => tensor.data.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes).into()).collect(),
            Dtype::I32 => tensor.data.as_chunks().0.iter().map(|&bytes| i32::from_le_bytes(bytes).into()).collect(),
            format => {
                self.problems.push(TensorProblem::TableFormat { name, format: format.to_string() });
                return None;
            }
        };
        let is_expert = |entry: i64| usize::try_from(entry).is_ok_and(|e| e < config.experts);
        if let Some(at) = entries.iter().position(|&entry| !is_expert(entry)) {
            let (row, actual) = (at / config.top_k, entries[at]);
            self.problems.push(TensorProblem::Entry { name, row, actual, experts: config.experts });
            return None;
        }
        let experts = entries.into_iter().map(|entry| entry as u32).collect();
        Some(Table { experts, vocabulary: expected.rows() })
    }

    fn shared(
        &mut self,
        described: &Shared,
        config: &SharedConfig,
        hidden: usize,
    ) -> Contract<Option<SharedWeights<'a>>> {
        let gate = self.vector(described.gate, [1, hidden]);
        let found = self.matrices(described.matrices, [1, config.intermediate, hidden], Formats::One)?;
        let matrices = found.as_ref().and_then(|one| one.iter().next()).copied();
        Ok(matrices.map(|matrices| SharedWeights { matrices, gate }))
    }

    /// A shared expert that config.json has no width for would be left out of every sum.
    fn no_shared(&mut self, described: &Shared) {
        let down = |layout: &Layout| match *layout {
            Layout::Apart { down, .. } | Layout::Plain { down, .. } => down,
            Layout::Joint { down, .. } | Layout::Stacks { down, .. } => down,
        };
        let mut names = described.matrices.iter().map(|layout| full(self.block, down(layout)));
        if let Some(name) = names.find(|name| self.files.tensor(name).is_some()) {
            let fields = described.times.unwrap_or(described.width).to_vec();
            self.problems.push(TensorProblem::Unexpected { name, fields });
        }
    }

    /// The first layout whose tensors are all there with the right shapes; if there is none, the problems of the
    /// layout of which most is there.
    fn matrices(
        &mut self,
        layouts: &[Layout],
        sizes: [usize; 3],
        formats: Formats,
    ) -> Contract<Option<ExpertWeights<'a>>> {
        let mut nearest: Option<Self> = None;
        for layout in layouts {
            let mut attempt = Tensors::new(self.files, self.block);
            let experts = attempt.layout(*layout, sizes)?;
            if attempt.problems.is_empty() && experts.is_some() {
                let [gate_up, down] = attempt.formats;
                match formats {
                    Formats::One => self.problems.extend(odd([gate_up, down].concat())),
                    Formats::TwoSides => self.problems.extend(odd(gate_up).into_iter().chain(odd(down))),
                }
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
            Layout::Apart { gate, up, down } => self.apart(Some(gate), up, down, [experts, inner, hidden]),
            Layout::Plain { up, down } => self.apart(None, up, down, [experts, inner, hidden]),
            Layout::Joint { gate_up, down, layout, biases } => {
                let rows = if layout.order == GateUpOrder::UpOnly { inner } else { inner.saturating_mul(2) };
                let gate_up = self.stack(Side::GateUp, gate_up, oriented(experts, layout.gate_up, rows, hidden), false);
                let down = self.stack(Side::Down, down, oriented(experts, layout.down, hidden, inner), false);
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
                let gate = self.stack(Side::GateUp, gate, oriented(experts, layout.gate_up, inner, hidden), flat);
                let up = self.stack(Side::GateUp, up, oriented(experts, layout.gate_up, inner, hidden), flat);
                let down = self.stack(Side::Down, down, oriented(experts, layout.down, hidden, inner), flat);
                let (Some(gate), Some(up), Some(down)) = (gate, up, down) else { return Ok(None) };
                ExpertWeights::stacked_apart(Some(gate), up, down, layout).map(Some)
            }
        }
    }

    /// A tensor for each matrix.
    fn apart(
        &mut self,
        gate: Option<&str>,
        up: &str,
        down: &str,
        [experts, inner, hidden]: [usize; 3],
    ) -> Contract<Option<ExpertWeights<'a>>> {
        let mut all = Vec::new();
        for expert in 0..experts {
            let expert = expert.to_string();
            let mut matrix = |side, name: &str, shape: [usize; 2]| {
                self.matrix(side, &name.replace("{e}", &expert), shape.into(), &[])
                    .map(|view| Matrix::new(view, Orientation::OutIn))
                    .transpose()
            };
            let gate_matrix = match gate {
                Some(gate) => matrix(Side::GateUp, gate, [inner, hidden])?,
                None => None,
            };
            let up = matrix(Side::GateUp, up, [inner, hidden])?;
            let down = matrix(Side::Down, down, [hidden, inner])?;
            if let (Some(up), Some(down)) = (up, down)
                && gate_matrix.is_some() == gate.is_some()
            {
                all.push(ExpertMatrices::new(gate_matrix, up, down));
            }
        }
        Ok(Some(ExpertWeights::per_expert(all)))
    }

    /// `[experts, rows, cols]`, or `[experts * rows, cols]` if flat; a stack of one may be a matrix.
    fn stack(&mut self, side: Side, name: &str, dims: [usize; 3], flat: bool) -> Option<HostView<'a>> {
        let [experts, rows, cols] = dims;
        let matrix = [Shape::from([experts.saturating_mul(rows), cols])];
        let also: &[Shape] = if flat || experts == 1 { &matrix } else { &[] };
        self.matrix(side, name, dims.into(), also)
    }

    /// As `find`; the tensor's format must be that of the others of its side.
    fn matrix(&mut self, side: Side, name: &str, shape: Shape, also: &[Shape]) -> Option<HostView<'a>> {
        let (name, view) = self.find(&[name], shape, also)?;
        self.formats[side as usize].push((name, view.dtype()));
        Some(view)
    }

    /// `[n]`, `[n, 1]`, or the first row of `[rows, n]`; nothing where the tensor has no name.
    fn vector(&mut self, names: Names, [rows, n]: [usize; 2]) -> Option<HostView<'a>> {
        if names.is_empty() {
            return None;
        }
        self.named(names, Shape::from([n]), &[[rows, n].into(), [n, 1].into()])
    }

    /// As `find`, of any format.
    fn named(&mut self, names: &[&str], shape: Shape, also: &[Shape]) -> Option<HostView<'a>> {
        self.find(names, shape, also).map(|(_, view)| view)
    }

    /// The tensor of the first of these names that is there, as `shape`; on disk it may have another of `also`.
    fn find(&mut self, names: &[&str], shape: Shape, also: &[Shape]) -> Option<(String, HostView<'a>)> {
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
            Ok(view) if fits => Some((name, view)),
            _ => {
                self.problems.push(TensorProblem::Shape { name, expected: shape, actual: tensor.shape.to_vec() });
                None
            }
        }
    }
}

type Contract<T> = fused_moe_core::Result<T>;

fn oriented(experts: usize, orientation: Orientation, rows: usize, cols: usize) -> [usize; 3] {
    match orientation {
        Orientation::OutIn => [experts, rows, cols],
        Orientation::InOut => [experts, cols, rows],
    }
}

/// The tensors whose format is not that of most.
fn odd(formats: Vec<(String, DType)>) -> Vec<TensorProblem> {
    let count = |wanted: DType| formats.iter().filter(|(_, format)| *format == wanted).count();
    let counted = READ.map(|(_, format)| (count(format), format));
    let Some((_, expected)) = counted.into_iter().max_by_key(|(count, _)| *count) else { return Vec::new() };
    let odd = formats.into_iter().filter(|(_, format)| *format != expected);
    odd.map(|(name, format)| TensorProblem::Mixed { name, format, expected }).collect()
}

/// Formats that a layer's floating-point tensors may have.
const READ: [(Dtype, DType); 3] = [(Dtype::F32, DType::F32), (Dtype::F16, DType::F16), (Dtype::BF16, DType::BF16)];

fn dtype(stored: Dtype) -> Option<DType> {
    READ.into_iter().find(|(format, _)| *format == stored).map(|(_, dtype)| dtype)
}
