//! The contract of the fused-moe Mixture-of-Experts layer, and the f64 reference that specifies it.
#![forbid(unsafe_code)]

pub mod config;
pub mod dtype;
pub mod reference;
mod statistics;
mod status;

pub use statistics::Statistics;
pub use status::Status;

/// In place of an expert id: this slot goes nowhere, on purpose. It contributes nothing and raises no status.
pub const NO_EXPERT: u32 = u32::MAX;

/// In place of a row or a slot in a permutation: there is none.
pub const NO_ROW: u32 = u32::MAX;
