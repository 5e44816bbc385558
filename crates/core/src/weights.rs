//! A layer's weights as they lie in host memory (usually a mapped checkpoint), in any of the layouts in use.
//!
//! Whatever the layout, an expert is three strided matrices; preparing a layer copies them into what a backend reads.

mod around;

pub use around::{LatentWeights, NormWeights, RouterMlpWeights};

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::problem::MAX_EXPERTS;
use crate::tensor::{HostView, Shape};
use std::borrow::Cow;
use std::fmt;

/// Everything a layer is made of. Vectors may be f32, f16 or bf16.
#[derive(Clone, Debug)]
pub struct LayerWeights<'a> {
    /// `[E, H]`; without it the layer runs from given logits or given routes only. Rows for experts
    /// without weights follow, as they do in the vectors `[E]`; behind an MLP, H is that one's width.
    pub router: Option<HostView<'a>>,
    /// `[E]`, added to the logits.
    pub router_bias: Option<HostView<'a>>,
    /// `[H]`, weight of the RMSNorm before the router.
    pub router_norm: Option<HostView<'a>>,
    /// `[E]`, added to the key that experts are chosen by; without those that are always chosen.
    pub correction_bias: Option<HostView<'a>>,
    /// `[E]`, see [`ExpertScale`](crate::config::ExpertScale).
    pub expert_scale: Option<HostView<'a>>,
    /// Experts by token id, `[V, K]`.
    pub table: Option<Table<'a>>,
    /// The routed experts.
    pub experts: ExpertWeights<'a>,
    /// The shared expert.
    pub shared: Option<SharedWeights<'a>>,
    /// The projections around the experts.
    pub latent: Option<LatentWeights<'a>>,
    /// The weights of the norms around them.
    pub norms: NormWeights<'a>,
    /// What comes before the router's matrix.
    pub router_mlp: Option<RouterMlpWeights<'a>>,
}

impl<'a> LayerWeights<'a> {
    /// A router and experts, nothing else.
    pub fn new(router: HostView<'a>, experts: ExpertWeights<'a>) -> Self {
        Self {
            router: Some(router),
            router_bias: None,
            router_norm: None,
            correction_bias: None,
            expert_scale: None,
            table: None,
            experts,
            shared: None,
            latent: None,
            norms: NormWeights::default(),
            router_mlp: None,
        }
    }
}

/// Experts by token id.
#[derive(Clone, Debug)]
pub struct Table<'a> {
    /// `[V, K]`, row-major.
    pub experts: Cow<'a, [u32]>,
    /// V, the number of token ids.
    pub vocabulary: usize,
}

/// The shared expert's matrices.
#[derive(Clone, Debug)]
pub struct SharedWeights<'a> {
    /// Gate, up and down of width S.
    pub matrices: ExpertMatrices<'a>,
    /// `[H]`: the row whose product with x, through a sigmoid, multiplies the output.
    pub gate: Option<HostView<'a>>,
}

/// The matrices of E experts.
#[derive(Clone)]
pub struct ExpertWeights<'a> {
    experts: Vec<ExpertMatrices<'a>>,
}

/// One expert: `down( act(gate x + gate_bias) * (up x + up_bias) ) + down_bias`.
#[derive(Clone, Copy, Debug)]
pub struct ExpertMatrices<'a> {
    /// `[I, H]`; absent when the activation has no gate.
    pub gate: Option<Matrix<'a>>,
    /// `[I, H]`.
    pub up: Matrix<'a>,
    /// `[H, I]`.
    pub down: Matrix<'a>,
    /// `[I, 1]`.
    pub gate_bias: Option<Matrix<'a>>,
    /// `[I, 1]`.
    pub up_bias: Option<Matrix<'a>>,
    /// `[H, 1]`.
    pub down_bias: Option<Matrix<'a>>,
}

/// How the gate and up rows of a joint matrix follow each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GateUpOrder {
    /// I gate rows, then I up rows.
    #[default]
    GateThenUp,
    /// g0, u0, g1, u1, ...
    Interleaved,
    /// Only up rows: the activation has no gate.
    UpOnly,
}

/// Which dimension of a matrix comes first in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Orientation {
    /// `[out, in]`, used as `W x`.
    #[default]
    OutIn,
    /// `[in, out]`, used as `x W`.
    InOut,
}

/// How stacked experts lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StackLayout {
    /// Order of the gate and up rows, and of their biases.
    pub order: GateUpOrder,
    /// Of gate_up: `[E, 2I, H]` or `[E, H, 2I]`.
    pub gate_up: Orientation,
    /// Of down: `[E, H, I]` or `[E, I, H]`.
    pub down: Orientation,
}

impl<'a> ExpertWeights<'a> {
    /// Experts that lie each on their own.
    pub fn per_expert(experts: Vec<ExpertMatrices<'a>>) -> Self {
        Self { experts }
    }

    /// Experts stacked in two tensors of three dimensions.
    ///
    /// Errors: `Shape` when the two disagree on E; `Value` for other than three dimensions, for none or more than 4096
    /// experts, or for an odd number of joint rows.
    pub fn stacked(gate_up: HostView<'a>, down: HostView<'a>, layout: StackLayout) -> Result<Self> {
        const OPERATION: &str = "stacked experts";
        let [e, rows, _] = three(OPERATION, "gate_up", gate_up)?;
        let [count, a, b] = three(OPERATION, "down", down)?;
        if count != e {
            return Err(Error::Shape {
                operation: OPERATION,
                operand: "down",
                layout: "[E, ..]",
                expected: Shape::from([e, a, b]),
                actual: down.shape(),
            });
        }
        let out = if layout.gate_up == Orientation::OutIn { rows } else { gate_up.cols() };
        if layout.order != GateUpOrder::UpOnly && out % 2 != 0 {
            return Err(Error::Value {
                operation: OPERATION,
                parameter: "gate_up rows",
                expected: "2I, an even number",
                actual: out.to_string(),
            });
        }
        let experts = (0..e)
            .map(|i| {
                let both = Matrix::of_plane(gate_up, i, layout.gate_up);
                let (gate, up) = both.split(layout.order);
                ExpertMatrices::new(gate, up, Matrix::of_plane(down, i, layout.down))
            })
            .collect();
        Ok(Self { experts })
    }

    /// Experts stacked in three tensors: gate and up `[E, I, H]` or `[E, H, I]` as `layout.gate_up` says, down as
    /// `layout.down` says. `layout.order` is not read.
    ///
    /// Errors: `Shape` when they disagree; `Value` for other than three dimensions, or for none or more than 4096
    /// experts.
    pub fn stacked_apart(
        gate: Option<HostView<'a>>,
        up: HostView<'a>,
        down: HostView<'a>,
        layout: StackLayout,
    ) -> Result<Self> {
        const OPERATION: &str = "stacked experts";
        let [e, ..] = three(OPERATION, "up", up)?;
        let [count, a, b] = three(OPERATION, "down", down)?;
        if count != e {
            return Err(Error::Shape {
                operation: OPERATION,
                operand: "down",
                layout: "[E, ..]",
                expected: Shape::from([e, a, b]),
                actual: down.shape(),
            });
        }
        if let Some(gate) = gate.filter(|gate| gate.shape() != up.shape()) {
            return Err(Error::Shape {
                operation: OPERATION,
                operand: "gate",
                layout: "as up",
                expected: up.shape(),
                actual: gate.shape(),
            });
        }
        let experts = (0..e)
            .map(|i| {
                let plane = |view| Matrix::of_plane(view, i, layout.gate_up);
                ExpertMatrices::new(gate.map(plane), plane(up), Matrix::of_plane(down, i, layout.down))
            })
            .collect();
        Ok(Self { experts })
    }

    /// Adds stacked biases: gate_up `[E, 2I]` in the given order (`[E, I]` for up alone), down `[E, H]`.
    ///
    /// Errors: `Shape` when they do not fit the matrices.
    pub fn with_biases(
        mut self,
        gate_up: Option<HostView<'a>>,
        down: Option<HostView<'a>>,
        order: GateUpOrder,
    ) -> Result<Self> {
        let (layout, halves) = if order == GateUpOrder::UpOnly { ("[E, I]", 1) } else { ("[E, 2I]", 2) };
        self.bias_fits("gate_up_bias", layout, gate_up, |expert| expert.up.rows.saturating_mul(halves))?;
        self.bias_fits("down_bias", "[E, H]", down, |expert| expert.down.rows)?;
        for (i, expert) in self.experts.iter_mut().enumerate() {
            if let Some(view) = gate_up {
                let (gate, up) = Matrix::column_of_row(view, i).split(order);
                (expert.gate_bias, expert.up_bias) = (gate, Some(up));
            }
            if let Some(view) = down {
                expert.down_bias = Some(Matrix::column_of_row(view, i));
            }
        }
        Ok(self)
    }

    fn bias_fits(
        &self,
        operand: &'static str,
        layout: &'static str,
        bias: Option<HostView<'_>>,
        rows: impl Fn(&ExpertMatrices<'a>) -> usize,
    ) -> Result<()> {
        let Some(bias) = bias else { return Ok(()) };
        let wrong = self.experts.iter().map(rows).find(|&rows| rows != bias.cols());
        let expected = Shape::from([self.len(), wrong.unwrap_or(bias.cols())]);
        if bias.shape() == expected {
            return Ok(());
        }
        Err(Error::Shape { operation: "stacked experts", operand, layout, expected, actual: bias.shape() })
    }

    /// E.
    pub fn len(&self) -> usize {
        self.experts.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.experts.is_empty()
    }

    /// Expert by expert.
    pub fn iter(&self) -> std::slice::Iter<'_, ExpertMatrices<'a>> {
        self.experts.iter()
    }
}

impl fmt::Debug for ExpertWeights<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExpertWeights").field("len", &self.len()).field("first", &self.experts.first()).finish()
    }
}

impl<'a> ExpertMatrices<'a> {
    /// An expert without biases.
    pub fn new(gate: Option<Matrix<'a>>, up: Matrix<'a>, down: Matrix<'a>) -> Self {
        Self { gate, up, down, gate_bias: None, up_bias: None, down_bias: None }
    }
}

/// `[E, .., ..]`, with a sensible E.
fn three(operation: &'static str, operand: &'static str, view: HostView<'_>) -> Result<[usize; 3]> {
    match *view.shape().dims() {
        [a, b, c] if (1..=MAX_EXPERTS).contains(&a) => Ok([a, b, c]),
        [_, _, _] => Err(Error::Value {
            operation,
            parameter: operand,
            expected: "1 to 4096 experts",
            actual: view.shape().to_string(),
        }),
        _ => Err(Error::Value {
            operation,
            parameter: operand,
            expected: "three dimensions",
            actual: view.shape().to_string(),
        }),
    }
}

/// A matrix `[rows, cols]` whose element (r, c) lies `r * row_stride + c * col_stride` elements after its first:
/// a transposed matrix has `row_stride = 1`, an interleaved one twice the natural row stride.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    bytes: &'a [u8],
    dtype: DType,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A view of two dimensions, `[rows, cols]` or, transposed, `[cols, rows]`; one dimension is a column `[rows, 1]`.
    ///
    /// Errors: `Value` for a view of three dimensions.
    pub fn new(view: HostView<'a>, orientation: Orientation) -> Result<Self> {
        match *view.shape().dims() {
            [_] => Ok(Self::column_of_row(view, 0)),
            [_, _] => Ok(Self::window(view, 0, view.rows(), orientation)),
            _ => Err(Error::Value {
                operation: "matrix",
                parameter: "view",
                expected: "one or two dimensions",
                actual: view.shape().to_string(),
            }),
        }
    }

    fn of_plane(view: HostView<'a>, index: usize, orientation: Orientation) -> Self {
        let rows = view.shape().dims().get(1).copied().unwrap_or(0);
        Self::window(view, index.saturating_mul(rows), rows, orientation)
    }

    /// `rows` rows of the view from `first` on, as the matrix or as its transpose.
    fn window(view: HostView<'a>, first: usize, rows: usize, orientation: Orientation) -> Self {
        let stride = view.row_stride();
        let (cols, dtype) = (view.cols(), view.dtype());
        let bytes = after(view.storage().get(view.offset()..).unwrap_or(&[]), first, stride, dtype);
        match orientation {
            Orientation::OutIn => Self { bytes, dtype, rows, cols, row_stride: stride, col_stride: 1 },
            Orientation::InOut => Self { bytes, dtype, rows: cols, cols: rows, row_stride: 1, col_stride: stride },
        }
    }

    fn column_of_row(view: HostView<'a>, row: usize) -> Self {
        Self { cols: 1, ..Self::window(view, row, 1, Orientation::InOut) }
    }

    /// Gate and up of a joint matrix.
    fn split(self, order: GateUpOrder) -> (Option<Self>, Self) {
        let half = Self { rows: self.rows / 2, ..self };
        let skip = |rows: usize, matrix: Self| Self {
            bytes: after(matrix.bytes, rows, matrix.row_stride, matrix.dtype),
            ..matrix
        };
        match order {
            GateUpOrder::GateThenUp => (Some(half), skip(half.rows, half)),
            GateUpOrder::Interleaved => {
                let wide = Self { row_stride: self.row_stride.saturating_mul(2), ..half };
                (Some(wide), Self { row_stride: wide.row_stride, ..skip(1, half) })
            }
            GateUpOrder::UpOnly => (None, self),
        }
    }

    /// Rows `first .. first + count`.
    ///
    /// Errors: `Value` when there are not so many.
    pub fn row_range(self, first: usize, count: usize) -> Result<Self> {
        if first.checked_add(count).is_none_or(|end| end > self.rows) {
            return Err(Error::Value {
                operation: "matrix",
                parameter: "row range",
                expected: "rows of the matrix",
                actual: format!("{count} from {first} of {}", self.shape()),
            });
        }
        Ok(Self { bytes: after(self.bytes, first, self.row_stride, self.dtype), rows: count, ..self })
    }

    /// `[rows, cols]`.
    pub fn shape(&self) -> Shape {
        Shape::from([self.rows, self.cols])
    }

    /// Number of rows: outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns: inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Format of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Row `row` as it lies, where its elements are neighbours.
    pub fn contiguous_row(&self, row: usize) -> Option<&'a [u8]> {
        if row >= self.rows || (self.col_stride != 1 && self.cols != 1) {
            return None;
        }
        after(self.bytes, row, self.row_stride, self.dtype).get(..self.cols.saturating_mul(self.dtype.size()))
    }

    /// The numbers in f32, row after row.
    pub fn to_f32(&self) -> Vec<f32> {
        let row_bytes = self.cols.saturating_mul(self.dtype.size());
        let mut bytes = vec![0; self.rows.saturating_mul(row_bytes)];
        for (row, out) in bytes.chunks_exact_mut(row_bytes.max(1)).enumerate() {
            self.copy_row(row, out);
        }
        let halves = bytes.as_chunks::<2>().0.iter();
        match self.dtype {
            DType::F16 => halves.map(|&bytes| half::f16::from_ne_bytes(bytes).to_f32()).collect(),
            DType::BF16 => halves.map(|&bytes| half::bf16::from_ne_bytes(bytes).to_f32()).collect(),
            _ => bytes.as_chunks().0.iter().map(|&bytes| f32::from_ne_bytes(bytes)).collect(),
        }
    }

    /// Copies row `row` to `out`, whose length is the row's in bytes; nothing is written when it is not.
    pub fn copy_row(&self, row: usize, out: &mut [u8]) {
        let size = self.dtype.size();
        if let Some(bytes) = self.contiguous_row(row) {
            if bytes.len() == out.len() {
                out.copy_from_slice(bytes);
            }
            return;
        }
        if row >= self.rows || out.len() != self.cols.saturating_mul(size) {
            return;
        }
        match size {
            2 => self.gather_row::<2>(row, out),
            _ => self.gather_row::<4>(row, out),
        }
    }

    /// Copies row `row`, element by element of SIZE bytes.
    fn gather_row<const SIZE: usize>(&self, row: usize, out: &mut [u8]) {
        let from = self.bytes.as_chunks::<SIZE>().0.get(row.saturating_mul(self.row_stride)..).unwrap_or(&[]);
        let elements = from.iter().step_by(self.col_stride.max(1));
        for (to, element) in out.as_chunks_mut::<SIZE>().0.iter_mut().zip(elements) {
            *to = *element;
        }
    }
}

/// A vector of any float format, at any address, in f32.
///
/// Errors: as of [`View::reshape`](crate::View::reshape), for more than one row.
pub fn floats(view: HostView<'_>) -> Result<Vec<f32>> {
    Ok(Matrix::new(view.reshape([1, view.cols()])?, Orientation::OutIn)?.to_f32())
}

impl fmt::Debug for Matrix<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Matrix")
            .field("dtype", &self.dtype)
            .field("shape", &self.shape())
            .field("row_stride", &self.row_stride)
            .field("col_stride", &self.col_stride)
            .finish_non_exhaustive()
    }
}

/// What follows `rows` rows; nothing where they reach past the end.
fn after(bytes: &[u8], rows: usize, row_stride: usize, dtype: DType) -> &[u8] {
    bytes.get(rows.saturating_mul(row_stride).saturating_mul(dtype.size())..).unwrap_or(&[])
}
