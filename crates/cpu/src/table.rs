//! Where weights that are read in place lie and where results go, as the grouped product sees them.

use crate::arch::{Kernels, Outer, Place, SharedSlice};
use crate::error::Result;
use crate::rows::Floats;
use fused_moe_core::dtype::Float;
use fused_moe_core::{DType, HostView, HostViewMut, Rows};
use half::{bf16, f16};

/// How the rows of an expert's matrix follow each other. Whatever it is, kernels number them as pairs: row 2i is the
/// i-th of the gate and row 2i + 1 the i-th of up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RowOrder {
    /// No pairs: down, a dense matrix, up without a gate.
    Single,
    /// All of the gate, then all of up.
    Halves,
}

impl RowOrder {
    /// Rows that make one output.
    pub(crate) fn rows_per_output(self) -> usize {
        if self == Self::Single { 1 } else { 2 }
    }
}

/// The matrices of the experts, one after the other.
#[derive(Clone, Copy)]
pub(crate) struct Table<'a> {
    /// Matrix after matrix, `[E * height, C]`.
    pub(crate) matrices: HostView<'a>,
    /// Rows of a matrix.
    pub(crate) height: usize,
    /// `[E, height]`, rows in the order of the matrix.
    pub(crate) bias: Option<HostView<'a>>,
    /// How gate and up follow each other.
    pub(crate) order: RowOrder,
}

impl<'a> Table<'a> {
    pub(crate) fn dtype(&self) -> DType {
        self.matrices.dtype()
    }

    /// The same, given its matrices as numbers.
    pub(crate) fn typed<W>(&self, rows: Rows<'a, W>) -> Result<TypedTable<'a, W>> {
        let Self { height, order, .. } = *self;
        Ok(TypedTable { rows, bias: Floats::optional(&self.bias)?, height, order })
    }
}

/// A [`Table`] of weights in format W.
#[derive(Clone, Copy)]
pub(crate) struct TypedTable<'a, W> {
    rows: Rows<'a, W>,
    bias: Option<Floats<'a>>,
    height: usize,
    order: RowOrder,
}

impl<'a, W: Float> TypedTable<'a, W> {
    pub(crate) fn order(&self) -> RowOrder {
        self.order
    }

    /// How many outputs an expert's matrix has.
    pub(crate) fn outputs(&self) -> usize {
        self.height / self.order.rows_per_output()
    }

    /// The matrix of expert e.
    pub(crate) fn expert(&self, e: usize) -> ExpertRows<'a, W> {
        ExpertRows { table: *self, expert: e }
    }
}

/// One expert's matrix and bias, rows numbered as pairs.
#[derive(Clone, Copy)]
pub(crate) struct ExpertRows<'a, W> {
    table: TypedTable<'a, W>,
    expert: usize,
}

impl<'a, W: Float> ExpertRows<'a, W> {
    fn position(&self, i: usize) -> usize {
        match self.table.order {
            RowOrder::Halves => (i % 2) * (self.table.height / 2) + i / 2,
            RowOrder::Single => i,
        }
    }

    pub(crate) fn row(&self, i: usize) -> &'a [W] {
        self.table.rows.row(self.expert * self.table.height + self.position(i))
    }

    pub(crate) fn bias(&self, i: usize) -> f32 {
        self.table.bias.map_or(0.0, |bias| bias.at(self.expert, self.position(i)))
    }
}

/// Elements that are added to at a time.
const MAX_ADD: usize = 64;

/// Rows of floats in any format that several threads write.
#[derive(Clone, Copy)]
pub(crate) struct OutRows<'a> {
    cells: Cells<'a>,
    stride: usize,
}

#[derive(Clone, Copy)]
enum Cells<'a> {
    F32(SharedSlice<'a, f32>),
    F16(SharedSlice<'a, f16>),
    BF16(SharedSlice<'a, bf16>),
}

impl<'a> OutRows<'a> {
    pub(crate) fn new(view: HostViewMut<'a>) -> Result<Self> {
        let stride = view.row_stride();
        let cells = match view.dtype() {
            DType::F16 => Cells::F16(SharedSlice::new(view.typed_mut()?.into_data())),
            DType::BF16 => Cells::BF16(SharedSlice::new(view.typed_mut()?.into_data())),
            _ => Cells::F32(SharedSlice::new(view.typed_mut()?.into_data())),
        };
        Ok(Self { cells, stride })
    }

    /// `values += row[col..]`: what lies where `values` will be stored.
    pub(crate) fn add_to(&self, kernels: Kernels, [row, col]: [usize; 2], values: &mut [f32]) {
        let start = row * self.stride + col;
        match self.cells {
            Cells::F32(cells) => add_narrow(kernels, cells, start, values),
            Cells::F16(cells) => add_narrow(kernels, cells, start, values),
            Cells::BF16(cells) => add_narrow(kernels, cells, start, values),
        }
    }

    /// Carries out an [`Outer`] whose sums end here: they go to rows from `[row, column]` on.
    pub(crate) fn outer(
        &self,
        (kernels, pairs): (Kernels, bool),
        [row, col]: [usize; 2],
        stream: bool,
        op: Outer<'_, f32>,
    ) {
        let (start, stride) = (row * self.stride + col, self.stride);
        match self.cells {
            Cells::F32(cells) => outer(kernels, pairs, Place { cells, start, stride, stream }, op),
            Cells::F16(cells) => outer(kernels, pairs, Place { cells, start, stride, stream }, op),
            Cells::BF16(cells) => outer(kernels, pairs, Place { cells, start, stride, stream }, op),
        }
    }

    /// Writes elements of a row, from column `col` on; past the caches where `stream` says so, until the kernels settle.
    pub(crate) fn store(&self, kernels: Kernels, [row, col]: [usize; 2], values: &[f32], stream: bool) {
        let start = row * self.stride + col;
        match self.cells {
            Cells::F32(cells) => kernels.store(values, (cells, start), stream),
            Cells::F16(cells) => kernels.store(values, (cells, start), stream),
            Cells::BF16(cells) => kernels.store(values, (cells, start), stream),
        }
    }
}

fn outer<'a, Y: Float>(kernels: Kernels, pairs: bool, to: Place<'a, Y>, op: Outer<'a, f32>) {
    let Outer { a, steps, b, c, fresh, columns, ahead, .. } = op;
    let op = Outer { a, steps, b, c, fresh, to: Some(to), columns, ahead };
    if pairs { kernels.pair_outer(op) } else { kernels.outer(op) }
}

fn add_narrow<Y: Float>(kernels: Kernels, cells: SharedSlice<'_, Y>, start: usize, values: &mut [f32]) {
    let (mut narrow, mut before) = ([Y::from_f32(0.0); MAX_ADD], [0.0; MAX_ADD]);
    for (values, start) in values.chunks_mut(MAX_ADD).zip((start..).step_by(MAX_ADD)) {
        let (narrow, before) = (&mut narrow[..values.len()], &mut before[..values.len()]);
        cells.load_slice(start, narrow);
        kernels.to_f32(narrow, before);
        kernels.axpy(1.0, before, values);
    }
}
