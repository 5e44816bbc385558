//! Views: typed, shaped windows onto memory that the caller owns.

use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use std::fmt;

/// One to three dimensions.
///
/// ```
/// use fused_moe_core::Shape;
/// let shape = Shape::from([128, 1536, 2048]);
/// assert_eq!((shape.rows(), shape.cols()), (128 * 1536, 2048));
/// assert_eq!(shape.to_string(), "[128, 1536, 2048]");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    dims: [usize; 3],
    rank: u8,
}

impl Shape {
    /// The sizes, outermost first.
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank as usize]
    }

    /// Product of all but the last dimension; `usize::MAX` if it is no `usize`.
    pub fn rows(&self) -> usize {
        let leading = &self.dims[..self.rank as usize - 1];
        leading.iter().fold(1usize, |product, &n| product.saturating_mul(n))
    }

    /// The last dimension.
    pub fn cols(&self) -> usize {
        self.dims[self.rank as usize - 1]
    }
}

impl From<[usize; 1]> for Shape {
    fn from([a]: [usize; 1]) -> Self {
        Self { dims: [a, 0, 0], rank: 1 }
    }
}
impl From<[usize; 2]> for Shape {
    fn from([a, b]: [usize; 2]) -> Self {
        Self { dims: [a, b, 0], rank: 2 }
    }
}
impl From<[usize; 3]> for Shape {
    fn from(dims: [usize; 3]) -> Self {
        Self { dims, rank: 3 }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.dims(), f)
    }
}
impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.dims(), f)
    }
}

/// Memory a view can lie on: host bytes, a device allocation, a `wgpu::Buffer`.
pub trait Storage {
    /// Its size in bytes.
    fn bytes(&self) -> usize;
}

impl Storage for &[u8] {
    fn bytes(&self) -> usize {
        self.len()
    }
}
impl Storage for &mut [u8] {
    fn bytes(&self) -> usize {
        self.len()
    }
}

/// A row-major operand: storage, byte offset, format, shape, and the distance of its rows.
///
/// Rows are those of [`Shape::rows`]: leading dimensions are taken together, and successive rows lie `row_stride`
/// elements apart. A view is checked when it is made, so that holding one proves that it lies inside its buffer, at a
/// multiple of its element size from the buffer's beginning; the address itself matters to [`typed`](View::typed) and
/// to backends. An empty view has offset 0, and rows that cannot lie apart have the stride of contiguous ones.
///
/// ```
/// use fused_moe_core::{DType, View};
/// let data = [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0];
/// let x = View::of(&data, [2, 3])?;                        // all of it
/// let left = View::of(&data, [2, 3])?.columns(0, 2)?;      // [[1, 2], [4, 5]]
/// assert_eq!(left.typed::<f32>()?.row(1), &[4.0, 5.0]);
/// assert!(View::of(&data, [3, 3]).is_err());
/// # assert_eq!(x.dtype(), DType::F32);
/// # Ok::<(), fused_moe_core::Error>(())
/// ```
#[derive(Clone, Copy)]
pub struct View<S> {
    storage: S,
    dtype: DType,
    offset: usize,
    shape: Shape,
    row_stride: usize,
}

/// A view of host memory.
pub type HostView<'a> = View<&'a [u8]>;

/// A writable view of host memory.
pub type HostViewMut<'a> = View<&'a mut [u8]>;

impl<S: Storage> View<S> {
    /// Contiguous rows that begin `offset` bytes into `storage`.
    ///
    /// Errors: `OutOfBounds`; `Misaligned` when `offset` is no multiple of the element size.
    pub fn new(storage: S, dtype: DType, offset: usize, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        Self { storage, dtype, offset, shape, row_stride: shape.cols() }.checked()
    }

    /// The same view with rows `row_stride` elements apart.
    ///
    /// Errors: `RowStride` when that is shorter than a row, `OutOfBounds`.
    pub fn with_row_stride(mut self, row_stride: usize) -> Result<Self> {
        self.row_stride = row_stride;
        self.checked()
    }

    /// The same elements under another shape; the rows must be contiguous.
    ///
    /// Errors: `Value` when the number of elements differs or the rows lie apart.
    pub fn reshape(mut self, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        let count = |s: Shape| s.rows().checked_mul(s.cols());
        if count(shape).is_none() || count(shape) != count(self.shape) || !self.is_contiguous() {
            return Err(Error::Value {
                operation: "reshape",
                parameter: "shape",
                expected: "as many elements as the view has, and contiguous rows",
                actual: format!("{} to {shape}, row stride {}", self.shape, self.row_stride),
            });
        }
        self.shape = shape;
        self.row_stride = shape.cols();
        Ok(self)
    }

    /// Columns `first .. first + count` of every row.
    ///
    /// Errors: `Value` when there are not so many.
    pub fn columns(mut self, first: usize, count: usize) -> Result<Self> {
        if first.checked_add(count).is_none_or(|end| end > self.shape.cols()) {
            return Err(Error::Value {
                operation: "columns",
                parameter: "range",
                expected: "columns of the view",
                actual: format!("{count} from {first} of {}", self.shape),
            });
        }
        if count > 0 && self.rows() > 0 {
            self.offset += first * self.dtype.size();
        }
        self.shape.dims[self.shape.rank as usize - 1] = count;
        self.checked()
    }

    /// Rows `first .. first + count`, as `[count, cols]`.
    ///
    /// Errors: `Value` when there are not so many.
    pub fn row_range(mut self, first: usize, count: usize) -> Result<Self> {
        if first.checked_add(count).is_none_or(|end| end > self.shape.rows()) {
            return Err(Error::Value {
                operation: "row_range",
                parameter: "range",
                expected: "rows of the view",
                actual: format!("{count} from {first} of {}", self.shape),
            });
        }
        if count > 0 && self.cols() > 0 {
            self.offset += first * self.row_stride * self.dtype.size();
        }
        self.shape = Shape::from([count, self.shape.cols()]);
        self.checked()
    }

    fn checked(mut self) -> Result<Self> {
        let Self { dtype, offset, shape, row_stride, .. } = self;
        if offset % dtype.size() != 0 {
            return Err(Error::Misaligned { dtype, offset, size: dtype.size() });
        }
        let (rows, cols) = (shape.rows(), shape.cols());
        if row_stride < cols {
            return Err(Error::RowStride { shape, row_stride });
        }
        if rows <= 1 || cols == 0 {
            self.row_stride = cols;
        }
        if rows == 0 || cols == 0 {
            self.offset = 0;
            return Ok(self);
        }
        let end = (rows - 1)
            .checked_mul(self.row_stride)
            .and_then(|n| n.checked_add(cols))
            .and_then(|n| n.checked_mul(dtype.size()))
            .and_then(|n| n.checked_add(offset));
        let available = self.storage.bytes();
        match end {
            Some(end) if end <= available => Ok(self),
            _ => Err(Error::OutOfBounds {
                shape,
                dtype,
                row_stride,
                offset,
                needed: end.map_or(u64::MAX, |n| n as u64),
                available,
            }),
        }
    }

    /// The storage it lies on.
    pub fn storage(&self) -> &S {
        &self.storage
    }

    /// The same window on a borrow of the storage.
    pub(crate) fn as_ref(&self) -> View<&S> {
        let Self { storage, dtype, offset, shape, row_stride } = self;
        View { storage, dtype: *dtype, offset: *offset, shape: *shape, row_stride: *row_stride }
    }

    /// The same window on a mutable borrow of the storage.
    pub(crate) fn as_mut(&mut self) -> View<&mut S> {
        let Self { storage, dtype, offset, shape, row_stride } = self;
        View { storage, dtype: *dtype, offset: *offset, shape: *shape, row_stride: *row_stride }
    }

    /// Gives up the view and returns the storage.
    pub fn into_storage(self) -> S {
        self.storage
    }
}

impl<S> fmt::Debug for View<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("View")
            .field("dtype", &self.dtype)
            .field("shape", &self.shape)
            .field("offset", &self.offset)
            .field("row_stride", &self.row_stride)
            .finish_non_exhaustive()
    }
}

impl<S> View<S> {
    /// The same window on storage of the same extent, which the caller vouches for.
    pub(crate) fn map_storage<T>(self, map: impl FnOnce(S) -> T) -> View<T> {
        let Self { storage, dtype, offset, shape, row_stride } = self;
        View { storage: map(storage), dtype, offset, shape, row_stride }
    }

    /// Format of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the first element lies, in bytes.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Its dimensions.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Number of rows: the product of all but the last dimension.
    pub fn rows(&self) -> usize {
        self.shape.rows()
    }

    /// Length of a row.
    pub fn cols(&self) -> usize {
        self.shape.cols()
    }

    /// Distance of successive rows, in elements.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// Whether the rows lie without gaps.
    pub fn is_contiguous(&self) -> bool {
        self.row_stride == self.cols() || self.rows() <= 1
    }

    /// Bytes from the first element to the end of the last, gaps included.
    pub fn extent(&self) -> usize {
        match self.rows() {
            0 => 0,
            rows if self.cols() > 0 => ((rows - 1) * self.row_stride + self.cols()) * self.dtype.size(),
            _ => 0,
        }
    }
}

impl<'a> View<&'a [u8]> {
    /// All of a slice, as rows.
    ///
    /// Errors: `OutOfBounds` when the slice is shorter than the shape.
    pub fn of<T: Element>(data: &'a [T], shape: impl Into<Shape>) -> Result<Self> {
        Self::new(bytemuck::cast_slice(data), T::DTYPE, 0, shape)
    }

    /// The elements as Rust numbers.
    ///
    /// Errors: `DType` when they are no `T`, `Misaligned` when the memory is not aligned for `T`.
    pub fn typed<T: Element>(&self) -> Result<Rows<'a, T>> {
        let (start, end) = range_of::<T, _>(self)?;
        let bytes: &'a [u8] = self.storage;
        // An empty slice may have any address.
        let data = match &bytes[start..end] {
            [] => &[],
            bytes => bytemuck::try_cast_slice(bytes).map_err(|_| misaligned(self))?,
        };
        Ok(Rows { data, rows: self.rows(), cols: self.cols(), stride: self.row_stride })
    }
}

impl<'a> View<&'a mut [u8]> {
    /// All of a slice, as rows.
    ///
    /// Errors: `OutOfBounds` when the slice is shorter than the shape.
    pub fn of_mut<T: Element>(data: &'a mut [T], shape: impl Into<Shape>) -> Result<Self> {
        Self::new(bytemuck::cast_slice_mut(data), T::DTYPE, 0, shape)
    }

    /// The elements as Rust numbers.
    ///
    /// Errors: `DType` when they are no `T`, `Misaligned` when the memory is not aligned for `T`.
    pub fn typed_mut<T: Element>(self) -> Result<RowsMut<'a, T>> {
        let (start, end) = range_of::<T, _>(&self)?;
        let (rows, cols, stride, error) = (self.rows(), self.cols(), self.row_stride, misaligned(&self));
        let data = match &mut self.storage[start..end] {
            [] => &mut [],
            bytes => bytemuck::try_cast_slice_mut(bytes).map_err(|_| error)?,
        };
        Ok(RowsMut { data, rows, cols, stride })
    }
}

fn range_of<T: Element, S>(view: &View<S>) -> Result<(usize, usize)> {
    if view.dtype != T::DTYPE {
        let expected = T::DTYPE.name();
        return Err(Error::DType { operation: "typed", operand: "view", expected, actual: view.dtype });
    }
    match view.extent() {
        0 => Ok((0, 0)),
        extent => Ok((view.offset, view.offset + extent)),
    }
}

fn misaligned<S>(view: &View<S>) -> Error {
    Error::Misaligned { dtype: view.dtype, offset: view.offset, size: view.dtype.size() }
}

/// Rows of Rust numbers, some stride apart.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    stride: usize,
}

impl<'a, T> Rows<'a, T> {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Length of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Row `i`; empty when there is none.
    #[inline]
    pub fn row(&self, i: usize) -> &'a [T] {
        let start = i.saturating_mul(self.stride);
        self.data.get(start..start.saturating_add(self.cols)).unwrap_or(&[])
    }
}

/// Writable rows of Rust numbers, some stride apart.
#[derive(Debug)]
pub struct RowsMut<'a, T> {
    data: &'a mut [T],
    rows: usize,
    cols: usize,
    stride: usize,
}

impl<'a, T> RowsMut<'a, T> {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Length of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Distance of successive rows, in elements.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Row `i`; empty when there is none.
    #[inline]
    pub fn row_mut(&mut self, i: usize) -> &mut [T] {
        let start = i.saturating_mul(self.stride);
        self.data.get_mut(start..start.saturating_add(self.cols)).unwrap_or_default()
    }

    /// Everything from the first element to the last, gaps included.
    pub fn into_data(self) -> &'a mut [T] {
        self.data
    }
}
