use crate::copy;
use crate::down::down_of;
use crate::error::Result;
use crate::gate_up::gate_up_of;
use crate::grouped::Groups;
use crate::launch::Tensor;
use crate::memory::{Memory, Mut, Ref};
use crate::pack::{Experts, floats};
use crate::workspace::{Buffer, PermutationScratch, RoutingScratch, SharedScratch, Workspace};
use crate::{Cuda, CudaStream};
use fused_moe_core::DType::{F16, F32, U32};
use fused_moe_core::config::{LayerConfig, Selection, SharedConfig, WeightOn};
use fused_moe_core::operation::*;
use fused_moe_core::problem::LayerProblem;
use fused_moe_core::weights::{LayerWeights, SharedWeights};
use fused_moe_core::{Backend, DType, HostView, Layer, Numerics, Options, Permutation, Routing, View};
use std::ops::Range;

type In<'a> = View<Ref<'a>>;
type Out<'a> = View<Mut<'a>>;

/// Tokens that the router and the shared gate take at a time where a token's bits must not depend on the batch: so few
/// that one kernel is chosen for any number of them.
const INVARIANT_TOKENS: usize = crate::plan::FEW_TOKENS;

/// A layer prepared for this backend: its weights, copied once in the format that they came in.
///
/// With 2-byte weights and x in the same format, what lies between gate_up and down is kept in that format; otherwise in
/// f32. Making a workspace compiles what calls with up to its number of tokens need, so that they can be captured at once,
/// if x and y are in the weights' format and logits in f32, all without gaps at addresses that are multiples of 16; others
/// are to be run once before, with as many tokens.
#[derive(Debug)]
pub struct CudaLayer {
    pub(crate) cuda: Cuda,
    pub(crate) problem: LayerProblem,
    numerics: Numerics,
    pub(crate) router: Option<Router>,
    router_norm: Option<Memory>,
    correction_bias: Option<Memory>,
    expert_scale: Option<Memory>,
    table: Option<(Memory, usize)>,
    experts: Experts,
    shared: Option<SharedExpert>,
    /// For calls that are explained and not run.
    pub(crate) idle: CudaStream,
}

/// `[E, H]` as it came, and f32 `[E]`.
#[derive(Debug)]
pub(crate) struct Router {
    matrix: Memory,
    dtype: DType,
    bias: Option<Memory>,
}

/// The shared expert's matrices, as those of one expert, and f32 `[H]`.
#[derive(Debug)]
struct SharedExpert {
    config: SharedConfig,
    matrices: Experts,
    gate: Option<Memory>,
}

impl CudaLayer {
    pub(crate) fn new(
        cuda: &Cuda,
        config: &LayerConfig,
        weights: &LayerWeights<'_>,
        options: &Options,
    ) -> Result<Self> {
        let problem = LayerProblem::new(config, weights, options)?;
        let router = weights.router.map(|view| Router::new(cuda, view, weights.router_bias)).transpose()?;
        let experts: Vec<_> = weights.experts.iter().collect();
        let shared = match (config.shared, &weights.shared) {
            (Some(config), Some(weights)) => Some(SharedExpert::new(cuda, config, weights)?),
            _ => None,
        };
        let table = weights.table.as_ref().map(|table| {
            Ok::<_, crate::Error>((upload(cuda, bytemuck::cast_slice(&table.experts))?, table.vocabulary))
        });
        Ok(Self {
            cuda: cuda.clone(),
            numerics: options.numerics,
            router,
            router_norm: vector_of(cuda, weights.router_norm)?,
            correction_bias: vector_of(cuda, weights.correction_bias)?,
            expert_scale: vector_of(cuda, weights.expert_scale)?,
            table: table.transpose()?,
            experts: Experts::local(cuda, &experts, problem.local.clone())?,
            shared,
            idle: cuda.stream()?,
            problem,
        })
    }

    fn invariant(&self) -> bool {
        self.numerics == Numerics::BatchInvariant
    }
}

impl Router {
    fn new(cuda: &Cuda, view: HostView<'_>, bias: Option<HostView<'_>>) -> Result<Self> {
        let row_bytes = view.cols() * view.dtype().size();
        let mut bytes = Vec::with_capacity(view.rows() * row_bytes);
        for row in 0..view.rows() {
            let row = view.row_range(row, 1)?;
            bytes.extend_from_slice(&row.storage()[row.offset()..row.offset() + row_bytes]);
        }
        Ok(Self { matrix: upload(cuda, &bytes)?, dtype: view.dtype(), bias: vector_of(cuda, bias)? })
    }
}

impl SharedExpert {
    fn new(cuda: &Cuda, config: SharedConfig, weights: &SharedWeights<'_>) -> Result<Self> {
        let matrices = Experts::local(cuda, &[&weights.matrices], 0..1)?;
        Ok(Self { config, matrices, gate: vector_of(cuda, weights.gate)? })
    }
}

impl Layer<Cuda> for CudaLayer {
    fn config(&self) -> &LayerConfig {
        &self.problem.config
    }

    fn weight_bytes(&self) -> usize {
        let bytes = |memory: &Option<Memory>| memory.as_ref().map_or(0, Memory::bytes);
        let router = self.router.as_ref().map_or(0, |router| router.matrix.bytes() + bytes(&router.bias));
        let vectors = [&self.router_norm, &self.correction_bias, &self.expert_scale].map(bytes);
        let table = self.table.as_ref().map_or(0, |(table, _)| table.bytes());
        let shared = self.shared.as_ref().map_or(0, |shared| shared.matrices.bytes() + bytes(&shared.gate));
        router + vectors.iter().sum::<usize>() + table + self.experts.bytes() + shared
    }

    fn workspace_bytes(&self, max_tokens: usize) -> Result<usize> {
        Workspace::bytes(&self.problem, max_tokens)
    }

    fn workspace_in(&self, memory: Memory, max_tokens: usize) -> Result<Workspace> {
        memory.check(self.cuda.device(), "workspace", "memory")?;
        let workspace = Workspace::new(memory, &self.problem, max_tokens)?;
        self.compile(max_tokens)?;
        Ok(workspace)
    }

    fn workspace(&self, max_tokens: usize) -> Result<Workspace> {
        self.workspace_in(Memory::new(self.cuda.device(), self.workspace_bytes(max_tokens)?)?, max_tokens)
    }

    fn explain(&self, tokens: usize) -> String {
        self.explanation(tokens).unwrap_or_else(|error| error.to_string())
    }

    fn run(&self, stream: &CudaStream, call: Forward<'_, Cuda>, workspace: &mut Workspace) -> Result<()> {
        let _current = self.cuda.device().bind("forward")?;
        workspace.check(self.cuda.device(), "forward")?;
        self.run_on(&self.cuda, stream, call, workspace)
    }
}

impl CudaLayer {
    /// The stages in order.
    pub(crate) fn run_on(
        &self,
        cuda: &Cuda,
        stream: &CudaStream,
        call: Forward<'_, Cuda>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let tokens = self.problem.forward(&call)?.tokens;
        let mut scratch = workspace.carve("forward", &self.problem, tokens)?;
        let config = &self.problem.config;
        let (hidden, rows, invariant) = (config.hidden, tokens * config.top_k, self.invariant());
        let alone = tokens == 1 && call.counts.is_none() && self.slots_are_rows(&call.source);
        let Forward { x, source, token_ids, sequences: _, router_state: _, residual, norm, routes, counts, y } = call;

        let routing = match source {
            Source::Routes(Routing { experts, weights }) => Routing { experts, weights },
            Source::Logits(logits) => self.route(cuda, stream, logits, token_ids, &mut scratch.routing)?,
            Source::Router => self.gate_route(cuda, stream, x, token_ids, &mut scratch.routing)?,
        };
        if !alone {
            self.permute(cuda, stream, routing.experts, &mut scratch.permutation)?;
        }
        let Permutation { row_slot, slot_row, offsets } = scratch.permutation.views(rows, config.experts)?;
        let groups = if alone {
            Groups::Slots { experts: Tensor::of(&routing.experts)? }
        } else {
            Groups::Offsets { offsets: Tensor::of(&offsets)?, row_slot: Tensor::of(&row_slot)? }
        };
        let x = self.expert_input(cuda, stream, x, &mut scratch.tokens, &mut scratch.y)?;
        let (between, outputs) = formats(x.dtype(), self.problem.gate_up, self.problem.down);
        let on_input = config.weight_on == WeightOn::Input;
        gate_up_of(
            cuda,
            stream,
            &GateUp {
                x,
                rows: RowSource::Tokens { top_k: config.top_k },
                permutation: Permutation { row_slot, slot_row, offsets },
                input_weights: on_input.then_some(routing.weights),
                matrices: Matrices::Packed(&self.experts),
                bias: None,
                activation: config.activation,
                output: GateUpOutput::Activated,
                out: scratch.a.view_mut(between, [rows, config.intermediate])?,
            },
            groups,
            invariant,
        )?;
        down_of(
            cuda,
            stream,
            &Down {
                a: scratch.a.view(between, [rows, config.intermediate])?,
                offsets,
                matrices: Matrices::Packed(&self.experts),
                bias: None,
                out: scratch.y.view_mut(outputs, [rows, hidden])?,
            },
            groups,
            invariant,
        )?;
        let shared = match &self.shared {
            Some(shared) => Some(shared.run(cuda, stream, x, &mut scratch.shared, invariant)?),
            None => None,
        };
        let y_rows = scratch.y.view(outputs, [rows, hidden])?;
        cuda.combine(
            stream,
            Combine {
                rows: if alone { SlotRows::Slots(y_rows) } else { SlotRows::Permuted { y: y_rows, slot_row } },
                weights: (!on_input).then_some(routing.weights),
                copies: None,
                routed_scale: config.routed_scale,
                shared,
                residual: residual.map(for_a_while),
                norm: norm.map(norm_for_a_while),
                out: y,
            },
        )?;
        if let Some(RoutesOut { experts, weights }) = routes {
            copy::copy(cuda, stream, routing.experts, experts)?;
            copy::copy(cuda, stream, routing.weights, weights)?;
        }
        match counts {
            Some(counts) => copy::counts(cuda, stream, offsets, counts),
            None => Ok(()),
        }
    }

    /// Whether every slot is sure to have an expert that is here, so that one token's need no permutation.
    fn slots_are_rows(&self, source: &Source<'_, Cuda>) -> bool {
        let LayerProblem { config, local, .. } = &self.problem;
        let ours = !matches!(source, Source::Routes(_)) && config.routing.selection != Selection::Table;
        ours && *local == (0..config.experts) && !self.invariant()
    }

    /// The routes that the layer's rule makes of logits.
    fn route<'s>(
        &self,
        cuda: &Cuda,
        stream: &CudaStream,
        logits: In<'_>,
        token_ids: Option<In<'_>>,
        scratch: &'s mut RoutingScratch<'_>,
    ) -> Result<Routing<'s, Cuda>> {
        let (slots, RoutingScratch { experts, weights, .. }) = ([logits.rows(), self.problem.config.top_k], scratch);
        let choice = self.choice(token_ids, experts.view_mut(U32, slots)?, weights.view_mut(F32, slots)?)?;
        cuda.route(stream, Route { logits, choice })?;
        Ok(Routing { experts: experts.view(U32, slots)?, weights: weights.view(F32, slots)? })
    }

    /// The routes that the layer's router makes of tokens.
    fn gate_route<'s>(
        &self,
        cuda: &Cuda,
        stream: &CudaStream,
        x: In<'_>,
        token_ids: Option<In<'_>>,
        scratch: &'s mut RoutingScratch<'_>,
    ) -> Result<Routing<'s, Cuda>> {
        let (config, tokens) = (&self.problem.config, x.rows());
        let (slots, all) = ([tokens, config.top_k], [tokens, config.experts]);
        let RoutingScratch { logits, experts, weights } = scratch;
        let Some(router) = &self.router else {
            return Ok(Routing { experts: experts.view(U32, slots)?, weights: weights.view(F32, slots)? });
        };
        let choice = self.choice(token_ids, experts.view_mut(U32, slots)?, weights.view_mut(F32, slots)?)?;
        if self.invariant() {
            for Range { start, end } in pieces(tokens, true) {
                let some = logits.view_mut(F32, all)?.row_range(start, end - start)?;
                cuda.gate(stream, self.gate(router, x.row_range(start, end - start)?, some)?)?;
            }
            cuda.route(stream, Route { logits: logits.view(F32, all)?, choice })?;
        } else {
            let gate = self.gate(router, x, logits.view_mut(F32, all)?)?;
            cuda.gate_route(stream, GateRoute { gate, choice })?;
        }
        Ok(Routing { experts: experts.view(U32, slots)?, weights: weights.view(F32, slots)? })
    }

    fn gate<'s>(&'s self, router: &'s Router, x: In<'s>, logits: Out<'s>) -> Result<Gate<'s, Cuda>> {
        let config = &self.problem.config;
        Ok(Gate {
            x,
            router: View::new(router.matrix.read(), router.dtype, 0, [config.experts, config.hidden])?,
            bias: vector(&router.bias, config.experts)?,
            norm_weight: vector(&self.router_norm, config.hidden)?,
            config: config.gate,
            normed: None,
            logits,
        })
    }

    fn choice<'s>(&'s self, token_ids: Option<In<'s>>, experts: Out<'s>, weights: Out<'s>) -> Result<Choice<'s, Cuda>> {
        let config = &self.problem.config;
        let table = match (&self.table, token_ids) {
            (Some((table, vocabulary)), Some(token_ids)) => {
                Some(TokenTable { token_ids, experts: View::new(table.read(), U32, 0, [*vocabulary, config.top_k])? })
            }
            _ => None,
        };
        Ok(Choice {
            rule: config.routing,
            correction_bias: vector(&self.correction_bias, config.experts)?,
            expert_scale: vector(&self.expert_scale, config.experts)?,
            table,
            experts,
            weights,
            witness: None,
        })
    }

    /// The slots of the experts that are here, by expert.
    fn permute(
        &self,
        cuda: &Cuda,
        stream: &CudaStream,
        experts: In<'_>,
        scratch: &mut PermutationScratch<'_>,
    ) -> Result<()> {
        let (slots, experts_total) = (experts.rows() * experts.cols(), self.problem.config.experts);
        let operands = Permute {
            experts,
            experts_total,
            local: self.problem.local.clone(),
            row_slot: scratch.row_slot.view_mut(U32, [slots])?,
            slot_row: scratch.slot_row.view_mut(U32, [slots])?,
            offsets: scratch.offsets.view_mut(U32, [experts_total + 1])?,
        };
        cuda.permute(stream, operands)
    }

    /// What the experts read: x, or its norm where the gate's norm feeds them. `spare` is used up to `[T, H]`.
    fn expert_input<'s>(
        &self,
        cuda: &Cuda,
        stream: &CudaStream,
        x: In<'s>,
        tokens: &'s mut Buffer<'_>,
        spare: &mut Buffer<'_>,
    ) -> Result<In<'s>> {
        let config = &self.problem.config;
        let Some(norm) = config.gate.norm.filter(|norm| norm.feeds_experts) else { return Ok(x) };
        let (shape, dtype) = ([x.rows(), x.cols()], x.dtype());
        let normed = NextNorm {
            weight: vector(&self.router_norm, config.hidden)?,
            eps: norm.eps,
            out: tokens.view_mut(dtype, shape)?,
        };
        // the norm of x is that of x plus no rows at all
        cuda.combine(
            stream,
            Combine {
                rows: SlotRows::Slots(x.row_range(0, 0)?),
                weights: None,
                copies: None,
                routed_scale: 1.0,
                shared: None,
                residual: Some(Residual::Of(x)),
                norm: Some(normed),
                out: spare.view_mut(dtype, shape)?,
            },
        )?;
        tokens.view(dtype, shape)
    }
}

impl PermutationScratch<'_> {
    fn views(&self, slots: usize, experts: usize) -> Result<Permutation<'_, Cuda>> {
        Ok(Permutation {
            row_slot: self.row_slot.view(U32, [slots])?,
            slot_row: self.slot_row.view(U32, [slots])?,
            offsets: self.offsets.view(U32, [experts + 1])?,
        })
    }
}

impl SharedExpert {
    /// What the shared expert makes of every token.
    fn run<'s>(
        &self,
        cuda: &Cuda,
        stream: &CudaStream,
        x: In<'_>,
        scratch: &'s mut SharedScratch<'_>,
        invariant: bool,
    ) -> Result<Shared<'s, Cuda>> {
        let (tokens, hidden, width) = (x.rows(), x.cols(), self.config.intermediate);
        let [gate_up, down] = self.matrices.formats();
        let (between, outputs) = formats(x.dtype(), gate_up, down);
        // two numbers that nobody reads: all rows are the one expert's
        let slots = scratch.slots.view(U32, [tokens])?;
        let offsets = scratch.ends.view(U32, [2])?;
        gate_up_of(
            cuda,
            stream,
            &GateUp {
                x,
                rows: RowSource::Rows,
                permutation: Permutation { row_slot: slots, slot_row: slots, offsets },
                input_weights: None,
                matrices: Matrices::Packed(&self.matrices),
                bias: None,
                activation: self.config.activation,
                output: GateUpOutput::Activated,
                out: scratch.a.view_mut(between, [tokens, width])?,
            },
            Groups::One,
            invariant,
        )?;
        down_of(
            cuda,
            stream,
            &Down {
                a: scratch.a.view(between, [tokens, width])?,
                offsets,
                matrices: Matrices::Packed(&self.matrices),
                bias: None,
                out: scratch.y.view_mut(outputs, [tokens, hidden])?,
            },
            Groups::One,
            invariant,
        )?;
        if let Some(gate) = &self.gate {
            for piece in pieces(tokens, invariant) {
                let out = scratch.logit.view_mut(F32, [tokens, 1])?.row_range(piece.start, piece.len())?;
                let x = x.row_range(piece.start, piece.len())?;
                let weight = View::new(gate.read(), F32, 0, [1, hidden])?;
                cuda.linear(stream, Linear { x, weight, bias: None, out })?;
            }
        }
        let logit = self.gate.as_ref().map(|_| scratch.logit.view(F32, [tokens, 1])).transpose()?;
        Ok(Shared { y: scratch.y.view(outputs, [tokens, hidden])?, factor: None, logit, scale: self.config.scale })
    }
}

/// The same for a shorter while.
#[allow(clippy::needless_match, reason = "the type is invariant in its lifetime")]
fn for_a_while<'short, 'long: 'short>(residual: Residual<'long, Cuda>) -> Residual<'short, Cuda> {
    match residual {
        Residual::Of(view) => Residual::Of(view),
        Residual::InPlace => Residual::InPlace,
    }
}

/// The same for a shorter while.
fn norm_for_a_while<'short, 'long: 'short>(norm: NextNorm<'long, Cuda>) -> NextNorm<'short, Cuda> {
    let NextNorm { weight, eps, out } = norm;
    NextNorm { weight, eps, out }
}

/// The formats between gate_up and down, and of the experts' outputs: that of x where tensor cores take it (f16 has too
/// small a range for the outputs), else f32.
fn formats(x: DType, gate_up: DType, down: DType) -> (DType, DType) {
    let one = x == gate_up && x == down;
    let between = if one { x } else { F32 };
    (between, if between == F16 { F32 } else { between })
}

/// The tokens, all at once or a few at a time.
fn pieces(tokens: usize, few: bool) -> impl Iterator<Item = Range<usize>> {
    let step = if few { INVARIANT_TOKENS } else { tokens.max(1) };
    (0..tokens).step_by(step).map(move |first| first..tokens.min(first + step))
}

fn upload(cuda: &Cuda, bytes: &[u8]) -> Result<Memory> {
    let mut memory = cuda.allocate(bytes.len())?;
    cuda.upload(bytes, &mut memory)?;
    Ok(memory)
}

/// A vector of any float format, in f32.
fn vector_of(cuda: &Cuda, view: Option<HostView<'_>>) -> Result<Option<Memory>> {
    view.map(|view| upload(cuda, bytemuck::cast_slice(&floats(view)?))).transpose()
}

fn vector(memory: &Option<Memory>, length: usize) -> Result<Option<In<'_>>> {
    Ok(memory.as_ref().map(|memory| View::new(memory.read(), F32, 0, [length])).transpose()?)
}
