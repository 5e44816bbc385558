//! The gradients of a grouped product, behind those of down, gate_up and the router.

use crate::error::{Error, Result};
use crate::gradient::{Part, Sums, Target};
use crate::grouped::{too_large, widest};
use crate::kernel::{BackwardKernel, Kernel};
use crate::launch::{Groups, Operand, Tensor, launch, params, tensor};
use crate::memory::{Mut, Ref};
use crate::plan::backward::{self as plan, MatrixWindow};
use crate::plan::{pieces, room};
use crate::{Wgpu, WgpuStream};
use fused_moe_core::View;
use fused_moe_core::operation::GradientMode;
use fused_moe_core::problem::GroupedBackwardProblem;
use std::ops::Range;

params! {
    GroupedBackwardParams {
        d: Tensor, capped: Tensor, matrix: Tensor, x: Tensor, weights: Tensor, before: Tensor, out: Tensor,
        height: u32, outputs: u32, inputs: u32, first: u32, here: u32, rows: u32, row_begin: u32, row_end: u32,
        source_begin: u32, source_rows: u32, top_k: u32, weight_columns: u32, groups: u32, row_slot: u32,
        scale: f32, limit: f32, adds: u32, keeps: u32,
    }
}

/// Rows that the product read, or the gradients of those that it wrote.
pub(crate) struct Source<'a> {
    pub(crate) view: &'a View<Ref<'a>>,
    /// The slots of the rows, and K: a row is that of its slot's token.
    pub(crate) gather: Option<(Operand<'a>, usize)>,
    /// f32, one a slot (a row without gather), in rows of so many.
    pub(crate) weights: Option<(Operand<'a>, usize)>,
    pub(crate) scale: f32,
}

impl<'a> Source<'a> {
    /// Row by row, as they are.
    pub(crate) fn rows(view: &'a View<Ref<'a>>) -> Self {
        Self { view, gather: None, weights: None, scale: 1.0 }
    }

    fn row_bytes(&self) -> usize {
        self.view.row_stride().max(1) * self.view.dtype().size()
    }
}

/// Operands of [`grouped_backward`].
pub(crate) struct GroupedBackward<'a> {
    pub(crate) operation: &'static str,
    pub(crate) problem: GroupedBackwardProblem,
    /// `[E+1]`; none: all rows are one expert's.
    pub(crate) offsets: Option<Operand<'a>>,
    /// Rows of `outputs` elements.
    pub(crate) d: Source<'a>,
    /// What a soft-cap gave, row by row, and its limit.
    pub(crate) capped: Option<(&'a View<Ref<'a>>, f32)>,
    /// Rows of `inputs` elements. Not both of d and x are gathered or multiplied by anything.
    pub(crate) x: Option<Source<'a>>,
    /// `[E, outputs, inputs]`.
    pub(crate) matrices: &'a View<Ref<'a>>,
    /// `[R, inputs]`.
    pub(crate) d_rows: Option<(&'a View<Mut<'a>>, GradientMode)>,
    /// `[E, outputs, inputs]`.
    pub(crate) d_matrices: Option<(&'a View<Mut<'a>>, GradientMode)>,
    /// `[E, outputs]`.
    pub(crate) d_bias: Option<(&'a View<Mut<'a>>, GradientMode)>,
}

/// Enqueues the gradients that are asked for: a launch for each window of the matrices, of the rows and of what is gathered.
pub(crate) fn grouped_backward(wgpu: &Wgpu, stream: &WgpuStream, operands: &GroupedBackward<'_>) -> Result<()> {
    let launcher = Launcher { wgpu, stream, operands };
    if let Some((to, mode)) = operands.d_rows {
        launcher.rows(to, mode)?;
    }
    if let (Some((to, mode)), Some(x)) = (operands.d_matrices, &operands.x) {
        launcher.matrices(x, to, mode)?;
    }
    match operands.d_bias {
        Some((to, mode)) => launcher.bias(to, mode),
        None => Ok(()),
    }
}

/// Rows of a launch, and those of what is gathered.
#[derive(Clone, Debug)]
struct Span {
    rows: Range<usize>,
    source: Range<usize>,
}

/// What launches read of rows: at the most so many bytes of each row of what is not gathered. One span at least.
fn spans(wgpu: &Wgpu, rows: usize, plain_bytes: usize, gathered: &Source<'_>) -> Vec<Span> {
    let mut spans = Vec::new();
    if gathered.gather.is_some() {
        for rows in pieces(wgpu, rows, plain_bytes) {
            let sources = pieces(wgpu, gathered.view.rows(), gathered.row_bytes());
            spans.extend(sources.map(|source| Span { rows: rows.clone(), source }));
        }
    } else {
        let both = pieces(wgpu, rows, plain_bytes.max(gathered.row_bytes()));
        spans.extend(both.map(|rows| Span { rows: rows.clone(), source: rows }));
    }
    if spans.is_empty() {
        spans.push(Span { rows: 0..0, source: 0..0 });
    }
    spans
}

/// What the launches have in common.
struct Launcher<'a> {
    wgpu: &'a Wgpu,
    stream: &'a WgpuStream,
    operands: &'a GroupedBackward<'a>,
}

impl<'a> Launcher<'a> {
    fn one(&self) -> bool {
        self.operands.offsets.is_none()
    }

    /// Bytes of a row of what was capped.
    fn capped_bytes(&self) -> usize {
        self.operands.capped.map_or(1, |(capped, _)| row_bytes(capped))
    }

    fn rows(&self, to: &'a View<Mut<'a>>, mode: GradientMode) -> Result<()> {
        let GroupedBackward { problem, d, matrices, .. } = self.operands;
        let rows = problem.rows;
        let windows = self.windows(room(self.wgpu) / row_bytes(matrices), row_bytes(matrices))?;
        for same in windows.chunk_by(|a, b| a.experts == b.experts) {
            let sums = self.sums(to, same.len())?;
            for first in (0..rows).step_by(sums.rows_at_once) {
                let written = first..rows.min(first.saturating_add(sums.rows_at_once));
                for span in spans(self.wgpu, written.len(), self.capped_bytes(), d) {
                    let rows = first + span.rows.start..first + span.rows.end;
                    let source = if d.gather.is_some() { span.source } else { rows.clone() };
                    let span = Span { rows, source };
                    for (number, window) in same.iter().enumerate() {
                        let part = Part { number, count: same.len() };
                        self.rows_of(window, &span, (to, &sums), (part, mode))?;
                    }
                }
            }
        }
        Ok(())
    }

    fn rows_of(
        &self,
        window: &MatrixWindow,
        span: &Span,
        (to, sums): (&View<Mut<'_>>, &Sums),
        part: (Part, GradientMode),
    ) -> Result<()> {
        let GroupedBackward { operation, problem, d, matrices, .. } = self.operands;
        let (device, inputs) = (self.wgpu.device(), problem.inputs);
        let out = Operand::rows(device, operation, to, span.rows.clone())?;
        let target = sums.target(out, part);
        let matrix = Operand::rows(device, operation, matrices, window.span(problem.outputs))?;
        let matrix = widest(matrix, inputs);
        let (d_operand, capped) = self.d_of(&window.rows, span.source.clone())?;
        let params = GroupedBackwardParams {
            matrix: matrix.tensor,
            ..self.params(window, span, d, (&d_operand, &capped), &target)
        };
        let (row_slot, weights) = (d.gather.map(|(slots, _)| slots), d.weights.map(|(weights, _)| weights));
        let bound = [
            Some(d_operand),
            capped,
            Some(matrix),
            self.operands.offsets,
            row_slot,
            weights,
            target.before,
            Some(target.out),
        ];
        let groups = plan::tiles_of_rows(window.experts.len(), span.rows.len(), inputs);
        self.launch(BackwardKernel::GroupedRows { one: self.one() }, &bound, (groups, &params), plan::WHY_ROWS)
    }

    fn matrices(&self, x: &Source<'a>, to: &'a View<Mut<'a>>, mode: GradientMode) -> Result<()> {
        let GroupedBackward { operation, problem, d, .. } = self.operands;
        let gathers_x = x.gather.is_some() || x.weights.is_some();
        let (plain, gathered) = if gathers_x { (d, x) } else { (x, d) };
        let spans = spans(self.wgpu, problem.rows, plain.row_bytes().max(self.capped_bytes()), gathered);
        let sums = self.sums(to, spans.len())?;
        for window in self.windows(sums.rows_at_once, row_bytes(to))? {
            for (number, span) in spans.iter().enumerate() {
                let device = self.wgpu.device();
                let part = Part { number, count: spans.len() };
                let out = Operand::rows(device, operation, to, window.span(problem.outputs))?;
                let target = sums.target(out, (part, mode));
                let (rows_of_d, rows_of_x) =
                    if gathers_x { (&span.rows, &span.source) } else { (&span.source, &span.rows) };
                let (d_operand, capped) = self.d_of(&window.rows, rows_of_d.clone())?;
                let x_operand = widest(Operand::rows(device, operation, x.view, rows_of_x.clone())?, problem.inputs);
                let params = GroupedBackwardParams {
                    x: x_operand.tensor,
                    keeps: (mode == GradientMode::Accumulate).into(),
                    ..self.params(&window, span, gathered, (&d_operand, &capped), &target)
                };
                let row_slot = gathered.gather.map(|(slots, _)| slots);
                let weights = gathered.weights.map(|(weights, _)| weights);
                let bound = [
                    Some(d_operand),
                    capped,
                    Some(x_operand),
                    self.operands.offsets,
                    row_slot,
                    weights,
                    target.before,
                    Some(target.out),
                ];
                let groups = plan::tiles_of_matrices(window.experts.len(), window.rows.len(), problem.inputs);
                let kernel = BackwardKernel::GroupedMatrices { one: self.one(), gathers_x };
                self.launch(kernel, &bound, (groups, &params), plan::WHY_MATRICES)?;
            }
        }
        Ok(())
    }

    fn bias(&self, to: &'a View<Mut<'a>>, mode: GradientMode) -> Result<()> {
        let GroupedBackward { operation, problem, d, .. } = self.operands;
        let spans = spans(self.wgpu, problem.rows, self.capped_bytes(), d);
        let sums = self.sums(to, spans.len())?;
        for first in (0..problem.experts).step_by(sums.rows_at_once) {
            let experts = first..problem.experts.min(first.saturating_add(sums.rows_at_once));
            let window = MatrixWindow { experts: experts.clone(), rows: 0..problem.outputs };
            for (number, span) in spans.iter().enumerate() {
                let part = Part { number, count: spans.len() };
                let out = Operand::rows(self.wgpu.device(), operation, to, experts.clone())?;
                let target = sums.target(out, (part, mode));
                let (d_operand, capped) = self.d_of(&window.rows, span.source.clone())?;
                let params = GroupedBackwardParams {
                    keeps: (mode == GradientMode::Accumulate).into(),
                    ..self.params(&window, span, d, (&d_operand, &capped), &target)
                };
                let (row_slot, weights) = (d.gather.map(|(slots, _)| slots), d.weights.map(|(weights, _)| weights));
                let bound = [
                    Some(d_operand),
                    capped,
                    self.operands.offsets,
                    row_slot,
                    weights,
                    target.before,
                    Some(target.out),
                ];
                let groups = plan::column_sums(experts.len(), problem.outputs);
                let kernel = BackwardKernel::GroupedBias { one: self.one() };
                self.launch(kernel, &bound, (groups, &params), plan::WHY_MATRICES)?;
            }
        }
        Ok(())
    }

    /// Of so many launches.
    fn sums(&self, to: &View<Mut<'_>>, launches: usize) -> Result<Sums> {
        Sums::new((self.wgpu, self.stream), self.operands.operation, to, launches)
    }

    /// Windows of the matrices, or of their gradients, of which so many rows fit.
    fn windows(&self, room: usize, row_bytes: usize) -> Result<Vec<MatrixWindow>> {
        let GroupedBackward { operation, problem, .. } = self.operands;
        let windows = plan::matrix_windows(problem.experts, problem.outputs, room);
        windows.ok_or_else(|| too_large(self.wgpu, operation, row_bytes))
    }

    /// Some columns of some rows of d, and of what was capped.
    fn d_of(&self, columns: &Range<usize>, rows: Range<usize>) -> Result<(Operand<'a>, Option<Operand<'a>>)> {
        let GroupedBackward { operation, d, capped, .. } = self.operands;
        let bind = |view| {
            let mut operand = Operand::rows(self.wgpu.device(), operation, view, rows.clone())?;
            operand.tensor.offset += columns.start as u32;
            Ok::<_, Error>(widest(operand, columns.len()))
        };
        let capped = match capped {
            Some((capped, _)) => Some(bind(capped)?),
            None => None,
        };
        Ok((bind(d.view)?, capped))
    }

    fn params(
        &self,
        window: &MatrixWindow,
        span: &Span,
        gathered: &Source<'_>,
        (d, capped): (&Operand<'_>, &Option<Operand<'_>>),
        target: &Target<'_>,
    ) -> GroupedBackwardParams {
        let GroupedBackwardProblem { rows, outputs, inputs, .. } = self.operands.problem;
        GroupedBackwardParams {
            d: d.tensor,
            capped: tensor(capped),
            matrix: Tensor::default(),
            x: Tensor::default(),
            weights: tensor(&gathered.weights.map(|(weights, _)| weights)),
            before: tensor(&target.before),
            out: target.out.tensor,
            height: outputs as u32,
            outputs: window.rows.len() as u32,
            inputs: inputs as u32,
            first: window.experts.start as u32,
            here: window.experts.len() as u32,
            rows: rows as u32,
            row_begin: span.rows.start as u32,
            row_end: span.rows.end as u32,
            source_begin: span.source.start as u32,
            source_rows: span.source.len() as u32,
            top_k: gathered.gather.map_or(1, |(_, top_k)| top_k) as u32,
            weight_columns: gathered.weights.map_or(1, |(_, columns)| columns.max(1)) as u32,
            groups: tensor(&self.operands.offsets).offset,
            row_slot: tensor(&gathered.gather.map(|(slots, _)| slots)).offset,
            scale: gathered.scale,
            limit: self.operands.capped.map_or(1.0, |(_, limit)| limit),
            adds: target.adds.into(),
            keeps: 0,
        }
    }

    fn launch(
        &self,
        kernel: BackwardKernel,
        bound: &[Option<Operand<'_>>],
        (groups, params): (u64, &GroupedBackwardParams),
        why: &'static str,
    ) -> Result<()> {
        if let Some(recorder) = self.wgpu.recorder() {
            recorder.explain(why);
        }
        launch(self.wgpu, self.stream, Kernel::Backward(kernel), bound, (Groups::Line(groups), params))
    }
}

fn row_bytes<S>(view: &View<S>) -> usize {
    view.row_stride().max(view.cols()).max(1) * view.dtype().size()
}
