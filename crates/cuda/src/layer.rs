mod routing;
mod shared;

use crate::combine::combine_of;
use crate::copy;
use crate::down::{Manner, down_of};
use crate::down_combine::{DownCombine, down_combine};
use crate::error::Result;
use crate::few::{down_combine_few, gate_up_few};
use crate::gate_up::gate_up_of;
use crate::grouped::Groups;
use crate::launch::Tensor;
use crate::memory::{Memory, Mut, Ref};
use crate::pack::Experts;
use crate::plan::few::{self, FewPlan};
use crate::plan::ring::{self, RingPlan};
use crate::ring::{GateUpRing, Routes, down_combine_ring, gate_up_ring};
use crate::workspace::{Buffer, Scratch, SharedScratch, Workspace};
use crate::{Cuda, CudaStream};
use fused_moe_core::DType::{F16, F32};
use fused_moe_core::backend::{shorten_norm, shorten_residual};
use fused_moe_core::config::{LayerConfig, RmsNorm, WeightOn};
use fused_moe_core::operation::*;
use fused_moe_core::problem::LayerProblem;
use fused_moe_core::surroundings::{On, Reads, Surroundings};
use fused_moe_core::weights::{LayerWeights, floats};
use fused_moe_core::{Backend, DType, HostView, Layer, Numerics, Options, Permutation, Routing, View};
use routing::{Outcome, RoutesFrom, Wanted};
use shared::SharedExpert;
use std::ops::Range;

type In<'a> = View<Ref<'a>>;
type Out<'a> = View<Mut<'a>>;

/// Tokens that the router and the shared gate take at a time where a token's bits must not depend on the batch: so few
/// that the kernels chosen for any number of them add in one order.
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
    expert_out: Option<OutputNorm>,
    shared: Option<SharedExpert>,
    surroundings: Option<Surroundings<Cuda>>,
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

/// The norm of the experts' outputs: f32 `[H]`, to which one is added already where the factor is `1 + weight`.
#[derive(Debug)]
struct OutputNorm {
    weight: Option<Memory>,
    config: RmsNorm,
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
        let shared = match (problem.core.shared, &weights.shared) {
            (Some(config), Some(weights)) => Some(SharedExpert::new(cuda, config, weights)?),
            _ => None,
        };
        let surroundings = config.has_surroundings().then(|| Surroundings::new(cuda, config, weights)).transpose()?;
        let expert_out = config.norms.expert_out.map(|norm| OutputNorm::new(cuda, norm, weights.norms.expert_out));
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
            expert_out: expert_out.transpose()?,
            shared,
            surroundings,
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

impl OutputNorm {
    fn new(cuda: &Cuda, norm: RmsNorm, weight: Option<HostView<'_>>) -> Result<Self> {
        let offset = if norm.unit_offset { 1.0 } else { 0.0 };
        let weight = weight.map(|view| {
            let factors: Vec<f32> = floats(view)?.into_iter().map(|weight| weight + offset).collect();
            upload(cuda, bytemuck::cast_slice(&factors))
        });
        Ok(Self { weight: weight.transpose()?, config: norm })
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
        let expert_out = self.expert_out.as_ref().map_or(0, |norm| bytes(&norm.weight));
        let shared = self.shared.as_ref().map_or(0, SharedExpert::bytes);
        let around = self.surroundings.as_ref().map_or(0, Surroundings::weight_bytes);
        router + vectors.iter().sum::<usize>() + table + self.experts.bytes() + expert_out + shared + around
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
    /// The stages, and what stands around them.
    pub(crate) fn run_on(
        &self,
        cuda: &Cuda,
        stream: &CudaStream,
        call: Forward<'_, Cuda>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let tokens = self.problem.forward(&call)?.tokens;
        let (scratch, around) = workspace.carve("forward", &self.problem, tokens)?;
        let Some(surroundings) = &self.surroundings else {
            let reads = Reads { router: call.x, experts: call.x };
            return self.stages(cuda, stream, call, reads, scratch);
        };
        let (_, between) = formats(call.x.dtype(), self.problem.gate_up, self.problem.down);
        let rows_at_once = if self.invariant() { INVARIANT_TOKENS } else { tokens };
        let on = On { backend: cuda, stream, between, rows_at_once };
        surroundings.run(&on, call, around, |call, reads| self.stages(cuda, stream, call, reads, scratch))
    }

    /// The stages in order.
    fn stages(
        &self,
        cuda: &Cuda,
        stream: &CudaStream,
        call: Forward<'_, Cuda>,
        reads: Reads<'_, Cuda>,
        mut scratch: Scratch<'_>,
    ) -> Result<()> {
        let LayerProblem { core: config, local, gate_up, down, .. } = &self.problem;
        let (tokens, choices) = (call.x.rows(), config.choices());
        let (hidden, rows, invariant) = (config.hidden, tokens * config.top_k, self.invariant());
        let ours = !matches!(call.source, Source::Routes(_)) && !invariant;
        let alone = tokens == 1 && call.counts.is_none() && ours && self.problem.slots_are_rows();
        let Forward { source, token_ids, sequences, residual, norm, routes, counts, y, .. } = call;

        let ring = if alone { self.rings(cuda, reads.experts)? } else { None };
        let whole = norm.is_none() && counts.is_none() && self.expert_out.is_none();
        let from_logits = !matches!(source, Source::Router);
        let few = match ours && whole && self.problem.slots_are_rows() {
            true => self.few(cuda, reads.experts)?,
            false => None,
        };
        let wanted = if ring.is_some() || few.is_some() {
            Wanted::Logits
        } else if !alone && ours && self.problem.slots_are_rows() {
            Wanted::Groups
        } else {
            Wanted::Routes
        };
        let from = |logits| RoutesFrom { logits, x: reads.router, token_ids, sequences, wanted };
        let (routing, outcome) = match source {
            Source::Routes(Routing { experts, weights }) => (Routing { experts, weights }, Outcome::default()),
            Source::Logits(logits) => {
                self.routing(cuda, stream, from(Some(logits)), &mut scratch.routing, &mut scratch.permutation)?
            }
            Source::Router => self.routing(cuda, stream, from(None), &mut scratch.routing, &mut scratch.permutation)?,
        };
        if !(alone || few.is_some() || outcome.grouped) {
            self.permute(cuda, stream, routing.experts, local.clone(), &mut scratch.permutation)?;
        }
        let Permutation { row_slot, slot_row, offsets } = scratch.permutation.views(rows, choices)?;
        // experts without weights have no rows
        let offsets = offsets.columns(0, config.experts + 1)?;
        let counters = Tensor::of(&offsets)?.data + 4 * (choices as u64 + 1);
        let groups = |product: u64| -> Result<Groups> {
            if alone {
                return Ok(Groups::Slots { experts: Tensor::of(&routing.experts)? });
            }
            let counter = counters + 4 * product;
            Ok(Groups::Offsets { offsets: Tensor::of(&offsets)?, row_slot: Tensor::of(&row_slot)?, counter })
        };
        let x = self.expert_input(cuda, stream, reads.experts, &mut scratch.tokens, &mut scratch.y)?;
        let (between, outputs) = formats(x.dtype(), *gate_up, *down);
        let on_input = config.weight_on == WeightOn::Input;
        let there = || Routes::there(&routing);
        let ring =
            ring.map(|plans| Ok::<_, crate::Error>((plans, outcome.left.map_or_else(there, Ok)?))).transpose()?;
        let there = || Routes::there(&routing).map(|routes| routes.of(tokens, choices));
        let few = few.map(|plans| Ok::<_, crate::Error>((plans, outcome.left.map_or_else(there, Ok)?))).transpose()?;
        let (matrices, activation) = (&self.experts, config.activation);
        let combined = alone && norm.is_none() && self.expert_out.is_none();
        let out = scratch.a.view_mut(between, [rows, config.intermediate])?;
        if let Some(([plan, _], routes)) = &ring {
            let operands = GateUpRing { x, routes, matrices, activation, on_input, out };
            gate_up_ring(cuda, stream, &operands, !combined, *plan)?;
        } else if let Some(([plan, _], routes)) = &few {
            let operands = GateUpRing { x, routes, matrices, activation, on_input, out };
            gate_up_few(cuda, stream, &operands, from_logits, *plan)?;
        } else {
            let gate_up = GateUp {
                x,
                rows: RowSource::Tokens { top_k: config.top_k },
                permutation: Permutation { row_slot, slot_row, offsets },
                input_weights: on_input.then_some(routing.weights),
                matrices: Matrices::Packed(matrices),
                bias: None,
                activation,
                output: GateUpOutput::Activated,
                out,
            };
            gate_up_of(cuda, stream, &gate_up, groups(0)?, invariant)?;
        }
        let weights = (!on_input).then_some(routing.weights);
        let residual = residual.map(shorten_residual);
        if few.is_some() || combined {
            let shared = self.shared_output(cuda, stream, x, &mut scratch.shared)?;
            let a = scratch.a.view(between, [rows, config.intermediate])?;
            let (experts, routed_scale) = (routing.experts, config.routed_scale);
            let operands = DownCombine { a, experts, weights, matrices, routed_scale, shared, residual, out: y };
            match (&ring, &few) {
                (Some(([_, plan], routes)), _) => down_combine_ring(cuda, stream, &operands, routes, *plan)?,
                (None, Some(([_, plan], routes))) => down_combine_few(cuda, stream, &operands, routes, *plan)?,
                (None, None) => down_combine(cuda, stream, &operands)?,
            }
        } else {
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
                groups(1)?,
                Manner { invariant, early: true },
            )?;
            let nothing = x.row_range(0, 0)?;
            let y_rows =
                self.expert_output(cuda, stream, nothing, (outputs, rows), [&mut scratch.y, &mut scratch.normed])?;
            let shared = self.shared_output(cuda, stream, x, &mut scratch.shared)?;
            let copies = self.problem.has_copies().then_some(Copies {
                x,
                experts: routing.experts,
                first: config.experts,
                end: choices,
            });
            combine_of(
                cuda,
                stream,
                Combine {
                    rows: if alone { SlotRows::Slots(y_rows) } else { SlotRows::Permuted { y: y_rows, slot_row } },
                    weights,
                    copies,
                    routed_scale: config.routed_scale,
                    shared,
                    residual,
                    norm: norm.map(shorten_norm),
                    out: y,
                },
                true,
            )?;
        }
        if let Some(RoutesOut { experts, weights }) = routes {
            copy::copy(cuda, stream, routing.experts, experts)?;
            copy::copy(cuda, stream, routing.weights, weights)?;
        }
        match counts {
            Some(counts) => copy::counts(cuda, stream, offsets, counts),
            None => Ok(()),
        }
    }

    /// How one token that reads `x`, its slots its rows, goes through its experts' rings, if it can.
    fn rings(&self, cuda: &Cuda, x: In<'_>) -> Result<Option<[RingPlan; 2]>> {
        let LayerProblem { core: config, gate_up, down, .. } = &self.problem;
        let &LayerConfig { top_k: slots, hidden, intermediate, .. } = config;
        let one = x.dtype() == *gate_up && x.dtype() == *down && x.dtype().size() == 2;
        let pieces = Tensor::of(&x)?.aligned(8) && hidden.is_multiple_of(8) && intermediate.is_multiple_of(8);
        let halves = if config.activation.is_gated() { 2 } else { 1 };
        let sizes = ring::Sizes { slots, hidden, intermediate, halves };
        Ok(if one && pieces { ring::ring(&sizes, cuda.numbers()) } else { None })
    }

    /// How a few tokens that read `x` go through experts that are all here, if they can.
    fn few(&self, cuda: &Cuda, x: In<'_>) -> Result<Option<[FewPlan; 2]>> {
        let LayerProblem { core: config, gate_up, down, .. } = &self.problem;
        let &LayerConfig { top_k, hidden, intermediate, .. } = config;
        let one = x.dtype() == *gate_up && x.dtype() == *down && x.dtype().size() == 2;
        let pieces =
            Tensor::of(&x)?.aligned(8) && hidden.is_multiple_of(8) && intermediate.is_multiple_of(few::COLUMNS);
        let experts = config.choices();
        let sizes = few::Sizes { tokens: x.rows(), top_k, experts, hidden, intermediate };
        Ok(if one && pieces { few::few(&sizes, cuda.numbers()) } else { None })
    }

    /// What the shared expert makes of every token, if there is one.
    fn shared_output<'s>(
        &self,
        cuda: &Cuda,
        stream: &CudaStream,
        x: In<'_>,
        scratch: &'s mut SharedScratch<'_>,
    ) -> Result<Option<Shared<'s, Cuda>>> {
        self.shared.as_ref().map(|shared| shared.run(cuda, stream, x, scratch, self.invariant())).transpose()
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
        let config = &self.problem.core;
        let Some(norm) = config.gate.norm.filter(|norm| norm.feeds_experts) else { return Ok(x) };
        let (shape, dtype) = ([x.rows(), x.cols()], x.dtype());
        let normed = NextNorm {
            weight: vector(&self.router_norm, config.hidden)?,
            eps: norm.eps,
            out: tokens.view_mut(dtype, shape)?,
        };
        let nothing = x.row_range(0, 0)?;
        cuda.combine(
            stream,
            Combine::residual_alone(nothing, Residual::Of(x), Some(normed), spare.view_mut(dtype, shape)?),
        )?;
        tokens.view(dtype, shape)
    }

    /// The experts' outputs y `[R, H]`, or the norm of each. `nothing` is `[0, H]`.
    fn expert_output<'s>(
        &self,
        cuda: &Cuda,
        stream: &CudaStream,
        nothing: In<'_>,
        (dtype, rows): (DType, usize),
        [y, normed]: [&'s mut Buffer<'_>; 2],
    ) -> Result<In<'s>> {
        let hidden = self.problem.core.hidden;
        let Some(norm) = &self.expert_out else { return y.view(dtype, [rows, hidden]) };
        let (shape, eps, weight) = ([rows, hidden], norm.config.eps, vector(&norm.weight, hidden)?);
        let (Some(weight), true) = (weight, norm.config.scaled_first) else {
            let next = NextNorm { weight, eps, out: normed.view_mut(dtype, shape)? };
            cuda.combine(
                stream,
                Combine::residual_alone(nothing, Residual::InPlace, Some(next), y.view_mut(dtype, shape)?),
            )?;
            return normed.view(dtype, shape);
        };
        cuda.zero(stream, Zero { out: normed.view_mut(dtype, shape)? })?;
        let (acc, weight) = (normed.view_mut(dtype, shape)?, Factor::PerColumn(weight));
        cuda.accumulate(stream, Accumulate { acc, weight, y: y.view(dtype, shape)? })?;
        let next = NextNorm { weight: None, eps, out: y.view_mut(dtype, shape)? };
        cuda.combine(
            stream,
            Combine::residual_alone(nothing, Residual::InPlace, Some(next), normed.view_mut(dtype, shape)?),
        )?;
        y.view(dtype, shape)
    }
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
