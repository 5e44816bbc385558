use crate::activation::constants;
use crate::error::Result;
use crate::kernel::{BackwardKernel, Kernel};
use crate::launch::{Operand, Tensor, launch, params, tensor};
use crate::memory::{Mut, Ref};
use crate::plan::{pairs, pieces};
use crate::{Wgpu, WgpuStream};
use fused_moe_core::View;
use fused_moe_core::operation::{ActivationBackward, ActivationBackwardOperands};
use fused_moe_core::problem::Arrangement;

params! {
    ActivationBackwardParams {
        gate: Tensor, up: Tensor, d_a: Tensor, weights: Tensor, d_gate: Tensor, d_up: Tensor, a: Tensor,
        rows: u32, width: u32, step: u32, first_row: u32, row_slot: u32, weight_columns: u32, slots: u32,
        scale: f32, limit: f32, alpha: f32,
    }
}

/// Gate and up, and their gradients. What lies with up, or with its gradient, is left out: what is written can be bound but
/// once.
type Both<'a> = (Option<&'a View<Ref<'a>>>, &'a View<Ref<'a>>, Option<&'a View<Mut<'a>>>, &'a View<Mut<'a>>);

fn both<'a>(operands: &'a ActivationBackwardOperands<'_, Wgpu>) -> Both<'a> {
    use ActivationBackwardOperands::*;
    match operands {
        Separate { gate, up, d_gate, d_up } => (Some(gate), up, Some(d_gate), d_up),
        Halves { gate_up, d_gate_up } | Interleaved { gate_up, d_gate_up } => (None, gate_up, None, d_gate_up),
        Plain { up, d_up } => (None, up, None, d_up),
    }
}

pub(crate) fn activation_backward(
    wgpu: &Wgpu,
    stream: &WgpuStream,
    operands: ActivationBackward<'_, Wgpu>,
) -> Result<()> {
    const NAME: &str = "activation_backward";
    let (problem, device) = (operands.problem()?, wgpu.device());
    let (gate, up, d_gate, d_up) = both(&operands.operands);
    let (d_a, a) = (&operands.d_a, operands.a.as_ref());
    // where up begins in what it shares with gate
    let (ahead, step) = match problem.arrangement {
        Arrangement::Halves => (problem.intermediate as u32, 1),
        Arrangement::Interleaved => (1, 2),
        Arrangement::Separate | Arrangement::Plain => (0, 1),
    };
    let (limit, alpha) = constants(problem.activation);
    let row_weights = operands.row_weights.as_ref();
    let given = row_weights.and_then(|weights| weights.weights.as_ref());
    let weights = Operand::maybe(device, NAME, given)?;
    let row_slot = Operand::maybe(device, NAME, row_weights.and_then(|weights| weights.row_slot.as_ref()))?;
    let kernel = Kernel::Backward(BackwardKernel::Activation { activation: problem.activation.into() });
    let strides = [Some(up.row_stride()), gate.map(View::row_stride), d_gate.map(View::row_stride)];
    let written = [Some(d_up.row_stride()), Some(d_a.row_stride()), a.map(View::row_stride)];
    let most = strides.into_iter().chain(written).flatten().fold(0, usize::max);
    for rows in pieces(wgpu, problem.rows, 4 * most) {
        let read = |view| Operand::rows(device, NAME, view, rows.clone());
        let write = |view| Operand::rows(device, NAME, view, rows.clone());
        let (gate, up, d_a) = (gate.map(read).transpose()?, read(up)?, read(d_a)?);
        let (d_gate, d_up, a) = (d_gate.map(write).transpose()?, write(d_up)?, a.map(write).transpose()?);
        let after = |place: Tensor| Tensor { offset: place.offset + ahead, ..place };
        let params = ActivationBackwardParams {
            gate: gate.unwrap_or(up).tensor,
            up: after(up.tensor),
            d_a: d_a.tensor,
            weights: tensor(&weights),
            d_gate: d_gate.unwrap_or(d_up).tensor,
            d_up: after(d_up.tensor),
            a: tensor(&a),
            rows: rows.len() as u32,
            width: problem.intermediate as u32,
            step,
            first_row: rows.start as u32,
            row_slot: tensor(&row_slot).offset,
            weight_columns: given.map_or(1, |weights| weights.cols().max(1)) as u32,
            slots: problem.rows as u32,
            scale: row_weights.map_or(1.0, |weights| weights.scale),
            limit,
            alpha,
        };
        let bound = [gate, Some(up), Some(d_a), row_slot, weights, d_gate, Some(d_up), a];
        launch(wgpu, stream, kernel, &bound, (pairs(rows.len() as u32, problem.intermediate), &params))?;
    }
    Ok(())
}
