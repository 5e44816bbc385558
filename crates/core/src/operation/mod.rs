//! The operands of every operation, one file a stage; the operation itself is the method of the same name of a
//! [`Backend`](crate::Backend), and its meaning is [`reference`](crate::reference)'s.
//!
//! Every output is assigned, never accumulated into, unless a field says otherwise. Optional parts are `Option` fields.
//! Floating-point operands are f32, f16 or bf16 unless said otherwise; sums are f32, rounded once when they are stored.

mod activation;
mod combine;
mod down;
mod expert_loop;
mod gate;
mod gate_up;
mod layer;
mod linear;
mod permute;
mod route;

pub use activation::{Activate, ActivationOperands};
pub use combine::{Combine, Copies, NextNorm, Residual, Shared, SlotRows};
pub use down::Down;
pub use expert_loop::{Expert, ExpertLoop, expert_loop};
pub use gate::Gate;
pub use gate_up::{GateUp, GateUpOutput, Matrices, RowSource};
pub use layer::{Forward, RouterState, RoutesOut, Source};
pub use linear::{Accumulate, Factor, Linear, Zero};
pub use permute::{DropOverflow, Permute, TileSchedule};
pub use route::{Choice, GateRoute, GatherWeights, Route, TokenTable, Witness};
