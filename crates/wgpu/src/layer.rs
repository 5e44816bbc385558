use crate::down::down_of;
use crate::down_combine::down_combine;
use crate::error::Result;
use crate::forward::{part, token_bytes};
use crate::gate_up::gate_up_of;
use crate::grouped::{Groups, Schedule, Stage};
use crate::launch::Operand;
use crate::memory::{Memory, Mut, Ref};
use crate::norm::{ExpertNorm, norm};
use crate::pack::Experts;
use crate::plan::grouped::{TILE, column_tiles};
use crate::rehearse::Idle;
use crate::routes::Choosing;
use crate::shared::SharedExpert;
use crate::workspace::{ScheduleScratch, Scratch, Workspace, has_sums};
use crate::{Wgpu, WgpuStream, combine, copy, permute, plan};
use fused_moe_core::DType::{F32, U32};
use fused_moe_core::backend::{shorten_norm, shorten_residual};
use fused_moe_core::config::{GateNorm, LayerConfig, WeightOn};
use fused_moe_core::operation::*;
use fused_moe_core::problem::LayerProblem;
use fused_moe_core::surroundings::{On, Reads, Surroundings};
use fused_moe_core::weights::{LayerWeights, floats};
use fused_moe_core::{Backend, DType, HostView, Layer, Numerics, Options, Permutation, Routing, View};

pub(crate) type In<'a> = View<Ref<'a>>;
pub(crate) type Out<'a> = View<Mut<'a>>;

/// The format of what lies between the stages.
pub(crate) const BETWEEN: DType = F32;

/// A layer prepared for this backend: its weights, copied once in the format that they came in.
///
/// A call records on its stream and does nothing else. What lies between the stages is f32. More tokens than a binding or
/// the workspace's buffer has room for go through the layer in pieces, unless it has a capacity, which refuses them. What a
/// call with x in the weights' format needs is compiled when a workspace is made, anything else when it is first called for.
#[derive(Debug)]
pub struct WgpuLayer {
    pub(crate) wgpu: Wgpu,
    pub(crate) problem: LayerProblem,
    numerics: Numerics,
    pub(crate) router: Option<Router>,
    pub(crate) router_norm: Option<Memory>,
    pub(crate) correction_bias: Option<Memory>,
    pub(crate) expert_scale: Option<Memory>,
    pub(crate) table: Option<(Memory, usize)>,
    experts: Experts,
    expert_out: Option<ExpertNorm>,
    /// Where nothing else stands around the experts.
    shared: Option<SharedExpert>,
    surroundings: Option<Surroundings<Wgpu>>,
    /// For calls that are explained and not run.
    pub(crate) idle: Idle,
}

/// `[E, H]` as it came, and f32 `[E]`; experts without weights are among the E.
#[derive(Debug)]
pub(crate) struct Router {
    pub(crate) matrix: Memory,
    pub(crate) dtype: DType,
    pub(crate) bias: Option<Memory>,
}

impl WgpuLayer {
    pub(crate) fn new(
        wgpu: &Wgpu,
        config: &LayerConfig,
        weights: &LayerWeights<'_>,
        options: &Options,
    ) -> Result<Self> {
        let problem = LayerProblem::new(config, weights, options)?;
        let router = weights.router.map(|view| Router::new(wgpu, view, weights.router_bias)).transpose()?;
        let experts: Vec<_> = weights.experts.iter().collect();
        let shared = match (problem.core.shared, &weights.shared) {
            (Some(config), Some(weights)) => Some(SharedExpert::new(wgpu, config, weights)?),
            _ => None,
        };
        let surroundings = config.has_surroundings().then(|| Surroundings::new(wgpu, config, weights));
        let table = weights.table.as_ref().map(|table| {
            Ok::<_, crate::Error>((upload(wgpu, bytemuck::cast_slice(&table.experts))?, table.vocabulary))
        });
        Ok(Self {
            wgpu: wgpu.clone(),
            numerics: options.numerics,
            router,
            router_norm: vector_of(wgpu, weights.router_norm)?,
            correction_bias: vector_of(wgpu, weights.correction_bias)?,
            expert_scale: vector_of(wgpu, weights.expert_scale)?,
            table: table.transpose()?,
            experts: Experts::local(wgpu, &experts, problem.local.clone())?,
            expert_out: ExpertNorm::of(wgpu, config.norms.expert_out, weights.norms.expert_out)?,
            shared,
            surroundings: surroundings.transpose()?,
            idle: Idle::new(wgpu)?,
            problem,
        })
    }

    pub(crate) fn invariant(&self) -> bool {
        self.numerics == Numerics::BatchInvariant
    }
}

impl Router {
    fn new(wgpu: &Wgpu, view: HostView<'_>, bias: Option<HostView<'_>>) -> Result<Self> {
        let row_bytes = view.cols() * view.dtype().size();
        let mut bytes = Vec::with_capacity(view.rows() * row_bytes);
        for row in 0..view.rows() {
            let row = view.row_range(row, 1)?;
            bytes.extend_from_slice(&row.storage()[row.offset()..row.offset() + row_bytes]);
        }
        Ok(Self { matrix: upload(wgpu, &bytes)?, dtype: view.dtype(), bias: vector_of(wgpu, bias)? })
    }
}

impl Layer<Wgpu> for WgpuLayer {
    fn config(&self) -> &LayerConfig {
        &self.problem.config
    }

    fn weight_bytes(&self) -> usize {
        let bytes = |memory: &Option<Memory>| memory.as_ref().map_or(0, Memory::bytes);
        let router = self.router.as_ref().map_or(0, |router| router.matrix.bytes() + bytes(&router.bias));
        let vectors = [&self.router_norm, &self.correction_bias, &self.expert_scale].map(bytes);
        let table = self.table.as_ref().map_or(0, |(table, _)| table.bytes());
        let shared = self.shared.as_ref().map_or(0, SharedExpert::bytes);
        let around = self.surroundings.as_ref().map_or(0, Surroundings::weight_bytes);
        let norm = self.expert_out.as_ref().map_or(0, ExpertNorm::bytes);
        router + vectors.iter().sum::<usize>() + table + self.experts.bytes() + norm + shared + around
    }

    fn workspace_bytes(&self, max_tokens: usize) -> Result<usize> {
        Workspace::bytes(&self.problem, max_tokens.min(self.tokens_at_once()))
    }

    fn workspace_in(&self, memory: Memory, max_tokens: usize) -> Result<Workspace> {
        let workspace = Workspace::new(self.wgpu.device(), memory, &self.problem, max_tokens)?;
        self.compile(max_tokens)?;
        Ok(workspace)
    }

    fn workspace(&self, max_tokens: usize) -> Result<Workspace> {
        self.workspace_in(Memory::new(self.wgpu.device(), self.workspace_bytes(max_tokens)?)?, max_tokens)
    }

    fn explain(&self, tokens: usize) -> String {
        self.explanation(tokens).unwrap_or_else(|error| error.to_string())
    }

    fn run(&self, stream: &WgpuStream, call: Forward<'_, Wgpu>, workspace: &mut Workspace) -> Result<()> {
        stream.whole(|| self.run_on(&self.wgpu, stream, call, workspace))
    }
}

impl WgpuLayer {
    /// The most tokens that go through at once.
    pub(crate) fn tokens_at_once(&self) -> usize {
        plan::tokens_at_once(&self.problem, self.wgpu.numbers())
    }

    pub(crate) fn run_on(
        &self,
        wgpu: &Wgpu,
        stream: &WgpuStream,
        mut call: Forward<'_, Wgpu>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let tokens = self.problem.forward(&call)?.tokens;
        // even where the pieces of this call would do with less
        workspace.carve("forward", &self.problem, tokens.min(self.tokens_at_once()))?;
        let piece = plan::piece(self.tokens_at_once(), token_bytes(&call), wgpu.numbers());
        if !matches!(call.source, Source::Routes(_)) {
            self.undivided(tokens, piece)?;
        }
        for first in (0..tokens.max(1)).step_by(piece) {
            let call = part(&mut call, first..tokens.min(first + piece))?;
            self.run_piece(wgpu, stream, call, workspace, first > 0)?;
        }
        Ok(())
    }

    /// Whether so many tokens may go through so many at a time: of a capacity, all of them share.
    ///
    /// Errors: `Unsupported`.
    pub(crate) fn undivided(&self, tokens: usize, at_once: usize) -> Result<()> {
        if tokens <= at_once || self.problem.config.capacity.is_none() {
            return Ok(());
        }
        let part = "a capacity of more tokens than a binding or a buffer has room for";
        Err(fused_moe_core::Error::Unsupported { operation: "forward", part, backend: "wgpu" }.into())
    }

    /// As many tokens as go through at once. Counts are added to those that went before.
    fn run_piece(
        &self,
        wgpu: &Wgpu,
        stream: &WgpuStream,
        call: Forward<'_, Wgpu>,
        workspace: &mut Workspace,
        add: bool,
    ) -> Result<()> {
        let (mut scratch, around) = workspace.carve("forward", &self.problem, call.x.rows())?;
        let Some(surroundings) = &self.surroundings else {
            let reads = Reads { router: call.x, experts: call.x };
            return self.stages(wgpu, stream, (call, reads), &mut scratch, add);
        };
        let backend = wgpu.for_parts(self.invariant());
        let on = On { backend: &backend, stream, between: BETWEEN, rows_at_once: usize::MAX };
        surroundings
            .run(&on, call, around.views()?, |call, reads| self.stages(wgpu, stream, (call, reads), &mut scratch, add))
    }

    /// The stages in order, from router to combine.
    fn stages(
        &self,
        wgpu: &Wgpu,
        stream: &WgpuStream,
        (call, reads): (Forward<'_, Wgpu>, Reads<'_, Wgpu>),
        scratch: &mut Scratch<'_>,
        add: bool,
    ) -> Result<()> {
        let (device, tokens, config) = (wgpu.device(), call.x.rows(), &self.problem.core);
        let (hidden, rows, invariant) = (config.hidden, tokens * config.top_k, self.invariant());
        let ours = !matches!(call.source, Source::Routes(_)) && !invariant;
        let alone = tokens == 1 && call.counts.is_none() && ours && self.problem.slots_are_rows();
        let Forward { source, token_ids, sequences, residual, norm: next_norm, routes, counts, y, .. } = call;

        let gate_norm = self.gate_norm_feeds_experts();
        let by_gate = gate_norm.is_some() && matches!(source, Source::Router);
        let (given, logits) = match source {
            Source::Routes(routing) => (Some(routing), None),
            Source::Logits(logits) => (None, Some(logits)),
            Source::Router => (None, None),
        };
        let routing = match given {
            Some(Routing { experts, weights }) => Routing { experts, weights },
            None => {
                self.choose(wgpu, stream, &Choosing { x: reads.router, logits, token_ids, sequences }, scratch)?;
                scratch.routing.views([tokens, config.top_k])?
            }
        };
        if !alone {
            let local = self.problem.local.clone();
            self.permute(wgpu, stream, routing.experts, local, &mut scratch.permutation)?;
        }
        let Permutation { row_slot, slot_row, offsets } = scratch.permutation.views(rows, config.choices())?;
        let offsets = offsets.columns(0, config.experts + 1)?;
        let arguments = scratch.schedule.arguments.buffer();
        let listed = if alone { None } else { self.list_tiles(wgpu, stream, offsets, rows, &mut scratch.schedule)? };
        let slot_experts = Operand::of(device, "forward", &routing.experts)?;
        let (first_rows, row_slots) =
            (Operand::of(device, "forward", &offsets)?, Operand::of(device, "forward", &row_slot)?);
        let tiles = listed.as_ref().map(|tiles| Operand::of(device, "forward", tiles)).transpose()?;
        let groups = |product: Stage| {
            if alone {
                return Groups::Slots { experts: slot_experts };
            }
            let schedule = tiles
                .map(|tiles| Schedule { tiles, groups: (arguments, if product == Stage::GateUp { 0 } else { 12 }) });
            Groups::Offsets { offsets: first_rows, row_slot: Some(row_slots), schedule }
        };
        let x = match gate_norm {
            Some(GateNorm { eps, .. }) => {
                let shape = [tokens, hidden];
                if !by_gate {
                    let out = scratch.tokens.view_mut(BETWEEN, shape)?;
                    let next = NextNorm { weight: vector(&self.router_norm, hidden)?, eps, out };
                    let (rows, spare) = (Residual::Of(reads.experts), scratch.y.view_mut(BETWEEN, shape)?);
                    norm(wgpu, stream, reads.experts, (rows, next), spare)?;
                }
                scratch.tokens.view(BETWEEN, shape)?
            }
            None => reads.experts,
        };
        let on_input = config.weight_on == WeightOn::Input;
        gate_up_of(
            wgpu,
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
                out: scratch.a.view_mut(BETWEEN, [rows, config.intermediate])?,
            },
            groups(Stage::GateUp),
            invariant,
        )?;
        let shared = match &self.shared {
            Some(shared) => Some(shared.run(wgpu, stream, x, &mut scratch.shared, invariant)?),
            None => None,
        };
        let a = scratch.a.view(BETWEEN, [rows, config.intermediate])?;
        let mut summed = Combine {
            rows: SlotRows::Slots(a),
            weights: (!on_input).then_some(routing.weights),
            copies: self.copies(x, routing.experts),
            routed_scale: config.routed_scale,
            shared,
            residual: residual.map(shorten_residual),
            norm: next_norm.map(shorten_norm),
            out: y,
        };
        let table = self.experts.down(wgpu)?;
        let plain = alone && self.expert_out.is_none();
        if !plain || !down_combine(wgpu, stream, &summed, &routing.experts, &table)? {
            let out = scratch.y.view_mut(BETWEEN, [rows, hidden])?;
            let matrices = Matrices::Packed(&self.experts);
            down_of(wgpu, stream, &Down { a, offsets, matrices, bias: None, out }, groups(Stage::Down), invariant)?;
            let y = match &self.expert_out {
                Some(norm) => norm.run(wgpu, stream, x, [&mut scratch.y, &mut scratch.normed], rows)?,
                None => scratch.y.view(BETWEEN, [rows, hidden])?,
            };
            summed.rows = if alone { SlotRows::Slots(y) } else { SlotRows::Permuted { y, slot_row } };
            let sums = has_sums(&self.problem).then(|| scratch.sums.view(BETWEEN, [tokens, hidden])).transpose()?;
            combine::combine(wgpu, stream, summed, sums.as_ref())?;
        }
        if let Some(RoutesOut { experts, weights }) = routes {
            copy::copy(wgpu, stream, routing.experts, experts)?;
            copy::copy(wgpu, stream, routing.weights, weights)?;
        }
        match counts {
            Some(counts) => copy::counts(wgpu, stream, offsets, counts, add),
            None => Ok(()),
        }
    }

    /// The slots of experts that copy the token, if these are here.
    fn copies<'s>(&self, x: In<'s>, experts: In<'s>) -> Option<Copies<'s, Wgpu>> {
        let config = &self.problem.config;
        let copies = Copies { x, experts, first: config.experts, end: config.choices() };
        self.problem.has_copies().then_some(copies)
    }

    /// The tiles of the experts' rows `[M, 3]`, where there are so many that a list is worth it; writes the sizes of the
    /// products' launches too.
    fn list_tiles<'s>(
        &self,
        wgpu: &Wgpu,
        stream: &WgpuStream,
        offsets: In<'_>,
        rows: usize,
        scratch: &'s mut ScheduleScratch<'_>,
    ) -> Result<Option<In<'s>>> {
        let columns = self.experts.pairs().map(column_tiles);
        let Some(tiles) = plan::schedule(&self.problem, rows, self.invariant(), columns) else { return Ok(None) };
        let shape = [tiles, 3];
        let operands = TileSchedule {
            offsets,
            tile_rows: TILE,
            tiles: scratch.tiles.view_mut(U32, shape)?,
            count: scratch.count.view_mut(U32, [1])?,
        };
        let arguments = scratch.arguments.view_mut(U32, [2, 3])?;
        permute::tiles(wgpu, stream, operands, Some((arguments, columns.map(|columns| columns as u32))))?;
        Ok(Some(scratch.tiles.view(U32, shape)?))
    }

    /// The gate's norm, where the experts read what it makes of x.
    pub(crate) fn gate_norm_feeds_experts(&self) -> Option<GateNorm> {
        self.problem.config.gate.norm.filter(|norm| norm.feeds_experts)
    }
}

pub(crate) fn upload(wgpu: &Wgpu, bytes: &[u8]) -> Result<Memory> {
    let mut memory = wgpu.allocate(bytes.len())?;
    wgpu.upload(bytes, &mut memory)?;
    Ok(memory)
}

/// A vector of any float format, in f32.
pub(crate) fn vector_of(wgpu: &Wgpu, view: Option<HostView<'_>>) -> Result<Option<Memory>> {
    view.map(|view| upload(wgpu, bytemuck::cast_slice(&floats(view)?))).transpose()
}

pub(crate) fn vector(memory: &Option<Memory>, length: usize) -> Result<Option<In<'_>>> {
    Ok(memory.as_ref().map(|memory| View::new(memory.read(), F32, 0, [length])).transpose()?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
