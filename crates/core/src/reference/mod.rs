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
mod activation_backward;
mod around;
mod combine;
mod combine_backward;
mod down;
mod down_backward;
mod expert_loop;
mod gate;
mod gate_backward;
mod gate_up;
mod gate_up_backward;
mod layer;
mod layer_backward;
mod linear;
mod linear_backward;
mod losses;
mod norm;
mod norm_backward;
mod overflow;
mod permute;
mod route;
mod route_backward;

pub use activation::{PreActivation, activate, activation, erf, erfc, sigmoid};
pub use activation_backward::{ActivationGradient, activate_backward, activation_backward};
pub use around::{Latent, NormVectors, RouterMlp, SharedExpert};
pub use combine::{Combine, Combined, Copies, Norm, Shared, SharedGate, combine};
pub use combine_backward::{
    CombineBackward, CombineGradients, DownBias, WeightsBackward, combine_backward, weights_backward,
};
pub use down::{Down, down};
pub use down_backward::{DownBackward, DownGradients, down_backward};
pub use expert_loop::{Expert, ExpertLoop, accumulate, expert_loop, experts_of_stack, zero};
pub use gate::{Gate, Gated, gate};
pub use gate_backward::{GateBackward, GateGradients, gate_backward};
pub use gate_up::{GateUp, Gather, gate_up};
pub use gate_up_backward::{GateUpBackward, GateUpGradients, gate_up_backward};
pub use layer::{Input, Layer, Output, forward, forward_from_logits, forward_from_routes};
pub use layer_backward::{LayerBackward, LayerGradients, Saved, SharedGradients, Source, backward, forward_saving};
pub use linear::{Linear, linear};
pub use linear_backward::{LinearBackward, LinearGradients, linear_backward};
pub use losses::{LoadBalance, Loss, load_balance_loss, z_loss};
pub use norm::rms_norm;
pub use norm_backward::{NormBackward, NormGradients, rms_norm_backward};
pub use overflow::{DropOverflow, drop_overflow};
pub use permute::{Permutation, Permute, Tile, permute, tile_schedule};
pub use route::{Candidate, GatherWeights, Route, Routes, Table, Witness, gate_route, gather_weights, route};
pub use route_backward::{RouteBackward, RouteGradients, route_backward};
