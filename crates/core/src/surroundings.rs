//! What stands around the experts of a layer, carried out by the operations of any backend: a router of several layers,
//! projections, norms, and a shared expert beside them.
//!
//! A backend's layer that [has surroundings](LayerConfig::has_surroundings) prepares its stages from router to combine by
//! [`LayerConfig::core`], keeps [`Surroundings`], and calls [`Surroundings::run`] with these stages as a closure.

mod prepare;
mod room;

pub use room::{BUFFERS, buffers};

use crate::DType::{self, F32};
use crate::backend::{Backend, In, Out, reborrow, share, shorten, shorten_mut, shorten_norm, shorten_residual};
use crate::config::{Activation, LayerConfig, SharedConfig};
use crate::operation::*;
use crate::routing::Routing;
use prepare::{NormTensor, RouterLayers, SharedTensors, Tensor};
use room::{Room, Rooms};

/// The weights of what stands around the experts, on a device.
pub struct Surroundings<B: Backend> {
    config: LayerConfig,
    /// `[L, H]`.
    latent_down: Option<Tensor<B>>,
    /// `[H, L]`.
    latent_up: Option<Tensor<B>>,
    experts_in: Option<NormTensor<B>>,
    routed_out: Option<NormTensor<B>>,
    shared_in: Option<NormTensor<B>>,
    shared_out: Option<NormTensor<B>>,
    out: Option<NormTensor<B>>,
    router: Option<RouterLayers<B>>,
    shared: Option<(SharedConfig, SharedTensors<B>)>,
}

/// Where and how operations run.
pub struct On<'a, B: Backend> {
    /// The backend.
    pub backend: &'a B,
    /// The caller's stream.
    pub stream: &'a B::Stream,
    /// The format of what lies between the operations.
    pub between: DType,
    /// The most tokens that a dense product may take at once: few, where bits must not depend on the batch.
    pub rows_at_once: usize,
}

/// What the stages read in place of the call's x.
pub struct Reads<'a, B: Backend> {
    /// `[T, router_width]`: the router's matrix.
    pub router: In<'a, B>,
    /// `[T, expert_width]`: the routed experts.
    pub experts: In<'a, B>,
}

type Done<B> = Result<(), <B as Backend>::Error>;

impl<B: Backend> Surroundings<B> {
    /// One call of the layer.
    ///
    /// ```text
    /// reads  = { router: gelu(fc2 . gelu(fc1 . norm(state))), experts: experts_in(latent_down . x) }
    /// sum    = core(reads)                                  the stages from router to combine
    /// y      = residual + out( routed_out(latent_up . sum) + shared_out(Shared(shared_in(x))) )
    /// ```
    ///
    /// `core` gets the call without residual, norm and router state, with `sum` for y. `scratch` has the elements of
    /// [`buffers`] for the call's tokens, of 4 bytes each.
    pub fn run(
        &self,
        on: &On<'_, B>,
        call: Forward<'_, B>,
        scratch: [Out<'_, B>; BUFFERS],
        core: impl FnOnce(Forward<'_, B>, Reads<'_, B>) -> Done<B>,
    ) -> Done<B> {
        let Forward { x, source, token_ids, sequences, router_state, residual, norm, routes, counts, y } = call;
        let (config, tokens) = (&self.config, x.rows());
        let mut rooms = Rooms::<B>::new(scratch);
        let router = match (&self.router, &source) {
            (Some(router), Source::Router) => {
                router.run(on, x, router_state, [&mut rooms.state, &mut rooms.router_a, &mut rooms.router_b])?;
                rooms.router_a.read(F32, [tokens, config.router_width()])?
            }
            _ => shorten::<B>(x),
        };
        let wide = [tokens, config.expert_width()];
        if let Some(down) = &self.latent_down {
            on.linear(x, down, None, rooms.projected.write(on.between, wide)?)?;
        }
        let projected = match &self.latent_down {
            Some(_) => rooms.projected.read(on.between, wide)?,
            None => shorten::<B>(x),
        };
        let experts = on.norm(projected, self.experts_in.as_ref(), &mut rooms.read, &mut rooms.spare)?;
        core(
            Forward {
                x: shorten::<B>(x),
                source: shorten_source(source),
                token_ids: token_ids.map(shorten::<B>),
                sequences: sequences.map(shorten::<B>),
                router_state: RouterState { previous: None, next: None },
                residual: None,
                norm: None,
                routes: routes.map(|routes| RoutesOut {
                    experts: shorten_mut::<B>(routes.experts),
                    weights: shorten_mut::<B>(routes.weights),
                }),
                counts: counts.map(shorten_mut::<B>),
                y: rooms.sum.write(on.between, wide)?,
            },
            Reads { router, experts },
        )?;
        self.finish(on, x, &mut rooms, (residual, norm, y))
    }

    /// Everything after the routed sum.
    fn finish(
        &self,
        on: &On<'_, B>,
        x: In<'_, B>,
        rooms: &mut Rooms<'_, B>,
        (residual, norm, y): (Option<Residual<'_, B>>, Option<NextNorm<'_, B>>, Out<'_, B>),
    ) -> Done<B> {
        let (tokens, config) = (x.rows(), &self.config);
        let shape = [tokens, config.hidden];
        let sum = rooms.sum.read(on.between, [tokens, config.expert_width()])?;
        let unfolded = match &self.latent_up {
            Some(up) => {
                on.linear(sum, up, None, rooms.unfolded.write(on.between, shape)?)?;
                rooms.unfolded.read(on.between, shape)?
            }
            None => sum,
        };
        let routed = on.norm(unfolded, self.routed_out.as_ref(), &mut rooms.routed, &mut rooms.spare)?;
        let shared = match &self.shared {
            Some((config, tensors)) => {
                let read =
                    on.norm(shorten::<B>(x), self.shared_in.as_ref(), &mut rooms.shared_read, &mut rooms.spare)?;
                let rooms_of = [&mut rooms.shared_gate_up, &mut rooms.shared_a, &mut rooms.shared_y];
                tensors.run(on, read, config.activation, rooms_of)?;
                if let Some(gate) = &tensors.gate {
                    on.linear(x, gate, None, rooms.logit.write(F32, [tokens, 1])?)?;
                }
                let y = rooms.shared_y.read(on.between, shape)?;
                Some(Shared {
                    y: on.norm(y, self.shared_out.as_ref(), &mut rooms.shared_normed, &mut rooms.spare)?,
                    factor: None,
                    logit: tensors.gate.as_ref().map(|_| rooms.logit.read(F32, [tokens, 1])).transpose()?,
                    scale: config.scale,
                })
            }
            None => None,
        };
        let Some(out) = &self.out else {
            let (residual, norm) = (residual.map(shorten_residual), norm.map(shorten_norm));
            let operands = sum_of((routed, shared), residual, norm, shorten_mut::<B>(y));
            return on.backend.combine(on.stream, operands);
        };
        let normed = NextNorm { weight: out.weight()?, eps: out.eps, out: rooms.together.write(on.between, shape)? };
        let unnormed = rooms.spare.write(on.between, shape)?;
        on.backend.combine(on.stream, sum_of((routed, shared), None, Some(normed), unnormed))?;
        let normed = rooms.together.read(on.between, shape)?;
        let (residual, norm) = (residual.map(shorten_residual), norm.map(shorten_norm));
        on.backend.combine(on.stream, sum_of((normed, None), residual, norm, shorten_mut::<B>(y)))
    }
}

impl<B: Backend> On<'_, B> {
    /// `out = x . weight^T + bias`.
    fn linear(&self, x: In<'_, B>, weight: &Tensor<B>, bias: Option<&Tensor<B>>, mut out: Out<'_, B>) -> Done<B> {
        let tokens = x.rows();
        for first in (0..tokens).step_by(self.rows_at_once.max(1)) {
            let rows = self.rows_at_once.min(tokens - first);
            let operands = Linear {
                x: shorten::<B>(x).row_range(first, rows)?,
                weight: weight.view()?,
                bias: bias.map(Tensor::view).transpose()?,
                out: reborrow::<B>(&mut out).row_range(first, rows)?,
            };
            self.backend.linear(self.stream, operands)?;
        }
        Ok(())
    }

    /// The norm of x, which is that of x plus no rows at all; x itself where there is none.
    fn norm<'r>(
        &self,
        x: In<'r, B>,
        norm: Option<&NormTensor<B>>,
        room: &'r mut Room<'_, B>,
        spare: &mut Room<'_, B>,
    ) -> Result<In<'r, B>, B::Error> {
        let Some(norm) = norm else { return Ok(x) };
        let shape = [x.rows(), x.cols()];
        let normed = NextNorm { weight: norm.weight()?, eps: norm.eps, out: room.write(self.between, shape)? };
        let nothing = shorten::<B>(x).row_range(0, 0)?;
        let unnormed = spare.write(self.between, shape)?;
        let operands = Combine::residual_alone(nothing, Residual::Of(shorten::<B>(x)), Some(normed), unnormed);
        self.backend.combine(self.stream, operands)?;
        Ok(room.read(self.between, shape)?)
    }
}

impl<B: Backend> RouterLayers<B> {
    /// The state, which is handed on if that is asked for, and what the router's matrix reads, in the second room.
    fn run(
        &self,
        on: &On<'_, B>,
        x: In<'_, B>,
        state: RouterState<'_, B>,
        [own, first, second]: [&mut Room<'_, B>; 3],
    ) -> Done<B> {
        let shape = [x.rows(), self.config.width];
        let RouterState { previous, next } = state;
        let mut handed_on = match next {
            Some(next) => shorten_mut::<B>(next),
            None => own.write(F32, shape)?,
        };
        on.linear(x, &self.down, self.down_bias.as_ref(), reborrow::<B>(&mut handed_on))?;
        if let Some(previous) = previous {
            let weight = match &self.state_scale {
                Some(scale) => Factor::PerColumn(scale.view()?),
                None => Factor::Value(1.0),
            };
            let (acc, y) = (reborrow::<B>(&mut handed_on), shorten::<B>(previous));
            on.backend.accumulate(on.stream, Accumulate { acc, weight, y })?;
        }
        let in_f32 = On { backend: on.backend, stream: on.stream, between: F32, rows_at_once: on.rows_at_once };
        in_f32.norm(share::<B>(&handed_on), Some(&self.norm), first, second)?;
        let activation = Activation::Plain(self.config.function);
        on.linear(first.read(F32, shape)?, &self.fc1, self.fc1_bias.as_ref(), second.write(F32, shape)?)?;
        let operands = ActivationOperands::PlainInPlace { up: second.write(F32, shape)? };
        on.backend.activation(on.stream, Activate { activation, operands })?;
        on.linear(second.read(F32, shape)?, &self.fc2, self.fc2_bias.as_ref(), first.write(F32, shape)?)?;
        let operands = ActivationOperands::PlainInPlace { up: first.write(F32, shape)? };
        on.backend.activation(on.stream, Activate { activation, operands })
    }
}

impl<B: Backend> SharedTensors<B> {
    /// What it makes of every token, in the last room.
    fn run(
        &self,
        on: &On<'_, B>,
        read: In<'_, B>,
        activation: Activation,
        [gate_up, a, y]: [&mut Room<'_, B>; 3],
    ) -> Done<B> {
        let (tokens, hidden) = (read.rows(), read.cols());
        let [rows, width] = self.sizes;
        on.linear(read, &self.gate_up, self.gate_up_bias.as_ref(), gate_up.write(on.between, [tokens, rows])?)?;
        let (pre, out) = (gate_up.read(on.between, [tokens, rows])?, a.write(on.between, [tokens, width])?);
        let operands = if activation.is_gated() {
            ActivationOperands::Halves { gate_up: pre, out }
        } else {
            ActivationOperands::Plain { up: pre, out }
        };
        on.backend.activation(on.stream, Activate { activation, operands })?;
        let a = a.read(on.between, [tokens, width])?;
        on.linear(a, &self.down, self.down_bias.as_ref(), y.write(on.between, [tokens, hidden])?)
    }
}

/// One row a token, the shared expert's, and what follows.
fn sum_of<'a, B: Backend>(
    (rows, shared): (In<'a, B>, Option<Shared<'a, B>>),
    residual: Option<Residual<'a, B>>,
    norm: Option<NextNorm<'a, B>>,
    out: Out<'a, B>,
) -> Combine<'a, B> {
    let rows = SlotRows::Slots(rows);
    Combine { rows, weights: None, copies: None, routed_scale: 1.0, shared, residual, norm, out }
}

/// The same for a shorter while.
fn shorten_source<'short, 'long: 'short, B: Backend>(source: Source<'long, B>) -> Source<'short, B> {
    match source {
        Source::Router => Source::Router,
        Source::Logits(logits) => Source::Logits(shorten::<B>(logits)),
        Source::Routes(Routing { experts, weights }) => {
            Source::Routes(Routing { experts: shorten::<B>(experts), weights: shorten::<B>(weights) })
        }
    }
}
