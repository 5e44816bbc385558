use crate::error::Result;
use crate::launch::{Groups, Operand, Tensor, launch, params, tensor};
use crate::plan::{self, pieces};
use crate::{Wgpu, WgpuStream, route};
use fused_moe_core::backend::{share, shorten, shorten_mut};
use fused_moe_core::operation::{Choice, Gate, GateRoute, Route, TokenTable, Witness};

params! {
    /// `weight` is the router's place, `rows` are tokens, `columns` experts; no soft-cap is 0.
    GateParams {
        x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, normed: Tensor, logits: Tensor,
        rows: u32, columns: u32, width: u32, scale: f32, softcap: f32, eps: f32,
    }
}

/// `invariant`: the bits of a token do not depend on how many there are.
pub(crate) fn gate(wgpu: &Wgpu, stream: &WgpuStream, operands: &Gate<'_, Wgpu>, invariant: bool) -> Result<()> {
    let (problem, device, config) = (operands.problem()?, wgpu.device(), &operands.config);
    let weight = Operand::of(device, "gate", &operands.router)?.widest();
    let bias = Operand::maybe(device, "gate", operands.bias.as_ref())?;
    let norm_weight = operands.norm_weight.as_ref().filter(|_| config.norm.is_some());
    let norm_weight = Operand::maybe(device, "gate", norm_weight)?.map(Operand::widest);
    let normed_stride = operands.normed.as_ref().map_or(0, |normed| normed.row_stride());
    let stride = operands.x.row_stride().max(operands.logits.row_stride()).max(normed_stride);
    let plan = plan::gate([problem.tokens, problem.hidden, problem.experts], config.norm.is_some(), invariant);
    for rows in pieces(wgpu, problem.tokens, 4 * stride) {
        let x = Operand::rows(device, "gate", &operands.x, rows.clone())?.widest();
        let logits = Operand::rows(device, "gate", &operands.logits, rows.clone())?;
        let normed = match &operands.normed {
            Some(normed) => Some(Operand::rows(device, "gate", normed, rows.clone())?),
            None => None,
        };
        let params = GateParams {
            x: x.tensor,
            weight: weight.tensor,
            bias: tensor(&bias),
            norm_weight: tensor(&norm_weight),
            normed: tensor(&normed),
            logits: logits.tensor,
            rows: rows.len() as u32,
            columns: problem.experts as u32,
            width: problem.hidden as u32,
            scale: config.scale,
            softcap: config.softcap.unwrap_or(0.0),
            eps: config.norm.map_or(0.0, |norm| norm.eps),
        };
        plan.explain(wgpu);
        let operands = [Some(x), Some(weight), bias, norm_weight, normed, Some(logits)];
        launch(
            wgpu,
            stream,
            plan.kernel,
            &operands,
            (Groups::Line(plan.groups(rows.len(), problem.experts)), &params),
        )?;
    }
    Ok(())
}

/// The two one after the other; `invariant` as in [`gate`].
pub(crate) fn gate_route(
    wgpu: &Wgpu,
    stream: &WgpuStream,
    operands: GateRoute<'_, Wgpu>,
    invariant: bool,
) -> Result<()> {
    operands.problem()?;
    let GateRoute { gate: operands, choice } = operands;
    gate(wgpu, stream, &operands, invariant)?;
    let logits = share::<Wgpu>(&operands.logits);
    route::route(wgpu, stream, Route { logits, choice: shorten_choice(choice) })
}

/// A choice for a shorter while.
fn shorten_choice<'short, 'long: 'short>(choice: Choice<'long, Wgpu>) -> Choice<'short, Wgpu> {
    let Choice { rule, correction_bias, expert_scale, table, experts, weights, witness } = choice;
    Choice {
        rule,
        correction_bias: correction_bias.map(shorten::<Wgpu>),
        expert_scale: expert_scale.map(shorten::<Wgpu>),
        table: table.map(|table| TokenTable {
            token_ids: shorten::<Wgpu>(table.token_ids),
            experts: shorten::<Wgpu>(table.experts),
        }),
        experts: shorten_mut::<Wgpu>(experts),
        weights: shorten_mut::<Wgpu>(weights),
        witness: witness.map(|witness| Witness {
            keys: shorten_mut::<Wgpu>(witness.keys),
            experts: shorten_mut::<Wgpu>(witness.experts),
        }),
    }
}
