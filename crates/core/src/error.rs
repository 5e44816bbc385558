//! What can be wrong with a description, a view or an operand: found before anything is enqueued.

use crate::{DType, Shape};

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A request that makes no sense as it stands. Messages of operations begin with the operation and name the operand;
/// those of views say which view.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operand has another shape than the operation needs.
    #[error("{operation}: {operand} expected {layout} = {expected}, got {actual}")]
    Shape {
        /// The operation that was asked for.
        operation: &'static str,
        /// The operand's field name.
        operand: &'static str,
        /// The shape in letters of the legend.
        layout: &'static str,
        /// The shape in numbers.
        expected: Shape,
        /// The shape that was given.
        actual: Shape,
    },
    /// An operand has another format than the operation takes.
    #[error("{operation}: {operand} expected {expected}, got {actual}")]
    DType {
        /// The operation that was asked for.
        operation: &'static str,
        /// The operand's field name.
        operand: &'static str,
        /// What would do.
        expected: &'static str,
        /// The format that was given.
        actual: DType,
    },
    /// A number lies outside what the operation takes.
    #[error("{operation}: {parameter} expected {expected}, got {actual}")]
    Value {
        /// The operation that was asked for.
        operation: &'static str,
        /// The parameter's name.
        parameter: &'static str,
        /// What would do.
        expected: &'static str,
        /// The value that was given.
        actual: String,
    },
    /// An operand is needed and absent.
    #[error("{operation}: {operand} is missing: {reason}")]
    Missing {
        /// The operation that was asked for.
        operation: &'static str,
        /// The operand's field name.
        operand: &'static str,
        /// What asks for it.
        reason: &'static str,
    },
    /// A part of the contract that this backend has not.
    #[error("{operation}: {part} is not supported by the {backend} backend")]
    Unsupported {
        /// The operation that was asked for.
        operation: &'static str,
        /// What is missing.
        part: &'static str,
        /// The backend's name.
        backend: &'static str,
    },
    /// An operand is present that the description has no use for.
    #[error("{operation}: {operand} is given, but {reason}")]
    Unexpected {
        /// The operation that was asked for.
        operation: &'static str,
        /// The operand's field name.
        operand: &'static str,
        /// Why it has no use.
        reason: &'static str,
    },
    /// A view reaches past the end of its buffer.
    #[error(
        "view {shape} of {dtype} with row stride {row_stride} at byte {offset} needs {needed} bytes, the buffer has {available}"
    )]
    OutOfBounds {
        /// The view's shape.
        shape: Shape,
        /// Its format.
        dtype: DType,
        /// Its row stride in elements.
        row_stride: usize,
        /// Its offset in bytes.
        offset: usize,
        /// Where it would end, in bytes; `u64::MAX` if that is no number of 64 bits.
        needed: u64,
        /// The buffer's size in bytes.
        available: usize,
    },
    /// A view's offset, or where it is read as Rust numbers its address, is no multiple of its element size.
    #[error("view of {dtype} at byte {offset}: the address is not a multiple of {size} bytes")]
    Misaligned {
        /// The view's format.
        dtype: DType,
        /// Its offset in bytes.
        offset: usize,
        /// Its element size in bytes.
        size: usize,
    },
    /// A row stride shorter than a row.
    #[error("view {shape}: row stride {row_stride} is shorter than a row")]
    RowStride {
        /// The view's shape.
        shape: Shape,
        /// The stride that was given, in elements.
        row_stride: usize,
    },
    /// Something is wrong with one of many experts.
    #[error("{error} (expert {expert})")]
    Expert {
        /// Which one.
        expert: usize,
        /// What is wrong with it.
        error: Box<Error>,
    },
    /// A workspace made for fewer tokens, or for another layer.
    #[error(
        "{operation}: workspace has room for {actual} bytes, {expected} are needed for {tokens} tokens; make it with workspace({tokens})"
    )]
    Workspace {
        /// The operation that was asked for.
        operation: &'static str,
        /// Tokens of this call.
        tokens: usize,
        /// Bytes that it needs.
        expected: usize,
        /// Bytes that are there.
        actual: usize,
    },
}
