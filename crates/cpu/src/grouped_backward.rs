//! The gradients of a grouped product, behind those of gate_up, down and the router.
//!
//! ```text
//! d_rows[r]     = d[r] . W[e]                 for each busy expert, block of columns, part of its rows
//! d_W[e]        = sum_r d[r]^T x[r]           for each expert, block of its rows, block of columns
//! d_bias[e]     = sum_r d[r]                  for each expert, part of its columns
//! ```
//!
//! The first two are one loop over blocks of sums that lie on the stack: what is multiplied is loaded there without gaps,
//! some products deep at a time, and the sums go on from pass to pass. Operands are loaded in f32, weighted; or, where both
//! are bf16 without factors and the instruction set forms products of such numbers, in pairs that follow each other in the
//! sum. Each sum is one chain of multiply-adds in ascending order.

mod block;
mod source;

pub(crate) use source::Source;

use crate::Cpu;
use crate::arch::{Kernels, OUTER_COLUMNS, Outer};
use crate::error::Result;
use crate::grouped::{Busy, Gather, Groups};
use crate::plan::backward::{
    BIAS_COLUMNS, BLOCK_COLUMNS, MATRICES_DEPTH, MATRICES_STRIDE, OUTER_ROWS, OuterPlan, ROWS_DEPTH, ROWS_STRIDE,
};
use crate::plan::streams;
use crate::table::OutRows;
use block::{Block, Pass, each_block};
use bytemuck::cast_slice_mut;
use fused_moe_core::HostView;
use fused_moe_core::operation::{Gradient, GradientMode};
use fused_moe_core::problem::GroupedBackwardProblem;
use std::ops::Range;

/// Operands of [`grouped_backward`].
pub(crate) struct GroupedBackward<'a> {
    pub(crate) problem: GroupedBackwardProblem,
    /// Which rows are whose.
    pub(crate) groups: Groups<'a>,
    /// d, rows of `outputs` elements.
    pub(crate) d: Source<'a>,
    /// x, rows of `inputs` elements.
    pub(crate) x: Option<Source<'a>>,
    /// `[E, outputs, inputs]`.
    pub(crate) matrices: HostView<'a>,
    /// `[R, inputs]`.
    pub(crate) d_rows: Option<Gradient<'a, Cpu>>,
    /// `[E, outputs, inputs]`.
    pub(crate) d_matrices: Option<Gradient<'a, Cpu>>,
    /// `[E, outputs]`.
    pub(crate) d_bias: Option<Gradient<'a, Cpu>>,
}

/// Where a gradient is stored, by several threads.
pub(crate) struct Target<'a> {
    out: OutRows<'a>,
    mode: GradientMode,
    /// Whether it is so large that it goes past the caches.
    stream: bool,
}

impl<'a> Target<'a> {
    pub(crate) fn new(gradient: Gradient<'a, Cpu>) -> Result<Self> {
        let stream = streams(gradient.view.extent());
        Ok(Self { out: OutRows::new(gradient.view)?, mode: gradient.mode, stream })
    }

    pub(crate) fn accumulates(&self) -> bool {
        self.mode == GradientMode::Accumulate
    }

    /// Whether so many columns of a panel of sums go here as they are.
    fn is_direct(&self, columns: usize) -> bool {
        columns >= OUTER_COLUMNS && !self.accumulates()
    }

    /// Carries out an [`Outer`] whose sums end at rows from `at` on.
    fn outer(&self, kernels: (Kernels, bool), at: [usize; 2], outer: Outer<'_, f32>) {
        self.out.outer(kernels, at, self.stream, outer);
    }

    /// Stores a part of a row; `values` may be changed.
    pub(crate) fn put(&self, kernels: Kernels, at: [usize; 2], values: &mut [f32]) {
        if self.accumulates() {
            self.out.add_to(kernels, at, values);
        }
        self.out.store(kernels, at, values, false);
    }
}

/// Carries out a [`GroupedBackward`].
pub(crate) fn grouped_backward(cpu: &Cpu, operands: GroupedBackward<'_>) -> Result<()> {
    let GroupedBackward { problem, groups, d, x, matrices, d_rows, d_matrices, d_bias } = operands;
    let targets = (
        d_rows.map(Target::new).transpose()?,
        d_matrices.map(Target::new).transpose()?,
        d_bias.map(Target::new).transpose()?,
    );
    let matrices = Source::new(&matrices, Gather::Rows, problem.experts.saturating_mul(problem.outputs))?;
    let product = Product { kernels: cpu.kernels, problem, groups, busy: Busy::new(groups, problem.rows), d };
    cpu.pool.install(|| {
        if let Some(to) = targets.0 {
            product.rows(cpu, matrices, &to);
        }
        if let (Some(to), Some(x)) = (targets.1, x) {
            product.matrices(cpu, x, &to);
        }
        if let Some(to) = targets.2 {
            product.bias(cpu, &to);
        }
    });
    Ok(())
}

/// What the three gradients have in common.
struct Product<'a> {
    kernels: Kernels,
    problem: GroupedBackwardProblem,
    groups: Groups<'a>,
    busy: Busy,
    d: Source<'a>,
}

/// Some rows of an expert's matrix.
struct Outputs {
    /// The first row of the matrix.
    matrix: usize,
    range: Range<usize>,
    /// Whether the block has not met these columns of x yet.
    fresh: bool,
}

/// Some columns of a matrix, at most `BLOCK_COLUMNS`.
fn columns(block: usize, inputs: usize) -> Range<usize> {
    let first = block * BLOCK_COLUMNS;
    first..inputs.min(first + BLOCK_COLUMNS)
}

impl Product<'_> {
    /// Whether d and what it meets are multiplied as pairs of bf16.
    fn pairs(&self, other: &Source<'_>) -> bool {
        self.kernels.isa().has_bf16_products() && self.d.plain_bf16() && other.plain_bf16()
    }

    fn rows(&self, cpu: &Cpu, matrices: Source<'_>, to: &Target<'_>) {
        let GroupedBackwardProblem { rows, outputs, inputs, .. } = self.problem;
        let count = self.busy.experts().len();
        let OuterPlan { blocks, chunks, grain } = OuterPlan::rows(rows, count, [outputs, inputs], cpu.threads());
        each_block(cpu, count * blocks * chunks, grain, |block, item| {
            let (item, chunk) = (item / chunks, item % chunks);
            let Some(&e) = self.busy.experts().get(item / blocks) else { return };
            let (range, columns) = (self.groups.rows(usize::from(e), rows), columns(item % blocks, inputs));
            let cut = |i: usize| range.start + range.len() * i / chunks;
            for first in (cut(chunk)..cut(chunk + 1)).step_by(OUTER_ROWS) {
                let rows = first..cut(chunk + 1).min(first + OUTER_ROWS);
                self.block_of_rows((usize::from(e), matrices), (rows, &columns), block, to);
            }
        });
    }

    /// `to[m][n] = sum_k d[rows[m]][k] * W[e][k][columns[n]]`.
    fn block_of_rows(
        &self,
        (e, matrices): (usize, Source<'_>),
        (rows, columns): (Range<usize>, &Range<usize>),
        block: &mut Block,
        to: &Target<'_>,
    ) {
        let (kernels, outputs, pairs) = (self.kernels, self.problem.outputs, self.pairs(&matrices));
        let (at, each) = ([rows.start, columns.start], if pairs { 2 } else { 1 });
        let step = each * ROWS_DEPTH;
        if outputs == 0 {
            return block.zeros(kernels, to, at, [rows.len(), columns.len()]);
        }
        for k in (0..outputs).step_by(step) {
            let end = outputs.min(k + step);
            let depth = (end - k).div_ceil(each);
            for (row, a) in rows.clone().zip(block.a.chunks_exact_mut(ROWS_STRIDE)) {
                match pairs {
                    true => self.d.pairs([row, k], &mut a[..depth]),
                    false => self.d.load(kernels, [row, k], cast_slice_mut(&mut a[..depth])),
                }
            }
            self.load_b(pairs, &matrices, e * outputs + k..e * outputs + end, columns, block);
            let mut ahead: [&[u8]; 2 * ROWS_DEPTH] = [&[]; _];
            for (n, row) in ahead.iter_mut().enumerate().take(step.min(outputs - end)) {
                *row = matrices.rows.bytes(e * outputs + end + n, columns.start, columns.len());
            }
            block.multiply(Pass {
                kernels,
                pairs,
                steps: [ROWS_STRIDE, 1],
                sizes: [rows.len(), depth, columns.len()],
                first: k == 0,
                to: (end == outputs).then_some((to, at)),
                ahead: &ahead,
            });
        }
    }

    /// b from successive rows of a source, one a line, or two that are paired.
    fn load_b(&self, pairs: bool, x: &Source<'_>, rows: Range<usize>, columns: &Range<usize>, block: &mut Block) {
        let kernels = self.kernels;
        if pairs {
            for (n, row) in rows.clone().step_by(2).enumerate() {
                block.load_b(n, columns, |column, to| x.pairs_of_rows(kernels, row..rows.end, column, to));
            }
        } else {
            for (n, row) in rows.enumerate() {
                block.load_b(n, columns, |column, to| x.load(kernels, [row, column], cast_slice_mut(to)));
            }
        }
    }

    fn matrices(&self, cpu: &Cpu, x: Source<'_>, to: &Target<'_>) {
        let GroupedBackwardProblem { rows, experts, outputs, inputs, .. } = self.problem;
        let OuterPlan { blocks, chunks, grain } = OuterPlan::matrices(rows, experts, [outputs, inputs], cpu.threads());
        let height = outputs.div_ceil(chunks).next_multiple_of(OUTER_ROWS);
        each_block(cpu, experts * chunks * blocks, grain, |block, item| {
            let (e, item) = (item / (chunks * blocks), item % (chunks * blocks));
            let (chunk, columns, rows) = (item / blocks, columns(item % blocks, inputs), self.rows_of(e));
            if rows.is_empty() && to.accumulates() {
                return;
            }
            let end = outputs.min((chunk + 1) * height);
            for (n, first) in (chunk * height..end).step_by(OUTER_ROWS).enumerate() {
                let here = Outputs { matrix: e * outputs, range: first..end.min(first + OUTER_ROWS), fresh: n == 0 };
                self.block_of_matrix(x, (here, &columns, rows.clone()), block, to);
            }
        });
    }

    /// `to[m][n] = sum_r d[r][outputs[m]] * x[r][columns[n]]`, r over the rows of one expert. What x has of these columns
    /// stays in the block from one call to the next where all rows fit.
    fn block_of_matrix(
        &self,
        x: Source<'_>,
        (outputs, columns, rows): (Outputs, &Range<usize>, Range<usize>),
        block: &mut Block,
        to: &Target<'_>,
    ) {
        let (kernels, pairs, count) = (self.kernels, self.pairs(&x), outputs.range.len());
        let (at, each) = ([outputs.matrix + outputs.range.start, columns.start], if pairs { 2 } else { 1 });
        let step = each * MATRICES_DEPTH;
        if rows.is_empty() {
            return block.zeros(kernels, to, at, [count, columns.len()]);
        }
        for start in rows.clone().step_by(step) {
            let part = start..rows.end.min(start + step);
            for (row, a) in part.clone().step_by(each).zip(block.a.chunks_exact_mut(MATRICES_STRIDE)) {
                let (a, column) = (&mut a[..count], outputs.range.start);
                match pairs {
                    true => self.d.pairs_of_rows(kernels, row..part.end, column, a),
                    false => self.d.load(kernels, [row, column], cast_slice_mut(a)),
                }
            }
            if outputs.fresh || rows.len() > step {
                self.load_b(pairs, &x, part.clone(), columns, block);
            }
            block.multiply(Pass {
                kernels,
                pairs,
                steps: [1, MATRICES_STRIDE],
                sizes: [count, part.len().div_ceil(each), columns.len()],
                first: start == rows.start,
                to: (part.end == rows.end).then_some((to, at)),
                ahead: &[],
            });
        }
    }

    fn bias(&self, cpu: &Cpu, to: &Target<'_>) {
        let GroupedBackwardProblem { experts, outputs, .. } = self.problem;
        let parts = outputs.div_ceil(BIAS_COLUMNS);
        cpu.pool.for_each(experts * parts, 1, |item| {
            let (e, first) = (item / parts, item % parts * BIAS_COLUMNS);
            let width = BIAS_COLUMNS.min(outputs - first);
            let range = self.rows_of(e);
            if range.is_empty() && to.accumulates() {
                return;
            }
            let (mut sum, mut row) = ([0.0; BIAS_COLUMNS], [0.0; BIAS_COLUMNS]);
            let (sum, row) = (&mut sum[..width], &mut row[..width]);
            for r in range {
                self.d.load(self.kernels, [r, first], row);
                self.kernels.axpy(1.0, row, sum);
            }
            to.put(self.kernels, [e, first], sum);
        });
    }

    /// The rows of expert e; none where its range is not one.
    fn rows_of(&self, e: usize) -> Range<usize> {
        if self.busy.experts().binary_search(&(e as u16)).is_ok() {
            self.groups.rows(e, self.problem.rows)
        } else {
            0..0
        }
    }
}
