//! The specification: plain loops over f64, one file per stage.
//!
//! Every operation is a function over row-major `f64` slices (`u32` for ids, rows and offsets) that says in its
//! documentation what it computes, including the corners: ties, NaN, infinities, empty experts, bad ids. A backend is
//! right when it agrees with these functions within the tolerance of its number format; permutations and expert ids
//! agree exactly. Sums are formed in f64 in ascending index order.
//!
//! Legend: `T` tokens, `H` hidden size, `I` expert intermediate size, `E` experts, `K` experts per token,
//! `R = T*K` slots (slot `r = t*K + k`), `S` shared-expert intermediate size, `N` rows of one expert's gate_up
//! matrix: `2I`, or `I` for an activation without gate.
//!
//! The inputs are taken as valid: slices as long as their shapes say, `1 <= K <= E`, `H` and `I` at least 1. What a
//! device has to check for itself (expert ids, token ids, scores) is checked here too and told in a
//! [`Status`](crate::Status).

mod activation;
mod around;
mod combine;
mod down;
mod expert_loop;
mod gate;
mod gate_up;
mod layer;
mod linear;
mod norm;
mod overflow;
mod permute;
mod route;

pub use activation::{PreActivation, activate, activation, erf, erfc, sigmoid};
pub use around::{Latent, NormVectors, RouterMlp, SharedExpert};
pub use combine::{Combine, Combined, Copies, Norm, Shared, SharedGate, combine};
pub use down::{Down, down};
pub use expert_loop::{Expert, ExpertLoop, accumulate, expert_loop, experts_of_stack, zero};
pub use gate::{Gate, Gated, gate};
pub use gate_up::{GateUp, Gather, gate_up};
pub use layer::{Input, Layer, Output, forward, forward_from_logits, forward_from_routes};
pub use linear::{Linear, linear};
pub use norm::rms_norm;
pub use overflow::{DropOverflow, drop_overflow};
pub use permute::{Permutation, Permute, Tile, permute, tile_schedule};
pub use route::{Candidate, GatherWeights, Route, Routes, Table, Witness, gate_route, gather_weights, route};
