use super::{Accumulate, Activate, ActivationOperands, Factor, Linear, Zero};
use crate::backend::{Backend, In, Out, reborrow, share, shorten};
use crate::config::Activation;
use crate::error::Error;

/// The plain path: for each token and each of its K experts gate, up, activation, down and accumulate, each a launch of
/// its own, from matrices that may lie apart. For tests, and for experts that are offloaded or arrive one by one.
pub struct ExpertLoop<'a, 'e, B: Backend> {
    /// `[T, H]`.
    pub x: In<'a, B>,
    /// Expert ids on the host, `[T, K]`; the caller has them there, since it decides what to load.
    pub experts: &'a [u32],
    /// Weights on the host, `[T, K]`.
    pub weights: &'a [f32],
    /// Finds an expert's matrices; `None` leaves the slot out.
    pub find: &'a dyn Fn(u32) -> Option<Expert<'e, B>>,
    /// The activation.
    pub activation: Activation,
    /// Scratch: f32 `[2, I]` and `[1, H]`.
    pub scratch: (Out<'a, B>, Out<'a, B>),
    /// Written: `[T, H]`.
    pub out: Out<'a, B>,
}

/// One expert's matrices in the backend's memory.
pub struct Expert<'a, B: Backend> {
    /// `[I, H]`, where the activation has a gate.
    pub gate: Option<In<'a, B>>,
    /// `[I, H]`.
    pub up: In<'a, B>,
    /// `[H, I]`.
    pub down: In<'a, B>,
}

/// Carries out an [`ExpertLoop`] on any backend.
///
/// Errors: `Shape` when the routes are not `[T, K]`, `Missing` when a gated activation meets an expert without gate;
/// whatever the single operations report.
pub fn expert_loop<B: Backend>(
    backend: &B,
    stream: &B::Stream,
    operands: ExpertLoop<'_, '_, B>,
) -> Result<(), B::Error> {
    let ExpertLoop { x, experts, weights, find, activation, scratch: (mut hidden, mut y), mut out } = operands;
    let tokens = x.rows();
    if experts.len() != weights.len()
        || (tokens == 0 && !experts.is_empty())
        || (tokens > 0 && experts.len() % tokens != 0)
    {
        return Err(Error::Value {
            operation: "expert_loop",
            parameter: "experts and weights",
            expected: "K of each for every token",
            actual: format!("{} and {} for {tokens} tokens", experts.len(), weights.len()),
        }
        .into());
    }
    let top_k = experts.len().checked_div(tokens).unwrap_or(0);
    backend.zero(stream, Zero { out: reborrow::<B>(&mut out) })?;
    for (slot, (&id, &weight)) in experts.iter().zip(weights).enumerate() {
        let Some(expert) = find(id) else { continue };
        let token = shorten::<B>(x).row_range(slot / top_k, 1)?;
        if activation.is_gated() {
            let gate = expert.gate.ok_or(Error::Missing {
                operation: "expert_loop",
                operand: "gate",
                reason: "the activation is gated",
            })?;
            let row = reborrow::<B>(&mut hidden).row_range(0, 1)?;
            backend
                .linear(stream, Linear { x: shorten::<B>(token), weight: shorten::<B>(gate), bias: None, out: row })?;
        }
        let row = reborrow::<B>(&mut hidden).row_range(1, 1)?;
        backend
            .linear(stream, Linear { x: shorten::<B>(token), weight: shorten::<B>(expert.up), bias: None, out: row })?;
        activate(backend, stream, activation, &mut hidden)?;
        let first = usize::from(!activation.is_gated());
        let a = share::<B>(&hidden).row_range(first, 1)?;
        backend.linear(
            stream,
            Linear { x: a, weight: shorten::<B>(expert.down), bias: None, out: reborrow::<B>(&mut y) },
        )?;
        let acc = reborrow::<B>(&mut out).row_range(slot / top_k, 1)?;
        backend.accumulate(stream, Accumulate { acc, weight: Factor::Value(weight), y: share::<B>(&y) })?;
    }
    Ok(())
}

/// The scratch `[2, I]` seen as one row `[1, 2I]` of halves, or its second row alone.
fn activate<B: Backend>(
    backend: &B,
    stream: &B::Stream,
    activation: Activation,
    hidden: &mut Out<'_, B>,
) -> Result<(), B::Error> {
    let width = hidden.cols();
    let operands = if activation.is_gated() {
        ActivationOperands::HalvesInPlace { gate_up: reborrow::<B>(hidden).reshape([1, 2 * width])? }
    } else {
        ActivationOperands::PlainInPlace { up: reborrow::<B>(hidden).row_range(1, 1)? }
    };
    backend.activation(stream, Activate { activation, operands })
}
