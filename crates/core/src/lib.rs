//! The contract of the fused-moe Mixture-of-Experts layer, and the f64 reference that specifies it.
//!
//! - [`config`]: what a layer is. [`weights`]: what it is made of, in any layout.
//! - [`View`]: an operand on memory that the caller owns. [`operation`]: the operands of each operation.
//! - [`problem`]: the only validation. [`Backend`]: what runs operations and layers.
//! - [`training`]: a layer forward and backward, over the operations of any backend that has their gradients.
//! - [`mod@reference`]: what each operation means.
#![forbid(unsafe_code)]

pub mod backend;
pub mod config;
pub mod dtype;
mod error;
pub mod operation;
pub mod problem;
pub mod reference;
mod routing;
mod statistics;
mod status;
pub mod surroundings;
mod tensor;
pub mod training;
pub mod weights;

pub use backend::{Backend, BackendBackward, In, Layer, Numerics, Options, Out, Stream};
pub use dtype::{DType, Element, Float};
pub use error::{Error, Result};
pub use routing::{Permutation, Routing};
pub use statistics::Statistics;
pub use status::Status;
pub use tensor::{HostView, HostViewMut, Rows, RowsMut, Shape, Storage, View};

/// In place of an expert id: this slot goes nowhere, on purpose. It contributes nothing and raises no status.
pub const NO_EXPERT: u32 = u32::MAX;

/// In place of a row or a slot in a permutation: there is none.
pub const NO_ROW: u32 = u32::MAX;
