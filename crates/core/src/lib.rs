//! The contract of the fused-moe Mixture-of-Experts layer, and the f64 reference that specifies it.
#![forbid(unsafe_code)]

pub mod config;
pub mod dtype;
