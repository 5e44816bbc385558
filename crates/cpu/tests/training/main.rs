//! Layers that are trained, and the operations of their backward passes.
#![allow(clippy::expect_used, clippy::unwrap_used)]

mod narrow;
mod ranges;
mod refused;
mod step;
mod threads;
