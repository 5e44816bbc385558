use super::workspace::{SharedScratch, TrainingWorkspace};
use super::{Formats, TrainingLayer, again, norm, permutation, permute, row, stack};
use crate::backend::{Backend, BackendBackward, In, Out, reborrow, share, shorten, shorten_mut};
use crate::config::{Activation, LayerConfig, SharedConfig, WeightOn};
use crate::error::{Error, Result};
use crate::operation::*;
use crate::routing::{Permutation, Routing};

impl TrainingLayer {
    /// The layer, keeping what [`backward`](Self::backward) needs. The stages in order, as
    /// [`reference::forward`](crate::reference::forward) has them; pre-activations are rounded to the format of their view
    /// before the activation reads them.
    ///
    /// Errors: `Shape`, `DType`, `Value`, `Missing` or `Unexpected`, naming the operation and the operand.
    pub fn forward<B: BackendBackward>(
        &self,
        backend: &B,
        stream: &B::Stream,
        call: ForwardSaving<'_, '_, B>,
        workspace: &mut TrainingWorkspace<B>,
    ) -> Result<(), B::Error> {
        let config = &self.config;
        let tokens = call.problem(config)?;
        workspace.check("forward", tokens)?;
        let ForwardSaving { x, parameters, source, token_ids, residual, norm: next, .. } = call;
        let ForwardSaving { mut pre_activation, shared_pre_activation, mut routes, y, .. } = call;
        let (rows, &LayerConfig { hidden, experts, .. }) = (tokens * config.top_k, config);
        let TrainingWorkspace {
            permutation: slots,
            identity,
            zeros,
            logits,
            n,
            tokens: sum,
            a,
            rows: y_rows,
            shared,
            ..
        } = workspace;
        let formats = self.formats(backend, x.dtype(), parameters);
        let Formats { between, outputs } = formats;
        let feeds = self.norm_feeds();
        let from_router = matches!(source, Source::Router);
        if let (Source::Router, Some(router)) = (&source, parameters.router) {
            let normed = if feeds { Some(n.write_as(between, [tokens, hidden])?) } else { None };
            backend.gate(
                stream,
                Gate {
                    x: shorten::<B>(x),
                    router: shorten::<B>(router),
                    bias: parameters.router_bias.map(shorten::<B>),
                    norm_weight: parameters.router_norm.map(shorten::<B>),
                    config: config.gate,
                    normed,
                    logits: logits.write([tokens, experts])?,
                },
            )?;
        }
        let routing: Routing<'_, B> = match (&source, &mut routes) {
            (Source::Routes(given), _) => {
                Routing { experts: shorten::<B>(given.experts), weights: shorten::<B>(given.weights) }
            }
            (_, None) => {
                let (operand, reason) = ("routes", "the backward pass reads the routes that are taken");
                return Err(Error::Missing { operation: "forward", operand, reason }.into());
            }
            (made, Some(routes)) => {
                let view = match made {
                    Source::Logits(view) => shorten::<B>(*view),
                    _ => logits.read([tokens, experts])?,
                };
                self.route(backend, stream, (view, parameters, token_ids), routes)?;
                Routing { experts: share::<B>(&routes.experts), weights: share::<B>(&routes.weights) }
            }
        };
        if let (true, false, Some(rule)) = (feeds, from_router, config.gate.norm) {
            let to = (sum.write([tokens, hidden])?, n.write_as(between, [tokens, hidden])?);
            norm(backend, stream, (x, parameters.router_norm, rule.eps), to)?;
        }
        permute(backend, stream, (routing.experts, experts), slots)?;
        let permutation = permutation(slots, [rows, experts])?;
        let read = if feeds { n.read_as(between, [tokens, hidden])? } else { shorten::<B>(x) };
        let on_input = config.weight_on == WeightOn::Input;
        backend.gate_up(
            stream,
            GateUp {
                x: shorten::<B>(read),
                rows: self.tokens(),
                permutation: again(&permutation),
                input_weights: on_input.then_some(shorten::<B>(routing.weights)),
                matrices: Matrices::Stack(shorten::<B>(parameters.gate_up)),
                bias: parameters.gate_up_bias.map(shorten::<B>),
                activation: config.activation,
                output: GateUpOutput::PreActivation,
                out: reborrow::<B>(&mut pre_activation),
            },
        )?;
        activate(
            backend,
            stream,
            config.activation,
            (share::<B>(&pre_activation), a.write_as(between, [rows, config.intermediate])?),
        )?;
        backend.down(
            stream,
            Down {
                a: a.read_as(between, [rows, config.intermediate])?,
                offsets: shorten::<B>(permutation.offsets),
                matrices: Matrices::Stack(shorten::<B>(parameters.down)),
                bias: parameters.down_bias.map(shorten::<B>),
                out: y_rows.write_as(outputs, [rows, hidden])?,
            },
        )?;
        let mut part = None;
        if let (Some(of), Some(weights), Some(z)) = (config.shared, &parameters.shared, shared_pre_activation) {
            permute(backend, stream, (zeros.read([tokens, 1])?, 1), identity)?;
            let permutation = super::permutation(identity, [tokens, 1])?;
            let expert = SharedExpert::new(backend, (of, weights), shorten::<B>(read), permutation);
            part = Some(expert.forward(backend, stream, shorten_mut::<B>(z), shared)?);
        }
        backend.combine(
            stream,
            Combine {
                rows: SlotRows::Permuted {
                    y: y_rows.read_as(outputs, [rows, hidden])?,
                    slot_row: shorten::<B>(permutation.slot_row),
                },
                weights: (!on_input).then_some(shorten::<B>(routing.weights)),
                copies: None,
                routed_scale: config.routed_scale,
                shared: part,
                residual: residual.map(|residual| match residual {
                    Residual::Of(view) => Residual::Of(shorten::<B>(view)),
                    Residual::InPlace => Residual::InPlace,
                }),
                norm: next.map(|next| NextNorm {
                    weight: next.weight.map(shorten::<B>),
                    eps: next.eps,
                    out: shorten_mut::<B>(next.out),
                }),
                out: shorten_mut::<B>(y),
            },
        )
    }

    /// The routes that the layer's rule makes of logits.
    fn route<B: Backend>(
        &self,
        backend: &B,
        stream: &B::Stream,
        (logits, parameters, token_ids): (In<'_, B>, &LayerParameters<'_, B>, Option<In<'_, B>>),
        RoutesOut { experts, weights }: &mut RoutesOut<'_, B>,
    ) -> Result<(), B::Error> {
        let table = match (parameters.table, token_ids) {
            (Some(experts), Some(ids)) => {
                Some(TokenTable { token_ids: shorten::<B>(ids), experts: shorten::<B>(experts) })
            }
            _ => None,
        };
        let choice = Choice {
            rule: self.config.routing,
            correction_bias: parameters.correction_bias.map(shorten::<B>),
            expert_scale: parameters.expert_scale.map(shorten::<B>),
            table,
            experts: reborrow::<B>(experts),
            weights: reborrow::<B>(weights),
            witness: None,
        };
        backend.route(stream, Route { logits: shorten::<B>(logits), choice })
    }
}

/// `a = act(z)`.
pub(super) fn activate<B: Backend>(
    backend: &B,
    stream: &B::Stream,
    activation: Activation,
    (z, out): (In<'_, B>, Out<'_, B>),
) -> Result<(), B::Error> {
    let (z, out) = (shorten::<B>(z), shorten_mut::<B>(out));
    let operands = if activation.is_gated() {
        ActivationOperands::Halves { gate_up: z, out }
    } else {
        ActivationOperands::Plain { up: z, out }
    };
    backend.activation(stream, Activate { activation, operands })
}

/// The shared expert of a call: the routed experts' operations with one expert that every token goes to.
pub(super) struct SharedExpert<'a, 'p, B: Backend> {
    pub(super) config: SharedConfig,
    pub(super) weights: &'a SharedParameters<'p, B>,
    /// What it reads, `[T, H]`.
    pub(super) x: In<'a, B>,
    pub(super) permutation: Permutation<'a, B>,
    pub(super) formats: Formats,
}

impl<'a, 'p, B: BackendBackward> SharedExpert<'a, 'p, B> {
    pub(super) fn new(
        backend: &B,
        (config, weights): (SharedConfig, &'a SharedParameters<'p, B>),
        x: In<'a, B>,
        permutation: Permutation<'a, B>,
    ) -> Self {
        let formats = Formats::of(backend, x.dtype(), [weights.gate_up.dtype(), weights.down.dtype()]);
        Self { config, weights, x, permutation, formats }
    }
}

impl<B: Backend> SharedExpert<'_, '_, B> {
    fn forward<'s>(
        &self,
        backend: &B,
        stream: &B::Stream,
        mut z: Out<'_, B>,
        scratch: &'s mut SharedScratch<B>,
    ) -> Result<Shared<'s, B>, B::Error> {
        let Self { config, weights, x, .. } = self;
        backend.gate_up(
            stream,
            GateUp {
                x: shorten::<B>(*x),
                rows: RowSource::Rows,
                permutation: again(&self.permutation),
                input_weights: None,
                matrices: Matrices::Stack(stack::<B>(shorten::<B>(weights.gate_up))?),
                bias: weights.gate_up_bias.map(|bias| row::<B>(shorten::<B>(bias))).transpose()?,
                activation: config.activation,
                output: GateUpOutput::PreActivation,
                out: reborrow::<B>(&mut z),
            },
        )?;
        self.outputs(backend, stream, share::<B>(&z), scratch)?;
        let [tokens, hidden] = [x.rows(), x.cols()];
        let logit = if self.gate().is_some() { Some(scratch.logit.read([tokens, 1])?) } else { None };
        Ok(Shared {
            y: scratch.y.read_as(self.formats.outputs, [tokens, hidden])?,
            factor: None,
            logit,
            scale: config.scale,
        })
    }

    /// Its gate, if it has one.
    pub(super) fn gate(&self) -> Option<In<'_, B>> {
        self.weights.gate.map(shorten::<B>)
    }

    /// From its pre-activation: `a`, `y` and the logit of its gate.
    pub(super) fn outputs(
        &self,
        backend: &B,
        stream: &B::Stream,
        z: In<'_, B>,
        scratch: &mut SharedScratch<B>,
    ) -> Result<(), B::Error> {
        let Self { config, weights, x, .. } = self;
        let [tokens, hidden, width] = [x.rows(), x.cols(), config.intermediate];
        activate(backend, stream, config.activation, (z, scratch.a.write_as(self.formats.between, [tokens, width])?))?;
        backend.down(
            stream,
            Down {
                a: scratch.a.read_as(self.formats.between, [tokens, width])?,
                offsets: shorten::<B>(self.permutation.offsets),
                matrices: Matrices::Stack(stack::<B>(shorten::<B>(weights.down))?),
                bias: weights.down_bias.map(|bias| row::<B>(shorten::<B>(bias))).transpose()?,
                out: scratch.y.write_as(self.formats.outputs, [tokens, hidden])?,
            },
        )?;
        if let Some(gate) = self.gate() {
            let (weight, out) = (row::<B>(shorten::<B>(gate))?, scratch.logit.write([tokens, 1])?);
            backend.linear(stream, Linear { x: shorten::<B>(*x), weight, bias: None, out })?;
        }
        Ok(())
    }
}
