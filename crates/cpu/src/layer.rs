use crate::error::Result;
use crate::memory::Memory;
use crate::pack::Experts;
use crate::plan::{LayerPlan, RowsPlan};
use crate::rows::{Floats, Part, norm_factor, share_rows};
use crate::workspace::{Buffer, PermutationScratch, RoutingScratch, Scratch, SharedScratch, Workspace};
use crate::{Cpu, CpuStream};
use fused_moe_core::DType::{F32, U32};
use fused_moe_core::backend::share;
use fused_moe_core::config::{LayerConfig, SharedConfig, WeightOn};
use fused_moe_core::operation::*;
use fused_moe_core::problem::LayerProblem;
use fused_moe_core::weights::{LayerWeights, SharedWeights};
use fused_moe_core::{Backend, DType, Element, HostView, HostViewMut, Layer, Options, Permutation, Routing, View};

/// A layer prepared for this backend: its weights, copied once in the format that they came in.
///
/// Every sum is formed in one order whatever the batch, so both settings of
/// [`Numerics`](fused_moe_core::Numerics) give the same bits, on any number of threads.
#[derive(Debug)]
pub struct CpuLayer {
    cpu: Cpu,
    problem: LayerProblem,
    router: Option<Router>,
    router_norm: Option<Vec<f32>>,
    correction_bias: Option<Vec<f32>>,
    expert_scale: Option<Vec<f32>>,
    table: Option<Vec<u32>>,
    experts: Experts,
    shared: Option<SharedExpert>,
}

/// `[E, H]` as it came, and f32 `[E]`.
#[derive(Debug)]
struct Router {
    matrix: Memory,
    dtype: DType,
    bias: Option<Vec<f32>>,
}

/// The shared expert's matrices, as those of one expert, and f32 `[H]`.
#[derive(Debug)]
struct SharedExpert {
    config: SharedConfig,
    matrices: Experts,
    gate: Option<Vec<f32>>,
}

impl CpuLayer {
    pub(crate) fn new(cpu: &Cpu, config: &LayerConfig, weights: &LayerWeights<'_>, options: &Options) -> Result<Self> {
        let problem = LayerProblem::new(config, weights, options)?;
        let router = weights.router.map(|view| Router::new(cpu, view, weights.router_bias)).transpose()?;
        let vector = |view: Option<HostView<'_>>| view.map(|view| floats(cpu, view)).transpose();
        let experts: Vec<_> = weights.experts.iter().collect();
        let shared = match (config.shared, &weights.shared) {
            (Some(config), Some(weights)) => Some(SharedExpert::new(cpu, config, weights)?),
            _ => None,
        };
        Ok(Self {
            cpu: cpu.clone(),
            router,
            router_norm: vector(weights.router_norm)?,
            correction_bias: vector(weights.correction_bias)?,
            expert_scale: vector(weights.expert_scale)?,
            table: weights.table.as_ref().map(|table| table.experts.to_vec()),
            experts: Experts::local(cpu, &experts, problem.local.clone())?,
            shared,
            problem,
        })
    }
}

impl Router {
    fn new(cpu: &Cpu, view: HostView<'_>, bias: Option<HostView<'_>>) -> Result<Self> {
        let mut matrix = Memory::new(view.rows() * view.cols() * view.dtype().size())?;
        let row_bytes = view.cols() * view.dtype().size();
        for (row, to) in matrix.chunks_exact_mut(row_bytes).enumerate() {
            let row = view.row_range(row, 1)?;
            to.copy_from_slice(&row.storage()[row.offset()..row.offset() + row_bytes]);
        }
        let bias = bias.map(|bias| floats(cpu, bias)).transpose()?;
        Ok(Self { matrix, dtype: view.dtype(), bias })
    }
}

impl SharedExpert {
    fn new(cpu: &Cpu, config: SharedConfig, weights: &SharedWeights<'_>) -> Result<Self> {
        let matrices = Experts::local(cpu, &[&weights.matrices], 0..1)?;
        Ok(Self { config, matrices, gate: weights.gate.map(|gate| floats(cpu, gate)).transpose()? })
    }
}

impl Layer<Cpu> for CpuLayer {
    fn config(&self) -> &LayerConfig {
        &self.problem.config
    }

    fn weight_bytes(&self) -> usize {
        let router = self.router.as_ref().map_or(0, |router| router.matrix.len() + vector_bytes(&router.bias));
        let vectors = [&self.router_norm, &self.correction_bias, &self.expert_scale].map(vector_bytes);
        let shared = self.shared.as_ref().map_or(0, |shared| shared.matrices.bytes() + vector_bytes(&shared.gate));
        router + vectors.iter().sum::<usize>() + vector_bytes(&self.table) + self.experts.bytes() + shared
    }

    fn workspace_bytes(&self, max_tokens: usize) -> Result<usize> {
        Workspace::bytes(&self.problem, max_tokens)
    }

    fn workspace_in(&self, memory: Memory, max_tokens: usize) -> Result<Workspace> {
        Workspace::new(memory, &self.problem, max_tokens)
    }

    fn workspace(&self, max_tokens: usize) -> Result<Workspace> {
        self.workspace_in(Memory::new(self.workspace_bytes(max_tokens)?)?, max_tokens)
    }

    fn explain(&self, tokens: usize) -> String {
        LayerPlan::new(&self.problem, tokens, &self.cpu.device()).to_string()
    }

    fn run(&self, stream: &CpuStream, call: Forward<'_, Cpu>, workspace: &mut Workspace) -> Result<()> {
        let tokens = self.problem.forward(&call)?.tokens;
        check_alignment(&call)?;
        let scratch = workspace.carve("forward", &self.problem, tokens)?;
        // One hand-over to the pool for all stages.
        self.cpu.pool.install(|| self.stages(stream, tokens, call, scratch))
    }
}

impl CpuLayer {
    /// The stages in order.
    fn stages(
        &self,
        stream: &CpuStream,
        tokens: usize,
        call: Forward<'_, Cpu>,
        mut scratch: Scratch<'_>,
    ) -> Result<()> {
        let Self { cpu, problem: LayerProblem { config, .. }, .. } = self;
        let rows = tokens * config.top_k;
        let Forward { x, source, token_ids, sequences: _, router_state: _, residual, norm, routes, counts, y } = call;

        let RoutingScratch { logits, experts, weights } = &mut scratch.routing;
        let routing = match source {
            Source::Routes(Routing { experts, weights }) => Routing { experts, weights },
            Source::Logits(logits) => self.route(stream, logits, token_ids, (experts, weights))?,
            Source::Router => {
                self.gate(stream, x, logits)?;
                let logits = logits.view(F32, [tokens, config.experts])?;
                self.route(stream, logits, token_ids, (experts, weights))?
            }
        };
        let Permutation { row_slot, slot_row, offsets } =
            self.permute(stream, routing.experts, &mut scratch.permutation)?;
        let x = self.expert_input(x, &mut scratch.tokens)?;
        let on_input = config.weight_on == WeightOn::Input;
        cpu.gate_up(
            stream,
            GateUp {
                x,
                rows: RowSource::Tokens { top_k: config.top_k },
                permutation: Permutation { row_slot, slot_row, offsets },
                input_weights: on_input.then_some(routing.weights),
                matrices: Matrices::Packed(&self.experts),
                bias: None,
                activation: config.activation,
                output: GateUpOutput::Activated,
                out: scratch.a.view_mut(F32, [rows, config.intermediate])?,
            },
        )?;
        cpu.down(
            stream,
            Down {
                a: scratch.a.view(F32, [rows, config.intermediate])?,
                offsets,
                matrices: Matrices::Packed(&self.experts),
                bias: None,
                out: scratch.y.view_mut(F32, [rows, config.hidden])?,
            },
        )?;
        let shared = match &self.shared {
            Some(shared) => Some(shared.run(cpu, stream, x, &mut scratch.shared)?),
            None => None,
        };
        cpu.combine(
            stream,
            Combine {
                rows: SlotRows::Permuted { y: scratch.y.view(F32, [rows, config.hidden])?, slot_row },
                weights: (!on_input).then_some(routing.weights),
                copies: None,
                routed_scale: config.routed_scale,
                shared,
                residual: residual.map(|residual| match residual {
                    Residual::Of(view) => Residual::Of(view),
                    Residual::InPlace => Residual::InPlace,
                }),
                norm: norm.map(|norm| NextNorm { weight: norm.weight, eps: norm.eps, out: norm.out }),
                out: y,
            },
        )?;
        if let Some(RoutesOut { experts, weights }) = routes {
            copy_rows::<u32>(routing.experts, experts)?;
            copy_rows::<f32>(routing.weights, weights)?;
        }
        match counts {
            Some(counts) => count(offsets, counts),
            None => Ok(()),
        }
    }

    /// `logits = gate(x)`.
    fn gate(&self, stream: &CpuStream, x: HostView<'_>, logits: &mut Buffer<'_>) -> Result<()> {
        let config = &self.problem.config;
        let Some(router) = &self.router else { return Ok(()) };
        let operands = Gate {
            x,
            router: View::new(&router.matrix[..], router.dtype, 0, [config.experts, config.hidden])?,
            bias: vector(&router.bias)?,
            norm_weight: vector(&self.router_norm)?,
            config: config.gate,
            normed: None,
            logits: logits.view_mut(F32, [x.rows(), config.experts])?,
        };
        self.cpu.gate(stream, operands)
    }

    /// The routes that the layer's rule makes of logits.
    fn route<'s>(
        &self,
        stream: &CpuStream,
        logits: HostView<'_>,
        token_ids: Option<HostView<'_>>,
        (experts, weights): (&'s mut Buffer<'_>, &'s mut Buffer<'_>),
    ) -> Result<Routing<'s, Cpu>> {
        let config = &self.problem.config;
        let shape = [logits.rows(), config.top_k];
        let table = match (&self.table, token_ids) {
            (Some(table), Some(token_ids)) => {
                let experts = View::of(table, [table.len() / config.top_k, config.top_k])?;
                Some(TokenTable { token_ids, experts })
            }
            _ => None,
        };
        let choice = Choice {
            rule: config.routing,
            correction_bias: vector(&self.correction_bias)?,
            expert_scale: vector(&self.expert_scale)?,
            table,
            experts: experts.view_mut(U32, shape)?,
            weights: weights.view_mut(F32, shape)?,
            witness: None,
        };
        self.cpu.route(stream, Route { logits, choice })?;
        Ok(Routing { experts: experts.view(U32, shape)?, weights: weights.view(F32, shape)? })
    }

    /// The slots of the experts that are here, by expert.
    fn permute<'s>(
        &self,
        stream: &CpuStream,
        experts: HostView<'_>,
        scratch: &'s mut PermutationScratch<'_>,
    ) -> Result<Permutation<'s, Cpu>> {
        let (slots, ends) = ([experts.rows() * experts.cols()], [self.problem.config.experts + 1]);
        let operands = Permute {
            experts,
            experts_total: self.problem.config.experts,
            local: self.problem.local.clone(),
            row_slot: scratch.row_slot.view_mut(U32, slots)?,
            slot_row: scratch.slot_row.view_mut(U32, slots)?,
            offsets: scratch.offsets.view_mut(U32, ends)?,
        };
        self.cpu.permute(stream, operands)?;
        Ok(Permutation {
            row_slot: scratch.row_slot.view(U32, slots)?,
            slot_row: scratch.slot_row.view(U32, slots)?,
            offsets: scratch.offsets.view(U32, ends)?,
        })
    }

    /// What the experts read: x, or its norm where the gate's norm feeds them. In f32, since each row is read by many
    /// kernels and a narrower one would be widened by each of them.
    fn expert_input<'s>(&self, x: HostView<'s>, tokens: &'s mut Buffer<'_>) -> Result<HostView<'s>> {
        let norm = self.problem.config.gate.norm.filter(|norm| norm.feeds_experts);
        if x.dtype() == F32 && norm.is_none() {
            return Ok(x);
        }
        let (shape, kernels) = ([x.rows(), x.cols()], self.cpu.kernels);
        let (x, out) = (Floats::new(&x)?, Part::<f32>::new(tokens.view_mut(F32, shape)?)?);
        share_rows(&self.cpu.pool, out, shape[0], RowsPlan::elements(shape[1]), |range, mut out| {
            for (i, t) in range.enumerate() {
                match norm {
                    None => x.load(kernels, t, 0, out.row(i)),
                    Some(norm) => {
                        let factor = norm_factor(x.sum_squares(kernels, t), shape[1], norm.eps);
                        x.scale(kernels, [t, 0], factor, self.router_norm.as_deref(), out.row(i));
                    }
                }
            }
        });
        tokens.view(F32, shape)
    }
}

impl SharedExpert {
    /// What the shared expert makes of every token.
    fn run<'s>(
        &self,
        cpu: &Cpu,
        stream: &CpuStream,
        x: HostView<'_>,
        scratch: &'s mut SharedScratch<'_>,
    ) -> Result<Shared<'s, Cpu>> {
        let (tokens, hidden, width) = (x.rows(), x.cols(), self.config.intermediate);
        let offsets = [0, tokens as u32];
        let offsets = View::of(&offsets, [2])?;
        let slots = scratch.slots.view(U32, [tokens])?;
        cpu.gate_up(
            stream,
            GateUp {
                x,
                rows: RowSource::Rows,
                permutation: Permutation { row_slot: slots, slot_row: slots, offsets },
                input_weights: None,
                matrices: Matrices::Packed(&self.matrices),
                bias: None,
                activation: self.config.activation,
                output: GateUpOutput::Activated,
                out: scratch.a.view_mut(F32, [tokens, width])?,
            },
        )?;
        cpu.down(
            stream,
            Down {
                a: scratch.a.view(F32, [tokens, width])?,
                offsets,
                matrices: Matrices::Packed(&self.matrices),
                bias: None,
                out: scratch.y.view_mut(F32, [tokens, hidden])?,
            },
        )?;
        let logit = match &self.gate {
            Some(gate) => {
                let out = scratch.logit.view_mut(F32, [tokens, 1])?;
                cpu.linear(stream, Linear { x, weight: View::of(gate, [1, hidden])?, bias: None, out })?;
                Some(scratch.logit.view(F32, [tokens, 1])?)
            }
            None => None,
        };
        Ok(Shared { y: scratch.y.view(F32, [tokens, hidden])?, factor: None, logit, scale: self.config.scale })
    }
}

fn vector(vector: &Option<Vec<f32>>) -> Result<Option<HostView<'_>>> {
    Ok(vector.as_ref().map(|vector| View::of(vector, [vector.len()])).transpose()?)
}

fn vector_bytes<T>(vector: &Option<Vec<T>>) -> usize {
    vector.as_ref().map_or(0, |vector| size_of_val(&vector[..]))
}

/// A vector of any float format, at any address: tensors of a mapped file need not be aligned.
fn floats(cpu: &Cpu, view: HostView<'_>) -> Result<Vec<f32>> {
    let mut vector = vec![0.0; view.cols()];
    let mut aligned = Memory::new(view.extent())?;
    aligned.copy_in(&view.storage()[view.offset()..view.offset() + view.extent()])?;
    Floats::new(&View::new(&aligned[..], view.dtype(), 0, view.shape())?)?.load(cpu.kernels, 0, 0, &mut vector);
    Ok(vector)
}

/// What is written must lie as its format wants it, and this is found before anything is written.
fn check_alignment(call: &Forward<'_, Cpu>) -> Result<()> {
    Floats::new(&share::<Cpu>(&call.y))?;
    if let Some(norm) = &call.norm {
        Floats::new(&share::<Cpu>(&norm.out))?;
    }
    if let Some(RoutesOut { experts, weights }) = &call.routes {
        share::<Cpu>(experts).typed::<u32>()?;
        share::<Cpu>(weights).typed::<f32>()?;
    }
    if let Some(counts) = &call.counts {
        share::<Cpu>(counts).typed::<u32>()?;
    }
    Ok(())
}

fn copy_rows<T: Element>(from: HostView<'_>, to: HostViewMut<'_>) -> Result<()> {
    let (from, mut to) = (from.typed::<T>()?, to.typed_mut::<T>()?);
    for i in 0..from.rows() {
        to.row_mut(i).copy_from_slice(from.row(i));
    }
    Ok(())
}

/// Rows of each expert.
fn count(offsets: HostView<'_>, counts: HostViewMut<'_>) -> Result<()> {
    let (offsets, mut counts) = (offsets.typed::<u32>()?, counts.typed_mut::<u32>()?);
    for (count, ends) in counts.row_mut(0).iter_mut().zip(offsets.row(0).windows(2)) {
        *count = ends[1].saturating_sub(ends[0]);
    }
    Ok(())
}
