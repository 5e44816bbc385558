//! Operands of any float format, and rows shared out among threads.

use crate::arch::Kernels;
use crate::error::Result;
use crate::plan::{CHUNK, RowsPlan};
use crate::pool::Pool;
use fused_moe_core::dtype::{Element, Float};
use fused_moe_core::{DType, HostView, HostViewMut, Rows};
use half::{bf16, f16};
use std::ops::Range;

/// Rows of floats that are read.
#[derive(Clone, Copy)]
pub(crate) enum Floats<'a> {
    F32(Rows<'a, f32>),
    F16(Rows<'a, f16>),
    BF16(Rows<'a, bf16>),
}

/// The same expression for every format.
macro_rules! each_format {
    ($kind:ident, $value:expr, $rows:ident => $body:expr) => {
        match $value {
            $kind::F32($rows) => $body,
            $kind::F16($rows) => $body,
            $kind::BF16($rows) => $body,
        }
    };
}
pub(crate) use each_format;

impl<'a> Floats<'a> {
    pub(crate) fn new(view: &HostView<'a>) -> Result<Self> {
        Ok(match view.dtype() {
            DType::F16 => Self::F16(view.typed()?),
            DType::BF16 => Self::BF16(view.typed()?),
            _ => Self::F32(view.typed()?),
        })
    }

    pub(crate) fn optional(view: &Option<HostView<'a>>) -> Result<Option<Self>> {
        view.as_ref().map(Self::new).transpose()
    }

    /// How many rows.
    pub(crate) fn rows(&self) -> usize {
        each_format!(Self, self, rows => rows.rows())
    }

    /// `to = row[col..]`.
    pub(crate) fn load(&self, kernels: Kernels, row: usize, col: usize, to: &mut [f32]) {
        each_format!(Self, self, rows => kernels.to_f32(part(rows.row(row), col, to.len()), to));
    }

    /// The bytes of `row[col..][..len]`.
    pub(crate) fn bytes(&self, row: usize, col: usize, len: usize) -> &'a [u8] {
        each_format!(Self, self, rows => bytemuck::cast_slice(part(rows.row(row), col, len)))
    }

    /// `acc += w * row[col..]`.
    pub(crate) fn axpy(&self, kernels: Kernels, w: f32, [row, col]: [usize; 2], acc: &mut [f32]) {
        each_format!(Self, self, rows => kernels.axpy(w, part(rows.row(row), col, acc.len()), acc));
    }

    /// `out = row[col..] * factor * weight`.
    pub(crate) fn scale(
        &self,
        kernels: Kernels,
        [row, col]: [usize; 2],
        factor: f32,
        weight: Option<&[f32]>,
        out: &mut [f32],
    ) {
        each_format!(Self, self, rows => kernels.scale(part(rows.row(row), col, out.len()), factor, weight, out));
    }

    /// Sum of a row's squares.
    pub(crate) fn sum_squares(&self, kernels: Kernels, row: usize) -> f64 {
        each_format!(Self, self, rows => {
            rows.row(row).chunks(CHUNK).map(|chunk| f64::from(kernels.sum_squares(chunk))).sum()
        })
    }

    /// One element; 0 where there is none.
    pub(crate) fn at(&self, row: usize, col: usize) -> f32 {
        each_format!(Self, self, rows => rows.row(row).get(col).map_or(0.0, |&x| Float::to_f32(x)))
    }

    /// Element `i` of a vector `[n]` or a column `[n, 1]`.
    pub(crate) fn element(&self, i: usize) -> f32 {
        if self.rows() == 1 { self.at(0, i) } else { self.at(i, 0) }
    }
}

fn part<T>(row: &[T], col: usize, len: usize) -> &[T] {
    row.get(col..col.saturating_add(len)).unwrap_or_default()
}

/// `1 / sqrt(squares / hidden + eps)`.
pub(crate) fn norm_factor(squares: f64, hidden: usize, eps: f32) -> f32 {
    (1.0 / (squares / hidden as f64 + f64::from(eps)).sqrt()) as f32
}

/// Some rows of an output, for one thread at a time.
pub(crate) struct Part<'a, T> {
    data: &'a mut [T],
    cols: usize,
    stride: usize,
}

impl<'a> Part<'a, u8> {
    /// Rows of `cols` bytes, `stride` bytes apart.
    pub(crate) fn of_bytes(data: &'a mut [u8], cols: usize, stride: usize) -> Self {
        Self { data, cols, stride }
    }
}

impl<'a, T: Element> Part<'a, T> {
    pub(crate) fn new(view: HostViewMut<'a>) -> Result<Self> {
        let rows = view.typed_mut()?;
        Ok(Self { cols: rows.cols(), stride: rows.stride(), data: rows.into_data() })
    }
}

impl<T> Part<'_, T> {
    /// Row `i` of these; empty when there is none.
    pub(crate) fn row(&mut self, i: usize) -> &mut [T] {
        let start = i.saturating_mul(self.stride);
        self.data.get_mut(start..start.saturating_add(self.cols)).unwrap_or_default()
    }
}

/// Rows of floats that are written, and read before where the operation is in place.
pub(crate) enum FloatsMut<'a> {
    F32(Part<'a, f32>),
    F16(Part<'a, f16>),
    BF16(Part<'a, bf16>),
}

impl<'a> FloatsMut<'a> {
    pub(crate) fn new(view: HostViewMut<'a>) -> Result<Self> {
        Ok(match view.dtype() {
            DType::F16 => Self::F16(Part::new(view)?),
            DType::BF16 => Self::BF16(Part::new(view)?),
            _ => Self::F32(Part::new(view)?),
        })
    }

    /// `to = row[col..]`.
    pub(crate) fn load(&mut self, kernels: Kernels, row: usize, col: usize, to: &mut [f32]) {
        each_format!(Self, self, rows => kernels.to_f32(part(rows.row(row), col, to.len()), to));
    }

    /// `row[col..] = from`.
    pub(crate) fn store(&mut self, kernels: Kernels, row: usize, col: usize, from: &[f32]) {
        each_format!(Self, self, rows => {
            let to = rows.row(row).get_mut(col..col.saturating_add(from.len())).unwrap_or_default();
            kernels.from_f32(from, to);
        });
    }
}

/// What can be handed out by rows.
pub(crate) trait Split: Send + Sized {
    /// The first `rows` rows and the others.
    fn split(self, rows: usize) -> (Self, Self);
}

impl<T: Send> Split for Part<'_, T> {
    fn split(self, rows: usize) -> (Self, Self) {
        let Self { data, cols, stride } = self;
        let middle = rows.saturating_mul(stride).min(data.len());
        let (left, right) = data.split_at_mut(middle);
        (Self { data: left, cols, stride }, Self { data: right, cols, stride })
    }
}

impl Split for FloatsMut<'_> {
    fn split(self, rows: usize) -> (Self, Self) {
        macro_rules! both {
            ($kind:ident, $part:expr) => {{
                let (left, right) = $part.split(rows);
                (Self::$kind(left), Self::$kind(right))
            }};
        }
        match self {
            Self::F32(part) => both!(F32, part),
            Self::F16(part) => both!(F16, part),
            Self::BF16(part) => both!(BF16, part),
        }
    }
}

impl<P: Split> Split for Option<P> {
    fn split(self, rows: usize) -> (Self, Self) {
        self.map(|part| part.split(rows)).unzip()
    }
}

impl<P: Split, Q: Split> Split for (P, Q) {
    fn split(self, rows: usize) -> (Self, Self) {
        let (p, q) = (self.0.split(rows), self.1.split(rows));
        ((p.0, q.0), (p.1, q.1))
    }
}

impl<T: Send> Split for &mut [T] {
    fn split(self, rows: usize) -> (Self, Self) {
        let middle = rows.min(self.len());
        self.split_at_mut(middle)
    }
}

/// `work(range, parts of that range)` for ranges that make up `0..rows`, some at once. Row i of the parts is row `range.start + i` of the whole.
pub(crate) fn share_rows<P: Split>(
    pool: &Pool,
    parts: P,
    rows: usize,
    plan: RowsPlan,
    work: impl Fn(Range<usize>, P) + Sync,
) {
    let threads = pool.threads();
    let grain = plan.part(rows, threads);
    if rows == 0 {
        return;
    }
    if threads == 1 || rows <= grain {
        work(0..rows, parts);
    } else {
        pool.install(|| halves(0..rows, grain, parts, &work));
    }
}

fn halves<P: Split>(range: Range<usize>, grain: usize, parts: P, work: &(impl Fn(Range<usize>, P) + Sync)) {
    if range.len() <= grain {
        return work(range, parts);
    }
    let middle = range.start + range.len() / 2;
    let (left, right) = parts.split(middle - range.start);
    rayon::join(|| halves(range.start..middle, grain, left, work), || halves(middle..range.end, grain, right, work));
}
