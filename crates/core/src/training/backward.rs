use super::forward::{SharedExpert, activate};
use super::workspace::{Scratch, SharedScratch, TrainingWorkspace};
use super::{
    Activations, Formats, TrainingLayer, again, deliver, norm, permutation, permute, row, row_gradient, shorter, stack,
    stack_gradient,
};
use crate::backend::{Backend, BackendBackward, In, shorten};
use crate::config::{LayerConfig, WeightOn};
use crate::dtype::DType;
use crate::operation::*;
use crate::routing::{Permutation, Routing};

impl TrainingLayer {
    /// The gradients of a [`forward`](Self::forward), the stages in reverse order, as
    /// [`reference::backward`](crate::reference::backward) has them. A gradient that is not asked for is not made, as far
    /// as no other needs it.
    ///
    /// Errors: `Shape`, `DType`, `Value`, `Missing` or `Unexpected`, naming the operation and the operand.
    pub fn backward<B: BackendBackward>(
        &self,
        backend: &B,
        stream: &B::Stream,
        call: LayerBackward<'_, '_, B>,
        workspace: &mut TrainingWorkspace<B>,
    ) -> Result<(), B::Error> {
        let tokens = call.problem(&self.config)?;
        workspace.check("backward", tokens)?;
        let LayerBackward { d_y, d_logits, x, parameters, source, routing, pre_activation, .. } = call;
        let LayerBackward { shared_pre_activation, gradients, .. } = call;
        let from_router = matches!(source, RoutesFrom::Router);
        let LayerConfig { hidden, experts, top_k, .. } = self.config;
        let formats = self.formats(backend, x.dtype(), parameters);
        self.logits(backend, stream, (x, parameters, from_router), formats, workspace)?;
        let LayerGradients { gate_up, gate_up_bias, down, down_bias, shared: shared_gradients, .. } = gradients;
        let through = Experts {
            layer: self,
            d_y: shorten::<B>(d_y),
            x: shorten::<B>(x),
            parameters,
            routing: Routing { experts: shorten::<B>(routing.experts), weights: shorten::<B>(routing.weights) },
            z: shorten::<B>(pre_activation),
            formats,
        };
        through.run(backend, stream, (gate_up, gate_up_bias, down, down_bias), workspace)?;
        if let (Some(z), Some(_)) = (shared_pre_activation, &parameters.shared) {
            through.shared(backend, stream, (z, shared_gradients), workspace)?;
        }

        let shape = [tokens, top_k];
        let LayerGradients { x: to_x, weights, logits, router, router_bias, router_norm, expert_scale, .. } = gradients;
        deliver(backend, stream, workspace.d_weights.read(shape)?, weights)?;
        let logits_of = match source {
            RoutesFrom::Router => None,
            RoutesFrom::Logits(view) => Some(view),
            RoutesFrom::Routes => {
                return self.finish(backend, stream, (x, parameters), (to_x, router_norm), workspace);
            }
        };
        let read = match logits_of {
            Some(view) => shorten::<B>(view),
            None => workspace.logits.read([tokens, experts])?,
        };
        let target = workspace.d_logits.write([tokens, experts])?;
        backend.route_backward(
            stream,
            RouteBackward {
                logits: shorten::<B>(read),
                experts: shorten::<B>(routing.experts),
                d_weights: workspace.d_weights.read(shape)?,
                rule: self.config.routing,
                expert_scale: parameters.expert_scale.map(shorten::<B>),
                d_logits: Some(Gradient::assign(target)),
                d_expert_scale: shorter::<B>(expert_scale),
            },
        )?;
        if let Some(more) = d_logits {
            let acc = workspace.d_logits.write([tokens, experts])?;
            let weight = Factor::Value(1.0);
            backend.accumulate(stream, Accumulate { acc, weight, y: shorten::<B>(more) })?;
        }
        deliver(backend, stream, workspace.d_logits.read([tokens, experts])?, logits)?;
        if let Some(matrix) = parameters.router.filter(|_| from_router) {
            let TrainingWorkspace { d_logits, logits, n, d_n, tokens: apart, .. } = &mut *workspace;
            let normed = self.config.gate.norm.is_some();
            let d_n = if normed && !self.norm_feeds() {
                Gradient::assign(apart.write([tokens, hidden])?)
            } else {
                Gradient::accumulate(d_n.write([tokens, hidden])?)
            };
            backend.gate_backward(
                stream,
                GateBackward {
                    d_logits: d_logits.read([tokens, experts])?,
                    logits: Some(logits.read([tokens, experts])?),
                    softcap: self.config.gate.softcap,
                    scale: self.config.gate.scale,
                    n: Some(if normed { n.read_as(formats.between, [tokens, hidden])? } else { shorten::<B>(x) }),
                    router: shorten::<B>(matrix),
                    d_n: Some(d_n),
                    d_router: shorter::<B>(router),
                    d_bias: shorter::<B>(router_bias),
                },
            )?;
            if let (Some(rule), false) = (self.config.gate.norm, self.norm_feeds()) {
                let TrainingWorkspace { d_n, tokens: apart, .. } = &mut *workspace;
                let d_x = Some(Gradient::accumulate(d_n.write([tokens, hidden])?));
                let (weight, d_n) = (parameters.router_norm.map(shorten::<B>), apart.read([tokens, hidden])?);
                let (x, eps, d_weight) = (shorten::<B>(x), rule.eps, shorter::<B>(router_norm));
                backend.norm_backward(stream, NormBackward { x, weight, eps, d_n, d_x, d_weight })?;
                return deliver(backend, stream, workspace.d_n.read([tokens, hidden])?, to_x);
            }
        }
        self.finish(backend, stream, (x, parameters), (to_x, router_norm), workspace)
    }

    /// The logits once more, and the norm of x where somebody reads it.
    fn logits<B: Backend>(
        &self,
        backend: &B,
        stream: &B::Stream,
        (x, parameters, from_router): (In<'_, B>, &LayerParameters<'_, B>, bool),
        Formats { between, .. }: Formats,
        workspace: &mut TrainingWorkspace<B>,
    ) -> Result<(), B::Error> {
        let LayerConfig { hidden, experts, gate: config, .. } = self.config;
        let tokens = x.rows();
        let TrainingWorkspace { logits, n, tokens: sum, .. } = workspace;
        if let Some(router) = parameters.router.filter(|_| from_router) {
            let normed = if config.norm.is_some() { Some(n.write_as(between, [tokens, hidden])?) } else { None };
            let (x, router) = (shorten::<B>(x), shorten::<B>(router));
            let bias = parameters.router_bias.map(shorten::<B>);
            let norm_weight = parameters.router_norm.map(shorten::<B>);
            let logits = logits.write([tokens, experts])?;
            return backend.gate(stream, Gate { x, router, bias, norm_weight, config, normed, logits });
        }
        match config.norm.filter(|_| self.norm_feeds()) {
            Some(rule) => {
                let to = (sum.write([tokens, hidden])?, n.write_as(between, [tokens, hidden])?);
                norm(backend, stream, (x, parameters.router_norm, rule.eps), to)
            }
            None => Ok(()),
        }
    }

    /// From the gradient of what the experts read to that of x.
    fn finish<B: BackendBackward>(
        &self,
        backend: &B,
        stream: &B::Stream,
        (x, parameters): (In<'_, B>, &LayerParameters<'_, B>),
        (to_x, to_norm): (Option<Gradient<'_, B>>, Option<Gradient<'_, B>>),
        workspace: &mut TrainingWorkspace<B>,
    ) -> Result<(), B::Error> {
        let d_n = workspace.d_n.read([x.rows(), x.cols()])?;
        let Some(rule) = self.config.gate.norm.filter(|_| self.norm_feeds()) else {
            return deliver(backend, stream, d_n, to_x);
        };
        let weight = parameters.router_norm.map(shorten::<B>);
        let (d_x, d_weight) = (shorter::<B>(to_x), shorter::<B>(to_norm));
        backend.norm_backward(stream, NormBackward { x: shorten::<B>(x), weight, eps: rule.eps, d_n, d_x, d_weight })
    }
}

/// Through the experts of a call.
struct Experts<'a, 'p, B: Backend> {
    layer: &'a TrainingLayer,
    d_y: In<'a, B>,
    x: In<'a, B>,
    parameters: &'a LayerParameters<'p, B>,
    routing: Routing<'a, B>,
    z: In<'a, B>,
    formats: Formats,
}

/// Of gate_up and its bias, of down and its bias.
type MatrixGradients<'a, B> =
    (Option<Gradient<'a, B>>, Option<Gradient<'a, B>>, Option<Gradient<'a, B>>, Option<Gradient<'a, B>>);

impl<B: BackendBackward> Experts<'_, '_, B> {
    /// The gradients of the matrices, of the routing weights, and of what the experts read.
    fn run(
        &self,
        backend: &B,
        stream: &B::Stream,
        (gate_up, gate_up_bias, down, down_bias): MatrixGradients<'_, B>,
        workspace: &mut TrainingWorkspace<B>,
    ) -> Result<(), B::Error> {
        let config = &self.layer.config;
        let &LayerConfig { hidden, intermediate, experts, top_k, .. } = config;
        let (tokens, on_input) = (self.x.rows(), config.weight_on == WeightOn::Input);
        let (rows, Formats { between, outputs }) = (tokens * top_k, self.formats);
        let TrainingWorkspace {
            permutation: slots, n, d_n, d_weights, ones, factors, a, d_a, d_z, rows: d_rows, ..
        } = workspace;
        permute(backend, stream, (self.routing.experts, experts), slots)?;
        let slots = permutation(slots, [rows, experts])?;
        let to = Some(d_a.write_as(between, [rows, intermediate])?);
        backend.down_backward(stream, DownBackward { d_a: to, ..self.through_down(&slots) })?;
        // a bias has a part in the gradient of the routing weights, and its own wants rows without factors
        let plain = !on_input && down.is_some() && down_bias.is_none() && self.parameters.down_bias.is_none();
        let weighted = plain && {
            let activation = self.through_activation(&slots, (d_a, a, d_z))?;
            let (slot_row, d_weights) = (shorten::<B>(slots.slot_row), d_weights.write([tokens, top_k])?);
            let both = ActivationWeightsBackward { activation, slot_row, d_weights };
            backend.activation_weights_backward(stream, both)?
        };
        if !weighted {
            backend.activation_backward(stream, self.through_activation(&slots, (d_a, a, d_z))?)?;
        }
        if !on_input && !weighted {
            let experts = shorten::<B>(self.routing.experts);
            let bias = self.parameters.down_bias.map(|bias| DownBias { bias: shorten::<B>(bias), experts });
            let from = WeightsFrom::Intermediate {
                a: a.read_as(between, [rows, intermediate])?,
                d_a: d_a.read_as(between, [rows, intermediate])?,
                slot_row: shorten::<B>(slots.slot_row),
                bias,
            };
            let out = Gradient::assign(d_weights.write([tokens, top_k])?);
            let d_weights = Some(WeightsGradient { from, out });
            let routed_scale = config.routed_scale;
            backend.combine_backward(
                stream,
                CombineBackward { routed_scale, d_weights, ..CombineBackward::new(shorten::<B>(self.d_y), top_k) },
            )?;
        }
        if weighted {
            let (a, d_down) = (Some(a.read_as(between, [rows, intermediate])?), shorter::<B>(down));
            backend.down_backward(stream, DownBackward { a, d_down, ..self.through_down(&slots) })?;
        } else if down.is_some() || down_bias.is_some() {
            let gradients = (shorter::<B>(down), shorter::<B>(down_bias));
            self.matrices_of_down(backend, stream, &slots, gradients, (a, d_a, ones, factors))?;
        }
        let read = if self.layer.norm_feeds() { n.read_as(between, [tokens, hidden])? } else { shorten::<B>(self.x) };
        backend.gate_up_backward(
            stream,
            GateUpBackward {
                d_z: d_z.read_as(between, [rows, config.gate_up_rows()])?,
                x: Some(shorten::<B>(read)),
                rows: self.layer.tokens(),
                permutation: again(&slots),
                input_weights: on_input.then_some(shorten::<B>(self.routing.weights)),
                matrices: shorten::<B>(self.parameters.gate_up),
                d_rows: Some(d_rows.write_as(outputs, [rows, hidden])?),
                d_gate_up: shorter::<B>(gate_up),
                d_bias: shorter::<B>(gate_up_bias),
            },
        )?;
        let of_rows = || -> crate::error::Result<SlotRows<'_, B>> {
            Ok(SlotRows::Permuted {
                y: d_rows.read_as(outputs, [rows, hidden])?,
                slot_row: shorten::<B>(slots.slot_row),
            })
        };
        if on_input {
            let out = Gradient::assign(d_weights.write([tokens, top_k])?);
            let d_weights = Some(WeightsGradient { from: WeightsFrom::Rows(of_rows()?), out });
            backend.combine_backward(
                stream,
                CombineBackward { d_weights, ..CombineBackward::new(shorten::<B>(read), top_k) },
            )?;
        }
        backend.combine(
            stream,
            Combine {
                rows: of_rows()?,
                weights: on_input.then_some(shorten::<B>(self.routing.weights)),
                copies: None,
                routed_scale: 1.0,
                shared: None,
                residual: None,
                norm: None,
                out: d_n.write([tokens, hidden])?,
            },
        )
    }

    /// The gradients of down and its bias. Products of narrow numbers take no factors in the middle of a sum: there a is
    /// multiplied by the rows' factors first, where `d_a`, of which nothing is read any more, lay.
    fn matrices_of_down(
        &self,
        backend: &B,
        stream: &B::Stream,
        slots: &Permutation<'_, B>,
        (d_down, d_bias): (Option<Gradient<'_, B>>, Option<Gradient<'_, B>>),
        (a, weighted, ones, factors): (&Scratch<B>, &mut Scratch<B>, &Scratch<B>, &mut Scratch<B>),
    ) -> Result<(), B::Error> {
        let &LayerConfig { intermediate, top_k, routed_scale, .. } = &self.layer.config;
        let (tokens, between) = (self.x.rows(), self.formats.between);
        let [rows, of_rows] = [[tokens * top_k, 1], [tokens * top_k, intermediate]];
        if between == DType::F32 || d_down.is_none() {
            let (a, row_weights) = (Some(a.read_as(between, of_rows)?), Some(self.by_slot(None)));
            let (d_down, d_bias) = (shorter::<B>(d_down), shorter::<B>(d_bias));
            let whole = DownBackward { row_weights, a, d_down, d_bias, ..self.through_down(slots) };
            return backend.down_backward(stream, whole);
        }
        let (d_y, slot_row) = (factors.write(rows)?, shorten::<B>(slots.slot_row));
        let each = CombineBackward {
            weights: self.by_slot(None).weights.map(shorten::<B>),
            routed_scale,
            d_rows: Some(RowsGradient::Permuted { d_y, slot_row }),
            ..CombineBackward::new(ones.read([tokens, 1])?, top_k)
        };
        backend.combine_backward(stream, each)?;
        let product = CombineBackward {
            weights: Some(factors.read(rows)?),
            d_rows: Some(RowsGradient::Slots(weighted.write_as(between, of_rows)?)),
            ..CombineBackward::new(a.read_as(between, of_rows)?, 1)
        };
        backend.combine_backward(stream, product)?;
        let (a, d_down) = (Some(weighted.read_as(between, of_rows)?), shorter::<B>(d_down));
        backend.down_backward(stream, DownBackward { a, d_down, ..self.through_down(slots) })?;
        let (row_weights, d_bias) = (Some(self.by_slot(None)), shorter::<B>(d_bias));
        match d_bias {
            Some(_) => backend.down_backward(stream, DownBackward { row_weights, d_bias, ..self.through_down(slots) }),
            None => Ok(()),
        }
    }

    /// Through down, of nothing yet.
    fn through_down<'s>(&'s self, slots: &'s Permutation<'_, B>) -> DownBackward<'s, B> {
        DownBackward {
            d_out: shorten::<B>(self.d_y),
            rows: self.layer.tokens(),
            permutation: again(slots),
            row_weights: None,
            a: None,
            matrices: shorten::<B>(self.parameters.down),
            d_a: None,
            d_down: None,
            d_bias: None,
        }
    }

    /// Through the activation, each row with its factor.
    fn through_activation<'s>(
        &'s self,
        slots: &'s Permutation<'_, B>,
        (d_a, a, d_z): (&'s Scratch<B>, &'s mut Scratch<B>, &'s mut Scratch<B>),
    ) -> crate::error::Result<ActivationBackward<'s, B>> {
        let (config, between) = (&self.layer.config, self.formats.between);
        let (rows, row_slot) = (self.x.rows() * config.top_k, shorten::<B>(slots.row_slot));
        let activations = Activations {
            activation: config.activation,
            z: shorten::<B>(self.z),
            d_a: d_a.read_as(between, [rows, config.intermediate])?,
            row_weights: Some(self.by_slot(Some(row_slot))),
            a: a.write_as(between, [rows, config.intermediate])?,
            d_z: d_z.write_as(between, [rows, config.gate_up_rows()])?,
        };
        Ok(activations.operands())
    }

    /// What the rows' outputs are multiplied by.
    fn by_slot<'s>(&'s self, row_slot: Option<In<'s, B>>) -> RowWeights<'s, B> {
        let on_output = self.layer.config.weight_on == WeightOn::Output;
        let weights = on_output.then_some(shorten::<B>(self.routing.weights));
        RowWeights { weights, row_slot, scale: self.layer.config.routed_scale }
    }

    /// The gradients of the shared expert; adds to that of what the experts read.
    fn shared(
        &self,
        backend: &B,
        stream: &B::Stream,
        (z, gradients): (In<'_, B>, SharedGradients<'_, B>),
        workspace: &mut TrainingWorkspace<B>,
    ) -> Result<(), B::Error> {
        let (Some(config), Some(weights)) = (self.layer.config.shared, &self.parameters.shared) else { return Ok(()) };
        let [tokens, hidden, width] = [self.x.rows(), self.x.cols(), config.intermediate];
        let TrainingWorkspace { identity, zeros, n, d_n, tokens: apart, shared, .. } = workspace;
        permute(backend, stream, (zeros.read([tokens, 1])?, 1), identity)?;
        let permutation = permutation(identity, [tokens, 1])?;
        let x = if self.layer.norm_feeds() {
            n.read_as(self.formats.between, [tokens, hidden])?
        } else {
            shorten::<B>(self.x)
        };
        let expert = SharedExpert::new(backend, (config, weights), x, permutation);
        let Formats { between, outputs } = expert.formats;
        let gate = expert.gate();
        if gate.is_some() {
            expert.outputs(backend, stream, shorten::<B>(z), shared)?;
        } else {
            activate(backend, stream, config.activation, (z, shared.a.write_as(between, [tokens, width])?))?;
        }
        let SharedScratch { a, d_a, d_z, y, d_y, logit, d_logit } = shared;
        let d_gate = if gate.is_some() { Some(Gradient::assign(d_logit.write([tokens, 1])?)) } else { None };
        let logit = if gate.is_some() { Some(logit.read([tokens, 1])?) } else { None };
        let part = SharedBackward {
            y: Some(y.read_as(outputs, [tokens, hidden])?),
            factor: None,
            logit,
            scale: config.scale,
            d_y: Some(d_y.write_as(between, [tokens, hidden])?),
            d_gate,
        };
        backend.combine_backward(
            stream,
            CombineBackward { shared: Some(part), ..CombineBackward::new(shorten::<B>(self.d_y), 1) },
        )?;
        backend.down_backward(
            stream,
            DownBackward {
                d_out: d_y.read_as(between, [tokens, hidden])?,
                rows: RowSource::Rows,
                permutation: again(&expert.permutation),
                row_weights: None,
                a: Some(a.read_as(between, [tokens, width])?),
                matrices: stack::<B>(shorten::<B>(weights.down))?,
                d_a: Some(d_a.write_as(between, [tokens, width])?),
                d_down: stack_gradient(shorter::<B>(gradients.down))?,
                d_bias: row_gradient(shorter::<B>(gradients.down_bias))?,
            },
        )?;
        let height = config.activation.gate_up_rows(width);
        let activations = Activations {
            activation: config.activation,
            z: shorten::<B>(z),
            d_a: d_a.read_as(between, [tokens, width])?,
            row_weights: None,
            a: a.write_as(between, [tokens, width])?,
            d_z: d_z.write_as(between, [tokens, height])?,
        };
        backend.activation_backward(stream, activations.operands())?;
        backend.gate_up_backward(
            stream,
            GateUpBackward {
                d_z: d_z.read_as(between, [tokens, height])?,
                x: Some(shorten::<B>(expert.x)),
                rows: RowSource::Rows,
                permutation: again(&expert.permutation),
                input_weights: None,
                matrices: stack::<B>(shorten::<B>(weights.gate_up))?,
                d_rows: Some(apart.write([tokens, hidden])?),
                d_gate_up: stack_gradient(shorter::<B>(gradients.gate_up))?,
                d_bias: row_gradient(shorter::<B>(gradients.gate_up_bias))?,
            },
        )?;
        let acc = d_n.write([tokens, hidden])?;
        let (weight, y) = (Factor::Value(1.0), apart.read([tokens, hidden])?);
        backend.accumulate(stream, Accumulate { acc, weight, y })?;
        let Some(gate) = gate else { return Ok(()) };
        backend.gate_backward(
            stream,
            GateBackward {
                d_logits: d_logit.read([tokens, 1])?,
                logits: None,
                softcap: None,
                scale: 1.0,
                n: Some(shorten::<B>(expert.x)),
                router: row::<B>(shorten::<B>(gate))?,
                d_n: Some(Gradient::accumulate(d_n.write([tokens, hidden])?)),
                d_router: row_gradient(shorter::<B>(gradients.gate))?,
                d_bias: None,
            },
        )
    }
}
