//! The grouped matrix product: every row times its expert's matrix. gate_up, down and the dense product are this; here with
//! matrices that are read where they lie, in [`panels`](crate::panels) with packed ones.
//!
//! ```text
//! for each (expert with rows, block of its outputs), shared by the threads
//!     for each tile of the expert's rows
//!         sums = block of weights . tile of x                    one kernel call, f32
//!         out  = epilogue(input_weight * sums + bias)            rounded once, when stored
//! ```
//! A block of weights comes from memory once a call, however many rows use it; further tiles find it in the cache.
//! Each sum is formed by one kernel in one order, so its bits do not depend on blocks, tiles, threads or other rows.

use crate::Cpu;
use crate::arch::Kernels;
use crate::error::Result;
use crate::plan::{GroupedPlan, MAX_BLOCK_ROWS, MAX_SUMS, MAX_TILE};
use crate::rows::{Floats, each_format};
use crate::table::{ExpertRows, OutRows, RowOrder, Table, TypedTable};
use fused_moe_core::config::Activation;
use fused_moe_core::dtype::Float;
use fused_moe_core::problem::MAX_EXPERTS;
use fused_moe_core::{HostView, HostViewMut, Rows};
use std::ops::Range;

/// Operands of [`grouped`].
pub(crate) struct Grouped<'a> {
    /// R.
    pub(crate) rows: usize,
    /// Which rows are whose.
    pub(crate) groups: Groups<'a>,
    /// `[R, C]`, or `[T, C]` to gather from.
    pub(crate) x: HostView<'a>,
    /// Which row of x a row reads.
    pub(crate) gather: Gather<'a>,
    /// f32, one for each slot of the gather or for each row, in row-major order: multiplies the row of x. By linearity
    /// it multiplies the product instead; the two differ by rounding.
    pub(crate) input_weights: Option<HostView<'a>>,
    /// What becomes of the sums.
    pub(crate) epilogue: Epilogue,
    /// Written: `[R, ..]`.
    pub(crate) out: HostViewMut<'a>,
}

/// Which rows are whose.
#[derive(Clone, Copy)]
pub(crate) enum Groups<'a> {
    /// All of them expert 0's.
    One,
    /// Rows of expert e: `offsets[e] .. offsets[e+1]`, as far as they come after those of lower experts.
    Offsets(&'a [u32]),
}

/// Which row of x a row reads.
#[derive(Clone, Copy)]
pub(crate) enum Gather<'a> {
    /// The same.
    Rows,
    /// Row r reads `row_slot[r] / top_k`; a row whose slot does not exist is left alone.
    Tokens { row_slot: &'a [u32], top_k: usize },
}

/// What becomes of the sums.
#[derive(Clone, Copy)]
pub(crate) enum Epilogue {
    /// They are stored: an output, or a pair to columns i and `outputs + i`.
    Store,
    /// The activation of each pair, or of each output where there are no pairs, is stored.
    Activate(Activation),
}

/// Carries out a [`Grouped`] with `[.., C]` for each expert.
pub(crate) fn grouped(cpu: &Cpu, plan: &GroupedPlan, table: Table<'_>, operands: Grouped<'_>) -> Result<()> {
    let (weights, x) = (Floats::new(&table.matrices)?, Floats::new(&operands.x)?);
    each_format!(Floats, weights, weights => each_format!(Floats, x, x => {
        typed(cpu, plan, table.typed(weights)?, x, operands)
    }))
}

fn typed<'a, W: Float, X: Float>(
    cpu: &Cpu,
    plan: &GroupedPlan,
    table: TypedTable<'a, W>,
    x: Rows<'a, X>,
    operands: Grouped<'a>,
) -> Result<()> {
    let Grouped { rows, groups, gather, input_weights, epilogue, out, .. } = operands;
    let product = Product {
        kernels: cpu.kernels,
        tile: plan.tile,
        inputs: Inputs::new(rows, gather, input_weights)?,
        x,
        table,
        epilogue,
        out: OutRows::new(out)?,
    };
    let outputs = product.table.outputs();
    let (blocks, chunks) = (outputs.div_ceil(plan.block), plan.chunks);
    let busy = Busy::new(groups, rows);
    cpu.pool.for_each(busy.count * blocks * chunks, plan.grain, |item| {
        let (item, chunk) = (item / chunks, item % chunks);
        let e = usize::from(busy.experts[item / blocks]);
        let (range, first) = (groups.rows(e, rows), (item % blocks) * plan.block);
        let cut = |i: usize| range.start + range.len() * i / chunks;
        let columns = first..outputs.min(first + plan.block);
        product.block(product.table.expert(e), columns, cut(chunk)..cut(chunk + 1));
    });
    Ok(())
}

impl Groups<'_> {
    pub(crate) fn rows(self, e: usize, rows: usize) -> Range<usize> {
        match self {
            Self::One => 0..rows,
            Self::Offsets(offsets) => {
                let at = |i: usize| offsets.get(i).map_or(rows, |&offset| rows.min(offset as usize));
                at(e)..at(e + 1)
            }
        }
    }
}

/// The experts that have rows.
pub(crate) struct Busy {
    experts: [u16; MAX_EXPERTS],
    count: usize,
}

impl Busy {
    /// Offsets are taken as they come from a caller: no row is given to two experts, and none is past R.
    pub(crate) fn new(groups: Groups<'_>, rows: usize) -> Self {
        let mut busy = Self { experts: [0; MAX_EXPERTS], count: 0 };
        let experts = match groups {
            Groups::One => 1,
            Groups::Offsets(offsets) => offsets.len().saturating_sub(1),
        };
        let mut end = 0;
        for e in 0..experts.min(MAX_EXPERTS) {
            let range = groups.rows(e, rows);
            if !range.is_empty() && range.start >= end {
                busy.experts[busy.count] = e as u16;
                (busy.count, end) = (busy.count + 1, range.end);
            }
        }
        busy
    }

    /// In ascending order.
    pub(crate) fn experts(&self) -> &[u16] {
        &self.experts[..self.count]
    }
}

/// Where the rows come from.
pub(crate) struct Inputs<'a> {
    rows: usize,
    gather: Gather<'a>,
    weights: Option<Rows<'a, f32>>,
}

impl<'a> Inputs<'a> {
    pub(crate) fn new(rows: usize, gather: Gather<'a>, weights: Option<HostView<'a>>) -> Result<Self> {
        Ok(Self { rows, gather, weights: weights.map(|weights| weights.typed()).transpose()? })
    }

    /// The row of x that row r reads, and what it is multiplied by.
    pub(crate) fn find(&self, r: usize) -> Option<(usize, f32)> {
        let (source, slot) = match self.gather {
            Gather::Rows => (r, r),
            Gather::Tokens { row_slot, top_k } => {
                let slot = *row_slot.get(r)? as usize;
                (slot.checked_div(top_k)?, slot)
            }
        };
        if slot >= self.rows {
            return None;
        }
        let weight = match self.weights {
            None => 1.0,
            Some(weights) => {
                let (row, col) = (slot.checked_div(weights.cols())?, slot.checked_rem(weights.cols())?);
                *weights.row(row).get(col)?
            }
        };
        Some((source, weight))
    }
}

/// Everything that the blocks have in common.
struct Product<'a, W, X> {
    kernels: Kernels,
    tile: usize,
    inputs: Inputs<'a>,
    x: Rows<'a, X>,
    table: TypedTable<'a, W>,
    epilogue: Epilogue,
    out: OutRows<'a>,
}

/// Some rows of an expert, with their inputs.
struct Tile<'a, X> {
    rows: [usize; MAX_TILE],
    x: [&'a [X]; MAX_TILE],
    weights: [f32; MAX_TILE],
    len: usize,
}

/// Some outputs of an expert.
struct Block<'a, W> {
    first: usize,
    outputs: usize,
    weights: &'a [&'a [W]],
    bias: &'a [f32],
}

impl<'a, W: Float, X: Float> Product<'a, W, X> {
    /// The outputs `columns` of the rows `rows`, all of one expert.
    fn block(&self, expert: ExpertRows<'a, W>, columns: Range<usize>, rows: Range<usize>) {
        let per_output = self.table.order().rows_per_output();
        let count = columns.len() * per_output;
        let mut weights: [&[W]; MAX_BLOCK_ROWS] = [&[]; MAX_BLOCK_ROWS];
        let mut bias = [0.0; MAX_BLOCK_ROWS];
        for (i, (weight, bias)) in (columns.start * per_output..).zip(weights.iter_mut().zip(&mut bias)).take(count) {
            (*weight, *bias) = (expert.row(i), expert.bias(i));
        }
        let weights = &weights[..count];
        let block = Block { first: columns.start, outputs: columns.len(), weights, bias: &bias[..count] };
        let mut tile = Tile { rows: [0; MAX_TILE], x: [&[]; MAX_TILE], weights: [0.0; MAX_TILE], len: 0 };
        for row in rows {
            let Some((source, weight)) = self.inputs.find(row) else { continue };
            (tile.rows[tile.len], tile.x[tile.len], tile.weights[tile.len]) = (row, self.x.row(source), weight);
            tile.len += 1;
            if tile.len == self.tile {
                self.tile(&block, &tile);
                tile.len = 0;
            }
        }
        if tile.len > 0 {
            self.tile(&block, &tile);
        }
    }

    /// A block of outputs for a tile of rows.
    fn tile(&self, block: &Block<'_, W>, tile: &Tile<'_, X>) {
        let (width, count) = (block.outputs, tile.len);
        let mut sums = [0.0; MAX_SUMS];
        let sums = &mut sums[..block.weights.len() * count];
        self.kernels.pair_dot_tile(block.weights, &tile.x[..count], sums);
        let value = |row: usize, n: usize| tile.weights[n] * sums[row * count + n] + block.bias[row];
        if self.table.order() == RowOrder::Single {
            let mut values = [0.0; MAX_SUMS];
            let values = &mut values[..width * count];
            for (n, line) in values.chunks_exact_mut(width).enumerate() {
                for (i, v) in line.iter_mut().enumerate() {
                    *v = value(i, n);
                }
            }
            if let Epilogue::Activate(activation) = self.epilogue {
                self.kernels.activation_into_up(activation, &[], values);
            }
            return self.store(tile, block.first, values);
        }
        let (mut gate, mut up) = ([0.0; MAX_SUMS / 2], [0.0; MAX_SUMS / 2]);
        let (gate, up) = (&mut gate[..width * count], &mut up[..width * count]);
        for (n, (g, u)) in gate.chunks_exact_mut(width).zip(up.chunks_exact_mut(width)).enumerate() {
            for (i, (g, u)) in g.iter_mut().zip(u).enumerate() {
                (*g, *u) = (value(2 * i, n), value(2 * i + 1, n));
            }
        }
        match self.epilogue {
            Epilogue::Activate(activation) => {
                self.kernels.activation_into_gate(activation, gate, up);
                self.store(tile, block.first, gate);
            }
            Epilogue::Store => {
                self.store(tile, block.first, gate);
                self.store(tile, self.table.outputs() + block.first, up);
            }
        }
    }

    /// `values: [tile, outputs]` to the tile's rows of the output.
    fn store(&self, tile: &Tile<'_, X>, col: usize, values: &[f32]) {
        let width = values.len() / tile.len;
        for (&row, line) in tile.rows[..tile.len].iter().zip(values.chunks_exact(width)) {
            self.out.store(self.kernels, [row, col], line, false);
        }
    }
}
