use crate::backend::{Backend, In, Out};

/// `out = x . weight^T + bias`: the dense product, as the shared expert uses it.
pub struct Linear<'a, B: Backend> {
    /// `[T, C]`.
    pub x: In<'a, B>,
    /// `[N, C]`.
    pub weight: In<'a, B>,
    /// `[N]`.
    pub bias: Option<In<'a, B>>,
    /// Written: `[T, N]`.
    pub out: Out<'a, B>,
}

/// `out = 0`.
pub struct Zero<'a, B: Backend> {
    /// Written.
    pub out: Out<'a, B>,
}

/// `acc += w * y`.
pub struct Accumulate<'a, B: Backend> {
    /// Read, then written: `[T, H]`.
    pub acc: Out<'a, B>,
    /// w.
    pub weight: Factor<'a, B>,
    /// `[T, H]`.
    pub y: In<'a, B>,
}

/// A factor of rows or columns.
pub enum Factor<'a, B: Backend> {
    /// One number for all rows.
    Value(f32),
    /// f32 `[T]`: a number a row.
    PerRow(In<'a, B>),
    /// f32 `[H]`: a number a column.
    PerColumn(In<'a, B>),
}
