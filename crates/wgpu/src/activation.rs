use crate::device::Device;
use crate::error::Result;
use crate::kernel::Kernel;
use crate::launch::{Operand, Tensor, launch, params, tensor};
use crate::memory::{Mut, Ref};
use crate::plan::{pairs, pieces};
use crate::{Wgpu, WgpuStream};
use fused_moe_core::View;
use fused_moe_core::config::Activation;
use fused_moe_core::operation::{Activate, ActivationOperands};
use fused_moe_core::problem::Arrangement;
use std::ops::Range;

params! {
    ActivationParams { gate: Tensor, up: Tensor, out: Tensor, rows: u32, width: u32, step: u32, limit: f32, alpha: f32 }
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

/// Gate, up and out; gate and up are left out where they are out, since what is written can be bound but once.
fn bind<'a>(
    device: &Device,
    operands: &'a ActivationOperands<'_, Wgpu>,
    rows: Range<usize>,
) -> Result<[Option<Operand<'a>>; 3]> {
    use ActivationOperands::*;
    let read = |view: &'a View<Ref<'_>>| Operand::rows(device, "activation", view, rows.clone()).map(Some);
    let write = |view: &'a View<Mut<'_>>| Operand::rows(device, "activation", view, rows.clone()).map(Some);
    Ok(match operands {
        Separate { gate, up, out } => [read(gate)?, read(up)?, write(out)?],
        SeparateInPlace { gate, up } => [None, read(up)?, write(gate)?],
        Halves { gate_up: both, out } | Interleaved { gate_up: both, out } => [read(both)?, read(both)?, write(out)?],
        Plain { up, out } => [None, read(up)?, write(out)?],
        HalvesInPlace { gate_up: all } | PlainInPlace { up: all } => [None, None, write(all)?],
    })
}

/// Bytes from row to row, of the operand where that is most.
fn row_bytes(operands: &ActivationOperands<'_, Wgpu>) -> usize {
    use ActivationOperands::*;
    let strides = match operands {
        Separate { gate, up, out } => [gate.row_stride(), up.row_stride(), out.row_stride()],
        SeparateInPlace { gate, up } => [gate.row_stride(), up.row_stride(), 0],
        Halves { gate_up, out } | Interleaved { gate_up, out } => [gate_up.row_stride(), out.row_stride(), 0],
        HalvesInPlace { gate_up } => [gate_up.row_stride(), 0, 0],
        Plain { up, out } => [up.row_stride(), out.row_stride(), 0],
        PlainInPlace { up } => [up.row_stride(), 0, 0],
    };
    4 * strides.into_iter().fold(0, usize::max)
}

pub(crate) fn activation(wgpu: &Wgpu, stream: &WgpuStream, operands: Activate<'_, Wgpu>) -> Result<()> {
    let problem = operands.problem()?;
    let (ahead, step) = match problem.arrangement {
        Arrangement::Halves => (problem.intermediate as u32, 1),
        Arrangement::Interleaved => (1, 2),
        Arrangement::Separate | Arrangement::Plain => (0, 1),
    };
    let (limit, alpha) = constants(problem.activation);
    let kernel = Kernel::Activation { activation: problem.activation.into() };
    for rows in pieces(wgpu, problem.rows, row_bytes(&operands.operands)) {
        let count = rows.len() as u32;
        let bound = bind(wgpu.device(), &operands.operands, rows)?;
        let [gate, mut up, out] = bound.map(|operand| tensor(&operand.or(bound[2])));
        up.offset += ahead;
        let width = problem.intermediate as u32;
        let params = ActivationParams { gate, up, out, rows: count, width, step, limit, alpha };
        launch(wgpu, stream, kernel, &bound, (pairs(count, problem.intermediate), &params))?;
    }
    Ok(())
}
