//! Tensors by name and shape, and what is wrong with them.

use super::full;
use crate::checkpoint::directory::Files;
use crate::checkpoint::error::TensorProblem;
use crate::checkpoint::family::Names;
use fused_moe_core::{DType, HostView, Shape};
use safetensors::Dtype;

/// Looks tensors up and collects what is wrong with them.
pub(super) struct Tensors<'a, 'n> {
    pub(super) files: &'a Files,
    pub(super) block: &'n str,
    /// Names of tensors that are there.
    pub(super) read: Vec<String>,
    /// How many of them are as they should be.
    pub(super) fit: usize,
    pub(super) problems: Vec<TensorProblem>,
    /// The matrices before and after the activation, with their formats.
    pub(super) formats: Formats,
}

/// Tensors before and after the activation, each with its format.
pub(super) type Formats = [Vec<(String, DType)>; 2];

/// Which of an expert's matrices.
#[derive(Clone, Copy)]
pub(super) enum Side {
    GateUp,
    Down,
}

impl<'a, 'n> Tensors<'a, 'n> {
    pub(super) fn new(files: &'a Files, block: &'n str) -> Self {
        Self { files, block, read: Vec::new(), fit: 0, problems: Vec::new(), formats: Default::default() }
    }

    /// `[experts, rows, cols]`, or `[experts * rows, cols]` if flat; a stack of one may be a matrix.
    pub(super) fn stack(&mut self, side: Side, name: &str, dims: [usize; 3], flat: bool) -> Option<HostView<'a>> {
        let [experts, rows, cols] = dims;
        let matrix = [Shape::from([experts.saturating_mul(rows), cols])];
        let also: &[Shape] = if flat || experts == 1 { &matrix } else { &[] };
        let earlier = self.problems.len();
        let found = self.matrix(side, name, dims.into(), also);
        // as it would lie in a file
        if let (true, Some(TensorProblem::Missing { expected, .. })) = (flat, self.problems.get_mut(earlier)) {
            *expected = matrix[0];
        }
        found
    }

    /// As `find`; the tensor's format must be that of the others of its side.
    pub(super) fn matrix(&mut self, side: Side, name: &str, shape: Shape, also: &[Shape]) -> Option<HostView<'a>> {
        let (name, view) = self.find(&[name], shape, also)?;
        self.formats[side as usize].push((name, view.dtype()));
        Some(view)
    }

    /// `[n]`, `[n, 1]`, or the first row of `[rows, n]`; nothing where the tensor has no name.
    pub(super) fn vector(&mut self, names: Names, [rows, n]: [usize; 2]) -> Option<HostView<'a>> {
        if names.is_empty() {
            return None;
        }
        self.named(names, Shape::from([n]), &[[rows, n].into(), [n, 1].into()])
    }

    /// Whether there is a tensor of this name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.files.tensor(&full(self.block, name)).is_some()
    }

    /// A tensor that config.json does not ask for would be left out in silence.
    pub(super) fn unasked(&mut self, mut names: impl Iterator<Item = &'static str>, fields: &[&'static str]) {
        if let Some(name) = names.find(|name| self.has(name)) {
            let name = full(self.block, name);
            self.problems.push(TensorProblem::Unexpected { name, fields: fields.to_vec() });
        }
    }

    /// As `find`, of any format.
    pub(super) fn named(&mut self, names: &[&str], shape: Shape, also: &[Shape]) -> Option<HostView<'a>> {
        self.find(names, shape, also).map(|(_, view)| view)
    }

    /// The tensor of the first of these names that is there, as `shape`; on disk it may have another of `also`.
    pub(super) fn find(&mut self, names: &[&str], shape: Shape, also: &[Shape]) -> Option<(String, HostView<'a>)> {
        let full_names = || names.iter().map(|name| full(self.block, name));
        let Some((name, tensor)) = full_names().find_map(|name| self.files.tensor(&name).map(|tensor| (name, tensor)))
        else {
            let names = full_names().collect();
            self.problems.push(TensorProblem::Missing { names, expected: shape, nearest: None });
            return None;
        };
        self.read.push(name.clone());
        let Some(dtype) = dtype(tensor.dtype) else {
            self.problems.push(TensorProblem::Format { name, format: tensor.dtype.to_string() });
            return None;
        };
        let fits = tensor.shape == shape.dims() || also.iter().any(|also| tensor.shape == also.dims());
        match HostView::new(tensor.data, dtype, 0, shape) {
            Ok(view) if fits => {
                self.fit += 1;
                Some((name, view))
            }
            _ => {
                let alike = also.iter().find(|also| also.dims().len() == tensor.shape.len());
                let expected = *alike.unwrap_or(&shape);
                self.problems.push(TensorProblem::Shape { name, expected, actual: tensor.shape.to_vec() });
                None
            }
        }
    }
}

/// The tensors whose format is not that of most.
pub(super) fn odd(formats: Vec<(String, DType)>) -> Vec<TensorProblem> {
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
