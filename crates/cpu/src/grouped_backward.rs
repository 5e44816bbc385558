//! The gradients of a grouped product, behind those of gate_up, down and the router.
//!
//! ```text
//! d_rows[r]     = d[r] . W[e]                 for each busy expert, block of columns, part of its rows
//! d_W[e]        = sum_r d[r]^T x[r]           for each expert, block of its rows, block of columns
//! d_bias[e]     = sum_r d[r]                  for each expert, part of its columns
//! ```
//!
//! The first two are one loop over blocks of sums that lie on the stack: what is multiplied is loaded in f32, weighted and
//! without gaps, some products deep at a time, and the sums go on from pass to pass. Each sum is one chain of
//! multiply-adds in ascending order.

use crate::Cpu;
use crate::arch::{Kernels, OUTER_COLUMNS};
use crate::error::Result;
use crate::grouped::{Busy, Gather, Groups};
use crate::plan::backward::{
    BIAS_COLUMNS, BLOCK_COLUMNS, MATRICES_DEPTH, MATRICES_STRIDE, OUTER_PANELS, OUTER_ROWS, OuterPlan, ROWS_DEPTH,
    ROWS_STRIDE,
};
use crate::rows::Floats;
use crate::table::OutRows;
use fused_moe_core::operation::{Gradient, GradientMode};
use fused_moe_core::problem::GroupedBackwardProblem;
use fused_moe_core::{HostView, Rows};
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

/// Rows, found through a gather and multiplied by factors.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    pub(crate) rows: Floats<'a>,
    pub(crate) gather: Gather<'a>,
    /// R, above every slot.
    pub(crate) slots: usize,
    /// One for each slot, in row-major order.
    pub(crate) weights: Option<Rows<'a, f32>>,
    pub(crate) scale: f32,
    /// What a soft-cap gave, and its limit: `d * (1 - (y / limit)^2)`.
    pub(crate) softcap: Option<(Rows<'a, f32>, f32)>,
}

impl<'a> Source<'a> {
    /// The rows as they are.
    pub(crate) fn new(view: &HostView<'a>, gather: Gather<'a>, slots: usize) -> Result<Self> {
        Ok(Self { rows: Floats::new(view)?, gather, slots, weights: None, scale: 1.0, softcap: None })
    }

    /// Row r from column `col` on; zeros where its slot does not exist.
    fn load(&self, kernels: Kernels, [r, col]: [usize; 2], to: &mut [f32]) {
        let Some((source, weight)) = self.find(r) else { return to.fill(0.0) };
        if weight == 1.0 {
            self.rows.load(kernels, source, col, to);
        } else {
            self.rows.scale(kernels, [source, col], weight, None, to);
        }
        if let Some((capped, limit)) = self.softcap {
            for (d, y) in to.iter_mut().zip(capped.row(source).get(col..).unwrap_or_default()) {
                let y = y / limit;
                *d *= 1.0 - y * y;
            }
        }
    }

    fn find(&self, r: usize) -> Option<(usize, f32)> {
        let (source, slot) = match self.gather {
            Gather::Rows => (r, r),
            Gather::Tokens { row_slot, top_k } => {
                let slot = *row_slot.get(r)? as usize;
                (slot.checked_div(top_k)?, slot)
            }
        };
        if slot >= self.slots {
            return None;
        }
        let weight = match self.weights {
            None => 1.0,
            Some(weights) => {
                let (row, col) = (slot.checked_div(weights.cols())?, slot.checked_rem(weights.cols())?);
                *weights.row(row).get(col)?
            }
        };
        Some((source, self.scale * weight))
    }
}

/// Where a gradient is stored, by several threads.
pub(crate) struct Target<'a> {
    out: OutRows<'a>,
    mode: GradientMode,
}

impl<'a> Target<'a> {
    pub(crate) fn new(gradient: Gradient<'a, Cpu>) -> Result<Self> {
        Ok(Self { out: OutRows::new(gradient.view)?, mode: gradient.mode })
    }

    pub(crate) fn accumulates(&self) -> bool {
        self.mode == GradientMode::Accumulate
    }

    /// Stores a part of a row; `values` may be changed.
    pub(crate) fn put(&self, kernels: Kernels, at: [usize; 2], values: &mut [f32]) {
        if self.accumulates() {
            self.out.add_to(kernels, at, values);
        }
        self.out.store(kernels, at, values);
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
    let matrices = Floats::new(&matrices)?;
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

/// Some columns of some rows.
type Panel<const ROWS: usize> = [[f32; OUTER_COLUMNS]; ROWS];

const _: () = assert!(ROWS_DEPTH <= MATRICES_DEPTH && ROWS_STRIDE * OUTER_ROWS <= MATRICES_STRIDE * MATRICES_DEPTH);

/// Operands and sums of a block, the columns in panels; between blocks, the sums are zero.
struct Block {
    a: [f32; MATRICES_STRIDE * MATRICES_DEPTH],
    b: [Panel<MATRICES_DEPTH>; OUTER_PANELS],
    c: [Panel<OUTER_ROWS>; OUTER_PANELS],
}

impl Block {
    const ZERO: Self = Self {
        a: [0.0; MATRICES_STRIDE * MATRICES_DEPTH],
        b: [[[0.0; OUTER_COLUMNS]; MATRICES_DEPTH]; OUTER_PANELS],
        c: [[[0.0; OUTER_COLUMNS]; OUTER_ROWS]; OUTER_PANELS],
    };

    /// Row k of b, from what loads columns.
    fn load_b(&mut self, k: usize, columns: &Range<usize>, load: impl Fn(usize, &mut [f32])) {
        let mut row = [0.0; BLOCK_COLUMNS];
        load(columns.start, &mut row[..columns.len()]);
        for (panel, part) in self.b.iter_mut().zip(row.as_chunks::<OUTER_COLUMNS>().0) {
            panel[k] = *part;
        }
    }

    /// `c += a * b` for so many rows, products and columns, while what comes next is fetched.
    fn multiply(&mut self, kernels: Kernels, steps: [usize; 2], [rows, depth, width]: [usize; 3], ahead: &[&[u8]]) {
        let mut ahead = ahead.chunks(ahead.len().div_ceil(width.div_ceil(OUTER_COLUMNS)).max(1));
        for ((b, c), first) in self.b.iter().zip(&mut self.c).zip((0..width).step_by(OUTER_COLUMNS)) {
            let ahead = ahead.next().unwrap_or_default();
            kernels.outer((&self.a, steps), &b[..depth], &mut c[..rows], width - first, ahead);
        }
    }

    /// Stores so many rows of sums from `[row, column]` on, and clears them.
    fn flush(&mut self, kernels: Kernels, to: &Target<'_>, [row, rows]: [usize; 2], columns: &Range<usize>) {
        // Row by row, since a row of the target is a page of its own.
        for m in 0..rows {
            for (c, first) in self.c.iter_mut().zip(columns.clone().step_by(OUTER_COLUMNS)) {
                let width = OUTER_COLUMNS.min(columns.end - first);
                to.put(kernels, [row + m, first], &mut c[m][..width]);
                c[m].fill(0.0);
            }
        }
    }
}

/// `work(block, i)` for every i below `count`, `grain` successive ones with one block.
fn each_block(cpu: &Cpu, count: usize, grain: usize, work: impl Fn(&mut Block, usize) + Sync) {
    let grain = grain.max(1);
    cpu.pool.for_each(count.div_ceil(grain), 1, |part| {
        let mut block = Block::ZERO;
        (part * grain..count.min((part + 1) * grain)).for_each(|i| work(&mut block, i));
    });
}

/// Some columns of a matrix, at most `BLOCK_COLUMNS`.
fn columns(block: usize, inputs: usize) -> Range<usize> {
    let first = block * BLOCK_COLUMNS;
    first..inputs.min(first + BLOCK_COLUMNS)
}

impl Product<'_> {
    fn rows(&self, cpu: &Cpu, matrices: Floats<'_>, to: &Target<'_>) {
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
                self.block_of_rows((usize::from(e), matrices), &columns, rows.clone(), block);
                block.flush(self.kernels, to, [first, rows.len()], &columns);
            }
        });
    }

    /// `c[m][n] = sum_k d[rows[m]][k] * W[e][k][columns[n]]`.
    fn block_of_rows(
        &self,
        (e, matrices): (usize, Floats<'_>),
        columns: &Range<usize>,
        rows: Range<usize>,
        block: &mut Block,
    ) {
        let (kernels, outputs) = (self.kernels, self.problem.outputs);
        for k in (0..outputs).step_by(ROWS_DEPTH) {
            let depth = ROWS_DEPTH.min(outputs - k);
            for (row, a) in rows.clone().zip(block.a.chunks_exact_mut(ROWS_STRIDE)) {
                self.d.load(kernels, [row, k], &mut a[..depth]);
            }
            for n in 0..depth {
                block.load_b(n, columns, |column, to| matrices.load(kernels, e * outputs + k + n, column, to));
            }
            let mut ahead: [&[u8]; ROWS_DEPTH] = [&[]; ROWS_DEPTH];
            for (n, row) in ahead.iter_mut().enumerate().take(outputs.saturating_sub(k + depth)) {
                *row = matrices.bytes(e * outputs + k + depth + n, columns.start, columns.len());
            }
            block.multiply(kernels, [ROWS_STRIDE, 1], [rows.len(), depth, columns.len()], &ahead);
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
                let outputs_here = first..end.min(first + OUTER_ROWS);
                let count = outputs_here.len();
                self.block_of_matrix((x, n == 0), (outputs_here, &columns), rows.clone(), block);
                block.flush(self.kernels, to, [e * outputs + first, count], &columns);
            }
        });
    }

    /// `c[m][n] = sum_r d[r][outputs[m]] * x[r][columns[n]]`, r over the rows of one expert. What x has of these columns
    /// stays in the block from one call to the next where all rows fit.
    fn block_of_matrix(
        &self,
        (x, fresh): (Source<'_>, bool),
        (outputs, columns): (Range<usize>, &Range<usize>),
        rows: Range<usize>,
        block: &mut Block,
    ) {
        let kernels = self.kernels;
        for start in rows.clone().step_by(MATRICES_DEPTH) {
            let depth = MATRICES_DEPTH.min(rows.end - start);
            for (n, a) in block.a.chunks_exact_mut(MATRICES_STRIDE).take(depth).enumerate() {
                self.d.load(kernels, [start + n, outputs.start], &mut a[..outputs.len()]);
            }
            if fresh || rows.len() > MATRICES_DEPTH {
                for n in 0..depth {
                    block.load_b(n, columns, |column, to| x.load(kernels, [start + n, column], to));
                }
            }
            block.multiply(kernels, [1, MATRICES_STRIDE], [outputs.len(), depth, columns.len()], &[]);
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
