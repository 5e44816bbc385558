use super::{Accumulate, Activate, ActivationOperands, Factor, Linear, Zero};
use crate::backend::{Backend, In, Out, reborrow, share, shorten};
use crate::config::Activation;

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
    /// Scratch: f32 `[2, I]`, contiguous, and `[1, H]`.
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
    /// `[I]`, where there is a gate.
    pub gate_bias: Option<In<'a, B>>,
    /// `[I]`.
    pub up_bias: Option<In<'a, B>>,
    /// `[H]`.
    pub down_bias: Option<In<'a, B>>,
}

/// Carries out an [`ExpertLoop`] on any backend.
///
/// Errors: `Value`, `Shape` or `DType`, before anything is written; `Expert` when one that was found does not fit;
/// whatever the single operations report.
pub fn expert_loop<B: Backend>(
    backend: &B,
    stream: &B::Stream,
    operands: ExpertLoop<'_, '_, B>,
) -> Result<(), B::Error> {
    let problem = operands.problem()?;
    let ExpertLoop { x, experts, weights, find, activation, scratch: (mut hidden, mut y), mut out } = operands;
    backend.zero(stream, Zero { out: reborrow::<B>(&mut out) })?;
    for (slot, (&id, &weight)) in experts.iter().zip(weights).enumerate() {
        let Some(expert) = find(id) else { continue };
        problem.expert(id, &expert)?;
        let token = slot / problem.top_k;
        let from = shorten::<B>(x).row_range(token, 1)?;
        for (i, matrix, bias) in [(0, expert.gate, expert.gate_bias), (1, Some(expert.up), expert.up_bias)] {
            if let Some(weight) = matrix {
                let row = reborrow::<B>(&mut hidden).row_range(i, 1)?;
                let (x, weight, bias) = (shorten::<B>(from), shorten::<B>(weight), bias.map(shorten::<B>));
                backend.linear(stream, Linear { x, weight, bias, out: row })?;
            }
        }
        activate(backend, stream, activation, &mut hidden)?;
        let first = usize::from(!activation.is_gated());
        let down = Linear {
            x: share::<B>(&hidden).row_range(first, 1)?,
            weight: shorten::<B>(expert.down),
            bias: expert.down_bias.map(shorten::<B>),
            out: reborrow::<B>(&mut y),
        };
        backend.linear(stream, down)?;
        let acc = reborrow::<B>(&mut out).row_range(token, 1)?;
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
