//! The stages around the experts against the reference, over formats, strides, threads and instruction sets.

mod activation;
mod combine;
mod gate;
mod permute;
mod route;
mod support;
