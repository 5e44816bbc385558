//! The cases of each operation, one file a stage: how a case is made, how it is called, how far it may be off.

pub mod activation;
mod bound;
pub mod choice;
pub mod combine;
pub mod down;
pub mod drop_overflow;
pub mod expert_loop;
pub mod experts;
pub mod gate;
pub mod gate_route;
pub mod gate_up;
pub mod gather_weights;
pub mod layer;
pub mod linear;
pub mod permute;
pub mod route;

use crate::data::Values;
use crate::operands::{Operands, Prepared};
use fused_moe_core::Backend;

/// A case that can be worked out and called.
pub(crate) trait Check {
    /// Works out its operands and what the reference makes of them.
    fn prepare(&self) -> Prepared;

    /// Calls the operation.
    fn call<B: Backend>(&self, backend: &B, stream: &B::Stream, operands: Operands<'_, B>) -> Result<(), B::Error>;

    /// Corrects what is expected where more than one result is right.
    fn resolve(&self, _prepared: &mut Prepared, _found: &[(&'static str, Values)]) {}
}

/// Absolute values.
pub(crate) fn magnitudes(values: &[f64]) -> Vec<f64> {
    values.iter().map(|x| x.abs()).collect()
}

/// What each sum of `n` products may be off by.
pub(crate) fn sums(n: usize, magnitudes: Vec<f64>) -> Vec<f64> {
    magnitudes.into_iter().map(|m| crate::tolerance::sum(n, m)).collect()
}
