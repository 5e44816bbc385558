//! The stages around the experts against the reference, over formats, strides, threads and instruction sets.
#![allow(clippy::unwrap_used)]

mod activation;
mod combine;
mod gate;
mod hostile;
mod overflow;
mod permute;
mod route;
mod support;
