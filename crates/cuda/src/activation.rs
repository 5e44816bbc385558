use crate::error::Result;
use crate::launch::{Tensor, launch, params};
use crate::plan::pieces::Pieces;
use crate::{Cuda, CudaStream, kernel::Kernel};
use fused_moe_core::config::Activation;
use fused_moe_core::operation::{Activate, ActivationOperands};
use fused_moe_core::problem::Arrangement;

params! {
    ActivationParams { gate: Tensor, up: Tensor, out: Tensor, rows: u64, width: u64, step: u64, limit: f32, alpha: f32 }
}

/// The numbers of an activation: its limit and its alpha, or its two caps.
pub(crate) fn constants(activation: Activation) -> (f32, f32) {
    match activation {
        Activation::ClampedSilu { limit } | Activation::SiluThenClamp { limit } => (limit, 0.0),
        Activation::ClampedSwish { alpha, limit } => (limit, alpha),
        Activation::SoftcappedSilu { gate_cap, up_cap } => (gate_cap, up_cap),
        Activation::Gated(_) | Activation::Plain(_) => (0.0, 0.0),
    }
}

/// Gate, up and out; where gate and up share a buffer, it is both.
fn tensors(operands: &ActivationOperands<'_, Cuda>) -> Result<[Tensor; 3]> {
    use ActivationOperands::*;
    Ok(match operands {
        Separate { gate, up, out } => [Tensor::of(gate)?, Tensor::of(up)?, Tensor::of(out)?],
        SeparateInPlace { gate, up } => [Tensor::of(gate)?, Tensor::of(up)?, Tensor::of(gate)?],
        Halves { gate_up: both, out } | Interleaved { gate_up: both, out } | Plain { up: both, out } => {
            [Tensor::of(both)?, Tensor::of(both)?, Tensor::of(out)?]
        }
        HalvesInPlace { gate_up: all } | PlainInPlace { up: all } => [Tensor::of(all)?; 3],
    })
}

pub(crate) fn activation(cuda: &Cuda, stream: &CudaStream, operands: Activate<'_, Cuda>) -> Result<()> {
    let problem = operands.problem()?;
    let [gate, mut up, out] = tensors(&operands.operands)?;
    let (ahead, step) = match problem.arrangement {
        Arrangement::Halves => (problem.intermediate, 1),
        Arrangement::Interleaved => (1, 2),
        Arrangement::Separate | Arrangement::Plain => (0, 1),
    };
    up.data += ahead as u64 * up.element_bytes();
    let (limit, alpha) = constants(problem.activation);
    let (rows, width) = (problem.rows, problem.intermediate);
    let params = ActivationParams { gate, up, out, rows: rows as u64, width: width as u64, step, limit, alpha };
    let pieces = Pieces::of(&[gate, up, out], width, step == 1);
    let kernel = Kernel::Activation { activation: problem.activation.into(), pieces };
    launch(cuda, stream, kernel, pieces.grid(rows, width), &params)
}
