use crate::activation::constants;
use crate::error::Result;
use crate::kernel::Kernel;
use crate::kernel::backward::BackwardKernel;
use crate::launch::{Grid, Tensor, launch, params};
use crate::plan::pieces::Pieces;
use crate::{Cuda, CudaStream};
use fused_moe_core::View;
use fused_moe_core::operation::{ActivationBackward, ActivationBackwardOperands, ActivationWeightsBackward};
use fused_moe_core::problem::{ActivationBackwardProblem, Arrangement};

params! {
    ActivationBackwardParams {
        gate: Tensor, up: Tensor, d_gate: Tensor, d_up: Tensor, d_a: Tensor, a: Tensor, weights: Tensor, row_slot: u64,
        rows: u64, width: u64, step: u64, weight_columns: u32, scale: f32, limit: f32, alpha: f32,
    }
}

/// Gate and up, `d_gate` and `d_up`; where two share a buffer, it is both.
fn tensors(operands: &ActivationBackwardOperands<'_, Cuda>) -> Result<[Tensor; 4]> {
    use ActivationBackwardOperands::*;
    Ok(match operands {
        Separate { gate, up, d_gate, d_up } => {
            [Tensor::of(gate)?, Tensor::of(up)?, Tensor::of(d_gate)?, Tensor::of(d_up)?]
        }
        Halves { gate_up: both, d_gate_up: d } | Interleaved { gate_up: both, d_gate_up: d } => {
            [Tensor::of(both)?, Tensor::of(both)?, Tensor::of(d)?, Tensor::of(d)?]
        }
        Plain { up, d_up } => [Tensor::default(), Tensor::of(up)?, Tensor::default(), Tensor::of(d_up)?],
    })
}

params! {
    ActivationWeightsBackwardParams { activation: ActivationBackwardParams, d_weights: Tensor, slot_row: u64, columns: u64 }
}

pub(crate) fn activation_backward(
    cuda: &Cuda,
    stream: &CudaStream,
    operands: ActivationBackward<'_, Cuda>,
) -> Result<()> {
    let (problem, params, pieces) = prepared(&operands)?;
    let kernel = BackwardKernel::Activation { activation: problem.activation.into(), pieces };
    let grid = pieces.grid(problem.rows, problem.intermediate);
    launch(cuda, stream, Kernel::Backward(kernel), grid, &params)
}

/// Where rows are of one 2-byte format in pieces of 16 bytes.
pub(crate) fn activation_weights_backward(
    cuda: &Cuda,
    stream: &CudaStream,
    operands: ActivationWeightsBackward<'_, Cuda>,
) -> Result<bool> {
    operands.problem()?;
    let (problem, activation, pieces) = prepared(&operands.activation)?;
    if !pieces.is_narrow() || pieces.vector == 1 {
        return Ok(false);
    }
    let d_weights = Tensor::of(&operands.d_weights)?;
    let slot_row = Tensor::of(&operands.slot_row)?.data;
    let columns = operands.d_weights.cols().max(1) as u64;
    let params = ActivationWeightsBackwardParams { activation, d_weights, slot_row, columns };
    let kernel = BackwardKernel::ActivationWeights { activation: problem.activation.into(), pieces };
    let grid = Grid::line(problem.rows.div_ceil(8), 256);
    launch(cuda, stream, Kernel::Backward(kernel), grid, &params)?;
    Ok(true)
}

/// The parameters that both have, and how they go over rows.
fn prepared(
    operands: &ActivationBackward<'_, Cuda>,
) -> Result<(ActivationBackwardProblem, ActivationBackwardParams, Pieces)> {
    let problem = operands.problem()?;
    let [gate, mut up, d_gate, mut d_up] = tensors(&operands.operands)?;
    let (ahead, step) = match problem.arrangement {
        Arrangement::Halves => (problem.intermediate, 1),
        Arrangement::Interleaved => (1, 2),
        Arrangement::Separate | Arrangement::Plain => (0, 1),
    };
    up.data += ahead as u64 * up.element_bytes();
    d_up.data += ahead as u64 * d_up.element_bytes();
    let (limit, alpha) = constants(problem.activation);
    let weights = operands.row_weights.as_ref();
    let slots = weights.and_then(|weights| weights.row_slot.as_ref());
    let factors = weights.and_then(|weights| weights.weights.as_ref());
    let params = ActivationBackwardParams {
        gate,
        up,
        d_gate,
        d_up,
        d_a: Tensor::of(&operands.d_a)?,
        a: Tensor::maybe(operands.a.as_ref())?,
        weights: Tensor::maybe(factors)?,
        row_slot: Tensor::maybe(slots)?.data,
        rows: problem.rows as u64,
        width: problem.intermediate as u64,
        step,
        weight_columns: factors.map_or(1, View::cols).max(1) as u32,
        scale: weights.map_or(1.0, |weights| weights.scale),
        limit,
        alpha,
    };
    let ActivationBackwardParams { d_a, a, .. } = params;
    let pieces = Pieces::of(&[gate, up, d_gate, d_up, d_a, a], problem.intermediate, step == 1);
    Ok((problem, params, pieces))
}
