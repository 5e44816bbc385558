mod routing;
mod shared;

use crate::error::Result;
use crate::memory::Memory;
use crate::norm::rms_norm;
use crate::pack::Experts;
use crate::plan::{CHUNK, LayerPlan, RowsPlan, operand};
use crate::rows::{Floats, FloatsMut, norm_factor, share_rows};
use crate::workspace::{Buffer, Scratch, Workspace};
use crate::{Cpu, CpuStream};
use fused_moe_core::DType::F32;
use fused_moe_core::backend::share;
use fused_moe_core::config::{LayerConfig, RmsNorm, WeightOn};
use fused_moe_core::operation::*;
use fused_moe_core::problem::LayerProblem;
use fused_moe_core::surroundings::{On, Reads, Surroundings};
use fused_moe_core::weights::{LayerWeights, floats};
use fused_moe_core::{Backend, DType, Element, HostView, HostViewMut, Layer, Options, Permutation, Routing, View};
use routing::RouteInput;
use shared::SharedExpert;

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
    expert_norm: Option<ExpertNorm>,
    shared: Option<SharedExpert>,
    surroundings: Option<Surroundings<Cpu>>,
}

/// `[E, H]` as it came, and f32 `[E]`.
#[derive(Debug)]
struct Router {
    matrix: Memory,
    dtype: DType,
    bias: Option<Vec<f32>>,
}

/// The norm of what each expert makes of a token.
#[derive(Debug)]
struct ExpertNorm {
    norm: RmsNorm,
    /// The factors `[H]`, whether or not one was added to the weight.
    weight: Option<Vec<f32>>,
}

impl CpuLayer {
    pub(crate) fn new(cpu: &Cpu, config: &LayerConfig, weights: &LayerWeights<'_>, options: &Options) -> Result<Self> {
        let problem = LayerProblem::new(config, weights, options)?;
        let router = weights.router.map(|view| Router::new(view, weights.router_bias)).transpose()?;
        let vector = |view: Option<HostView<'_>>| view.map(floats).transpose();
        let experts: Vec<_> = weights.experts.iter().collect();
        let expert_norm = match problem.core.norms.expert_out {
            Some(norm) => Some(ExpertNorm::new(norm, vector(weights.norms.expert_out)?)),
            None => None,
        };
        let shared = match (problem.core.shared, &weights.shared) {
            (Some(config), Some(weights)) => Some(SharedExpert::new(cpu, config, weights)?),
            _ => None,
        };
        let surroundings = match config.has_surroundings() {
            true => Some(Surroundings::new(cpu, config, weights)?),
            false => None,
        };
        Ok(Self {
            cpu: cpu.clone(),
            router,
            router_norm: vector(weights.router_norm)?,
            correction_bias: vector(weights.correction_bias)?,
            expert_scale: vector(weights.expert_scale)?,
            table: weights.table.as_ref().map(|table| table.experts.to_vec()),
            experts: Experts::local(cpu, &experts, problem.local.clone())?,
            expert_norm,
            shared,
            surroundings,
            problem,
        })
    }
}

impl ExpertNorm {
    fn new(norm: RmsNorm, mut weight: Option<Vec<f32>>) -> Self {
        if norm.unit_offset {
            weight.iter_mut().flatten().for_each(|weight| *weight += 1.0);
        }
        Self { norm, weight }
    }
}

impl Router {
    fn new(view: HostView<'_>, bias: Option<HostView<'_>>) -> Result<Self> {
        let mut matrix = Memory::new(view.rows() * view.cols() * view.dtype().size())?;
        let row_bytes = view.cols() * view.dtype().size();
        for (row, to) in matrix.chunks_exact_mut(row_bytes).enumerate() {
            let row = view.row_range(row, 1)?;
            to.copy_from_slice(&row.storage()[row.offset()..row.offset() + row_bytes]);
        }
        let bias = bias.map(floats).transpose()?;
        Ok(Self { matrix, dtype: view.dtype(), bias })
    }
}

impl Layer<Cpu> for CpuLayer {
    fn config(&self) -> &LayerConfig {
        &self.problem.config
    }

    fn weight_bytes(&self) -> usize {
        let router = self.router.as_ref().map_or(0, |router| router.matrix.len() + vector_bytes(&router.bias));
        let vectors = [&self.router_norm, &self.correction_bias, &self.expert_scale].map(vector_bytes);
        let norm = self.expert_norm.as_ref().map_or(0, |norm| vector_bytes(&norm.weight));
        let shared = self.shared.as_ref().map_or(0, SharedExpert::weight_bytes);
        let around = self.surroundings.as_ref().map_or(0, Surroundings::weight_bytes);
        let vectors = vectors.iter().sum::<usize>() + vector_bytes(&self.table) + norm;
        router + vectors + self.experts.bytes() + shared + around
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
        let (scratch, around) = workspace.carve("forward", &self.problem, tokens)?;
        // One hand-over to the pool for all stages.
        self.cpu.pool.install(|| match &self.surroundings {
            Some(surroundings) => {
                // Sums do not depend on the batch, however large it is.
                let on = On { backend: &self.cpu, stream, between: F32, rows_at_once: usize::MAX };
                surroundings.run(&on, call, around, |call, reads| self.stages(stream, call, reads, scratch))
            }
            None => {
                let reads = Reads { router: call.x, experts: call.x };
                self.stages(stream, call, reads, scratch)
            }
        })
    }
}

impl CpuLayer {
    /// The stages in order.
    fn stages(
        &self,
        stream: &CpuStream,
        call: Forward<'_, Cpu>,
        reads: Reads<'_, Cpu>,
        mut scratch: Scratch<'_>,
    ) -> Result<()> {
        let Self { cpu, problem: LayerProblem { core: config, local, .. }, .. } = self;
        let tokens = reads.experts.rows();
        let rows = tokens * config.top_k;
        let Forward { x: _, source, token_ids, sequences, router_state: _, residual, norm, routes, counts, y } = call;

        let permutation = &mut scratch.permutation;
        let routing = match source {
            Source::Routes(Routing { experts, weights }) => Routing { experts, weights },
            Source::Logits(logits) => {
                let input = RouteInput { logits, token_ids, sequences };
                self.route(stream, input, &mut scratch.routing, permutation)?
            }
            Source::Router => {
                let logits = self.gate(stream, reads.router, &mut scratch.logits)?;
                let input = RouteInput { logits, token_ids, sequences };
                self.route(stream, input, &mut scratch.routing, permutation)?
            }
        };
        let Permutation { row_slot, slot_row, offsets } =
            self.permute(stream, routing.experts, local.clone(), permutation)?;
        // Every expert that is not here, or has no weights, has no rows.
        let offsets = offsets.columns(0, config.experts + 1)?;
        let x = self.expert_input(reads.experts, &mut scratch.tokens)?;
        let between = self.experts.between(x.dtype(), cpu.isa());
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
                out: scratch.a.view_mut(between, [rows, config.intermediate])?,
            },
        )?;
        cpu.down(
            stream,
            Down {
                a: scratch.a.view(between, [rows, config.intermediate])?,
                offsets,
                matrices: Matrices::Packed(&self.experts),
                bias: None,
                out: scratch.y.view_mut(F32, [rows, config.hidden])?,
            },
        )?;
        if let Some(ExpertNorm { norm, weight }) = &self.expert_norm {
            let here = offsets.typed::<u32>()?.row(0).last().map_or(0, |&end| end as usize);
            rms_norm(cpu, scratch.y.view_mut(F32, [rows, config.hidden])?, here, (*norm, weight.as_deref()))?;
        }
        let shared = match &self.shared {
            Some(shared) => Some(shared.run(cpu, stream, x, &mut scratch.shared)?),
            None => None,
        };
        let copies = Copies { x, experts: routing.experts, first: config.experts, end: config.choices() };
        cpu.combine(
            stream,
            Combine {
                rows: SlotRows::Permuted { y: scratch.y.view(F32, [rows, config.hidden])?, slot_row },
                weights: (!on_input).then_some(routing.weights),
                copies: self.problem.has_copies().then_some(copies),
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

    /// What the experts read: x, or its norm where the gate's norm feeds them, in the format that it is multiplied in.
    fn expert_input<'s>(&self, x: HostView<'s>, tokens: &'s mut Buffer<'_>) -> Result<HostView<'s>> {
        let Some(norm) = self.problem.core.gate.norm.filter(|norm| norm.feeds_experts) else { return Ok(x) };
        let (shape, kernels) = ([x.rows(), x.cols()], self.cpu.kernels);
        let format = operand(x.dtype(), self.problem.gate_up, self.cpu.isa());
        let (x, out) = (Floats::new(&x)?, FloatsMut::new(tokens.view_mut(format, shape)?)?);
        share_rows(&self.cpu.pool, out, shape[0], RowsPlan::elements(shape[1]), |range, mut out| {
            let mut normed = [0.0; CHUNK];
            for (i, t) in range.enumerate() {
                let factor = norm_factor(x.sum_squares(kernels, t), shape[1], norm.eps);
                for col in (0..shape[1]).step_by(CHUNK) {
                    let normed = &mut normed[..CHUNK.min(shape[1] - col)];
                    let weight = self.router_norm.as_deref().and_then(|weight| weight.get(col..col + normed.len()));
                    x.scale(kernels, [t, col], factor, weight, normed);
                    out.store(kernels, i, col, normed);
                }
            }
        });
        tokens.view(format, shape)
    }
}

fn vector(vector: &Option<Vec<f32>>) -> Result<Option<HostView<'_>>> {
    Ok(vector.as_ref().map(|vector| View::of(vector, [vector.len()])).transpose()?)
}

fn vector_bytes<T>(vector: &Option<Vec<T>>) -> usize {
    vector.as_ref().map_or(0, |vector| size_of_val(&vector[..]))
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
    if let Some(next) = &call.router_state.next {
        share::<Cpu>(next).typed::<f32>()?;
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
