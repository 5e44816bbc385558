use crate::down::down_of;
use crate::down_combine::down_combine;
use crate::error::Result;
use crate::forward::{part, token_bytes};
use crate::gate;
use crate::gate_up::gate_up_of;
use crate::grouped::{Groups, Schedule, Stage};
use crate::launch::Operand;
use crate::memory::{Memory, Mut, Ref};
use crate::pack::{Experts, floats};
use crate::plan::grouped::column_tiles;
use crate::rehearse::Idle;
use crate::shared::SharedExpert;
use crate::workspace::{Buffer, PermutationScratch, RoutingScratch, ScheduleScratch, Workspace};
use crate::{Wgpu, WgpuStream, copy, permute, plan};
use fused_moe_core::DType::{F32, U32};
use fused_moe_core::backend::{shorten, shorten_mut};
use fused_moe_core::config::{GateNorm, LayerConfig, Selection, WeightOn};
use fused_moe_core::operation::*;
use fused_moe_core::problem::LayerProblem;
use fused_moe_core::weights::LayerWeights;
use fused_moe_core::{Backend, DType, HostView, Layer, Numerics, Options, Permutation, Routing, View};

pub(crate) type In<'a> = View<Ref<'a>>;
type Out<'a> = View<Mut<'a>>;

/// The format of what lies between the stages.
pub(crate) const BETWEEN: DType = F32;

/// A layer prepared for this backend: its weights, copied once in the format that they came in.
///
/// A call records on its stream and does nothing else. What lies between the stages is f32. More tokens than a binding or
/// the workspace's buffer has room for go through the layer in pieces. What a call with x in the weights' format needs is
/// compiled when a workspace is made, anything else when it is first called for.
#[derive(Debug)]
pub struct WgpuLayer {
    pub(crate) wgpu: Wgpu,
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
    pub(crate) idle: Idle,
}

/// `[E, H]` as it came, and f32 `[E]`.
#[derive(Debug)]
pub(crate) struct Router {
    matrix: Memory,
    dtype: DType,
    bias: Option<Memory>,
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
        let shared = match (config.shared, &weights.shared) {
            (Some(config), Some(weights)) => Some(SharedExpert::new(wgpu, config, weights)?),
            _ => None,
        };
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
            shared,
            idle: Idle::new(wgpu)?,
            problem,
        })
    }

    fn invariant(&self) -> bool {
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
        router + vectors.iter().sum::<usize>() + table + self.experts.bytes() + shared
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
        self.run_on(&self.wgpu, stream, call, workspace)
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
        for first in (0..tokens.max(1)).step_by(piece) {
            let call = part(&mut call, first..tokens.min(first + piece))?;
            self.stages(wgpu, stream, call, workspace, first > 0)?;
        }
        Ok(())
    }

    /// The stages in order, of as many tokens as go through at once. Counts are added to those that went before.
    fn stages(
        &self,
        wgpu: &Wgpu,
        stream: &WgpuStream,
        call: Forward<'_, Wgpu>,
        workspace: &mut Workspace,
        add: bool,
    ) -> Result<()> {
        let (device, tokens) = (wgpu.device(), call.x.rows());
        let mut scratch = workspace.carve("forward", &self.problem, tokens)?;
        let config = &self.problem.config;
        let (hidden, rows, invariant) = (config.hidden, tokens * config.top_k, self.invariant());
        let alone = tokens == 1 && call.counts.is_none() && self.slots_are_rows(&call.source);
        let Forward { x, source, token_ids, sequences: _, router_state: _, residual, norm, routes, counts, y } = call;

        let normed = self.gate_norm_feeds_experts();
        let by_gate = normed.is_some() && matches!(source, Source::Router);
        let routing = match source {
            Source::Routes(Routing { experts, weights }) => Routing { experts, weights },
            Source::Logits(logits) => self.route(wgpu, stream, logits, token_ids, &mut scratch.routing)?,
            Source::Router => {
                let shape = [tokens, hidden];
                let normed = by_gate.then(|| scratch.tokens.view_mut(BETWEEN, shape)).transpose()?;
                self.gate_route(wgpu, stream, (x, token_ids), normed, &mut scratch.routing)?
            }
        };
        if !alone {
            self.permute(wgpu, stream, routing.experts, &mut scratch.permutation)?;
        }
        let Permutation { row_slot, slot_row, offsets } = scratch.permutation.views(rows, config.experts)?;
        let arguments = scratch.schedule.arguments.buffer();
        let listed = if alone { None } else { self.list_tiles(wgpu, stream, offsets, rows, &mut scratch.schedule)? };
        let slot_experts = Operand::of(device, "forward", &routing.experts)?;
        let (first_rows, row_slots) =
            (Operand::of(device, "forward", &offsets)?, Operand::of(device, "forward", &row_slot)?);
        let tiles = listed.as_ref().map(|(tiles, _)| Operand::of(device, "forward", tiles)).transpose()?;
        let groups = |product: Stage| {
            if alone {
                return Groups::Slots { experts: slot_experts };
            }
            let schedule = listed.as_ref().zip(tiles).map(|((_, tile_rows), tiles)| Schedule {
                tiles,
                tile_rows: *tile_rows,
                groups: (arguments, if product == Stage::GateUp { 0 } else { 12 }),
            });
            Groups::Offsets { offsets: first_rows, row_slot: Some(row_slots), schedule }
        };
        if let (Some(norm), false) = (normed, by_gate) {
            self.norm(wgpu, stream, x, norm, [&mut scratch.tokens, &mut scratch.y])?;
        }
        let x = if normed.is_some() { scratch.tokens.view(BETWEEN, [tokens, hidden])? } else { x };
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
        let mut combine = Combine {
            rows: SlotRows::Slots(a),
            weights: (!on_input).then_some(routing.weights),
            copies: None,
            routed_scale: config.routed_scale,
            shared,
            residual: residual.map(shorten_residual),
            norm: norm.map(shorten_norm),
            out: y,
        };
        let table = self.experts.down(wgpu)?;
        if !alone || !down_combine(wgpu, stream, &combine, &routing.experts, &table)? {
            let out = scratch.y.view_mut(BETWEEN, [rows, hidden])?;
            let matrices = Matrices::Packed(&self.experts);
            down_of(wgpu, stream, &Down { a, offsets, matrices, bias: None, out }, groups(Stage::Down), invariant)?;
            let y = scratch.y.view(BETWEEN, [rows, hidden])?;
            combine.rows = if alone { SlotRows::Slots(y) } else { SlotRows::Permuted { y, slot_row } };
            wgpu.combine(stream, combine)?;
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

    /// Whether every slot is sure to have an expert that is here, so that one token's need no permutation.
    fn slots_are_rows(&self, source: &Source<'_, Wgpu>) -> bool {
        let LayerProblem { config, local, .. } = &self.problem;
        let ours = !matches!(source, Source::Routes(_)) && config.routing.selection != Selection::Table;
        ours && *local == (0..config.experts) && !self.invariant()
    }

    /// The routes that the layer's rule makes of logits.
    fn route<'s>(
        &self,
        wgpu: &Wgpu,
        stream: &WgpuStream,
        logits: In<'_>,
        token_ids: Option<In<'_>>,
        scratch: &'s mut RoutingScratch<'_>,
    ) -> Result<Routing<'s, Wgpu>> {
        let (slots, RoutingScratch { experts, weights, .. }) = ([logits.rows(), self.problem.config.top_k], scratch);
        let choice = self.choice(token_ids, experts.view_mut(U32, slots)?, weights.view_mut(F32, slots)?)?;
        wgpu.route(stream, Route { logits, choice })?;
        Ok(Routing { experts: experts.view(U32, slots)?, weights: weights.view(F32, slots)? })
    }

    /// The routes that the layer's router makes of tokens, and the norm of x.
    fn gate_route<'s>(
        &self,
        wgpu: &Wgpu,
        stream: &WgpuStream,
        (x, token_ids): (In<'_>, Option<In<'_>>),
        normed: Option<Out<'_>>,
        scratch: &'s mut RoutingScratch<'_>,
    ) -> Result<Routing<'s, Wgpu>> {
        let (config, tokens) = (&self.problem.config, x.rows());
        let (slots, all) = ([tokens, config.top_k], [tokens, config.experts]);
        let RoutingScratch { logits, experts, weights } = scratch;
        if let Some(router) = &self.router {
            let gate = Gate {
                x,
                router: View::new(router.matrix.read(), router.dtype, 0, [config.experts, config.hidden])?,
                bias: vector(&router.bias, config.experts)?,
                norm_weight: vector(&self.router_norm, config.hidden)?,
                config: config.gate,
                normed,
                logits: logits.view_mut(F32, all)?,
            };
            let choice = self.choice(token_ids, experts.view_mut(U32, slots)?, weights.view_mut(F32, slots)?)?;
            gate::gate_route(wgpu, stream, GateRoute { gate, choice }, self.invariant())?;
        }
        Ok(Routing { experts: experts.view(U32, slots)?, weights: weights.view(F32, slots)? })
    }

    fn choice<'s>(&'s self, token_ids: Option<In<'s>>, experts: Out<'s>, weights: Out<'s>) -> Result<Choice<'s, Wgpu>> {
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
        wgpu: &Wgpu,
        stream: &WgpuStream,
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
        wgpu.permute(stream, operands)
    }

    /// The tiles of the experts' rows `[M, 3]` and the most rows of one, where there are so many that a list is worth it;
    /// and the sizes of the products' launches.
    fn list_tiles<'s>(
        &self,
        wgpu: &Wgpu,
        stream: &WgpuStream,
        offsets: In<'_>,
        rows: usize,
        scratch: &'s mut ScheduleScratch<'_>,
    ) -> Result<Option<(In<'s>, u32)>> {
        let columns = self.experts.pairs().map(column_tiles);
        let Some(tile_rows) = plan::schedule(&self.problem, rows, self.invariant(), columns) else { return Ok(None) };
        let shape = [plan::tiles(rows, self.problem.config.experts, tile_rows), 3];
        let operands = TileSchedule {
            offsets,
            tile_rows: tile_rows as usize,
            tiles: scratch.tiles.view_mut(U32, shape)?,
            count: scratch.count.view_mut(U32, [1])?,
        };
        let arguments = scratch.arguments.view_mut(U32, [2, 3])?;
        permute::tiles(wgpu, stream, operands, Some((arguments, columns.map(|columns| columns as u32))))?;
        Ok(Some((scratch.tiles.view(U32, shape)?, tile_rows)))
    }

    /// The gate's norm, where the experts read what it makes of x.
    fn gate_norm_feeds_experts(&self) -> Option<GateNorm> {
        self.problem.config.gate.norm.filter(|norm| norm.feeds_experts)
    }

    /// The norm of x, which is that of x plus no rows at all. `spare` is used up to `[T, H]`.
    fn norm(
        &self,
        wgpu: &Wgpu,
        stream: &WgpuStream,
        x: In<'_>,
        norm: GateNorm,
        [normed, spare]: [&mut Buffer<'_>; 2],
    ) -> Result<()> {
        let shape = [x.rows(), x.cols()];
        let weight = vector(&self.router_norm, self.problem.config.hidden)?;
        wgpu.combine(
            stream,
            Combine {
                rows: SlotRows::Slots(x.row_range(0, 0)?),
                weights: None,
                copies: None,
                routed_scale: 1.0,
                shared: None,
                residual: Some(Residual::Of(x)),
                norm: Some(NextNorm { weight, eps: norm.eps, out: normed.view_mut(BETWEEN, shape)? }),
                out: spare.view_mut(BETWEEN, shape)?,
            },
        )
    }
}

impl PermutationScratch<'_> {
    fn views(&self, slots: usize, experts: usize) -> Result<Permutation<'_, Wgpu>> {
        Ok(Permutation {
            row_slot: self.row_slot.view(U32, [slots])?,
            slot_row: self.slot_row.view(U32, [slots])?,
            offsets: self.offsets.view(U32, [experts + 1])?,
        })
    }
}

/// The same for a shorter while.
fn shorten_residual<'short, 'long: 'short>(residual: Residual<'long, Wgpu>) -> Residual<'short, Wgpu> {
    match residual {
        Residual::Of(view) => Residual::Of(shorten::<Wgpu>(view)),
        Residual::InPlace => Residual::InPlace,
    }
}

/// The same for a shorter while.
fn shorten_norm<'short, 'long: 'short>(norm: NextNorm<'long, Wgpu>) -> NextNorm<'short, Wgpu> {
    let NextNorm { weight, eps, out } = norm;
    NextNorm { weight: weight.map(shorten::<Wgpu>), eps, out: shorten_mut::<Wgpu>(out) }
}

fn upload(wgpu: &Wgpu, bytes: &[u8]) -> Result<Memory> {
    let mut memory = wgpu.allocate(bytes.len())?;
    wgpu.upload(bytes, &mut memory)?;
    Ok(memory)
}

/// A vector of any float format, in f32.
pub(crate) fn vector_of(wgpu: &Wgpu, view: Option<HostView<'_>>) -> Result<Option<Memory>> {
    view.map(|view| upload(wgpu, bytemuck::cast_slice(&floats(view)?))).transpose()
}

fn vector(memory: &Option<Memory>, length: usize) -> Result<Option<In<'_>>> {
    Ok(memory.as_ref().map(|memory| View::new(memory.read(), F32, 0, [length])).transpose()?)
}
