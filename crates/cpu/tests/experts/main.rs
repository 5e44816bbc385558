//! Packing, the grouped products and whole layers against the reference, over formats, layouts, threads and instruction
//! sets.
#![allow(clippy::unwrap_used)]

mod grouped;
mod layer;
mod model;
mod pack;
#[allow(dead_code)]
#[path = "../routes/support.rs"]
mod support;
