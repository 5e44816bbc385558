//! The operands of every operation, one file a stage; the operation itself is the method of the same name of a
//! [`Backend`](crate::Backend), and its meaning is [`reference`](crate::reference)'s.
//!
//! Every output is assigned, never accumulated into, unless a field says otherwise. Optional parts are `Option` fields.
//! Floating-point operands are f32, f16 or bf16 unless said otherwise; sums are f32, rounded once when they are stored.

mod activation;
mod activation_backward;
mod combine;
mod combine_backward;
mod down;
mod down_backward;
mod expert_loop;
mod gate;
mod gate_backward;
mod gate_up;
mod gate_up_backward;
mod gradient;
mod layer;
mod layer_backward;
mod linear;
mod losses;
mod permute;
mod route;
mod route_backward;

pub use activation::{Activate, ActivationOperands};
pub use activation_backward::{ActivationBackward, ActivationBackwardOperands, ActivationWeightsBackward, RowWeights};
pub use combine::{Combine, Copies, NextNorm, Residual, Shared, SlotRows};
pub use combine_backward::{CombineBackward, DownBias, RowsGradient, SharedBackward, WeightsFrom, WeightsGradient};
pub use down::Down;
pub use down_backward::DownBackward;
pub use expert_loop::{Expert, ExpertLoop, expert_loop};
pub use gate::Gate;
pub use gate_backward::{GateBackward, NormBackward};
pub use gate_up::{GateUp, GateUpOutput, Matrices, RowSource};
pub use gate_up_backward::GateUpBackward;
pub use gradient::{Gradient, GradientMode};
pub use layer::{Forward, RouterState, RoutesOut, Source};
pub use layer_backward::{
    ForwardSaving, LayerBackward, LayerGradients, LayerParameters, RoutesFrom, SharedGradients, SharedParameters,
};
pub use linear::{Accumulate, Factor, Linear, Zero};
pub use losses::{LoadBalanceLoss, ZLoss};
pub use permute::{DropOverflow, Permute, TileSchedule};
pub use route::{Choice, GateRoute, GatherWeights, Route, TokenTable, Witness};
pub use route_backward::RouteBackward;
