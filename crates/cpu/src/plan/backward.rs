//! How a gradient is carried out.

use super::PARTS_PER_THREAD;
use crate::arch::OUTER_COLUMNS;

/// Rows of a block of sums, and panels of columns: so many that loading what is multiplied costs little beside the
/// products, and that all of it stays in the second-level cache.
pub(crate) const OUTER_ROWS: usize = 128;
pub(crate) const OUTER_PANELS: usize = 4;
/// Columns of a block.
pub(crate) const BLOCK_COLUMNS: usize = OUTER_PANELS * OUTER_COLUMNS;
/// Words that are loaded at a time, numbers or pairs of bf16: for matrices, the rows that an expert of many usually has in
/// a batch, so that they are loaded once.
pub(crate) const ROWS_DEPTH: usize = 128;
pub(crate) const MATRICES_DEPTH: usize = 192;
/// Products that are added in one call: what a panel has of them leaves room in a first-level cache for the rest.
pub(crate) const CALL_DEPTH: usize = 64;
/// Distances of the rows of what is broadcast: a line more than they need, so that rows do not share the sets of a cache.
pub(crate) const ROWS_STRIDE: usize = ROWS_DEPTH + 16;
pub(crate) const MATRICES_STRIDE: usize = OUTER_ROWS + 16;
/// So many products take long compared to handing work to a thread and to clearing a block.
const OUTER_GRAIN: usize = 1 << 21;
/// So many parts of the work even out what experts differ in.
const GRAINS_PER_THREAD: usize = 16;
/// Columns of a bias that are added up at a time: enough that reading a row in parts costs nothing.
pub(crate) const BIAS_COLUMNS: usize = 512;
/// Columns of a norm's weight that a thread adds up; each part looks at all rows for their lengths.
pub(crate) const NORM_COLUMNS: usize = 1024;
/// Rows whose lengths such a part keeps.
pub(crate) const NORM_ROWS: usize = 256;

/// The sizes of a grouped product with many outputs a weight row: `[rows, outer]` from `[rows, inner]`, for each expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OuterPlan {
    /// Blocks of columns.
    pub(crate) blocks: usize,
    /// Parts that the rows of an expert are cut into.
    pub(crate) chunks: usize,
    /// Blocks that a thread takes at a time.
    pub(crate) grain: usize,
}

impl OuterPlan {
    /// The rows' gradient: `R x outputs` times `outputs x inputs` for `busy` experts.
    pub(crate) fn rows(rows: usize, busy: usize, [outputs, inputs]: [usize; 2], threads: usize) -> Self {
        let blocks = inputs.div_ceil(BLOCK_COLUMNS);
        let each = rows.div_ceil(busy.max(1));
        let items = busy.saturating_mul(blocks).max(1);
        let chunks = (PARTS_PER_THREAD * threads).div_ceil(items).min(each / OUTER_ROWS).max(1);
        let products = each.div_ceil(chunks).saturating_mul(outputs).saturating_mul(BLOCK_COLUMNS);
        Self { blocks, chunks, grain: grain(items.saturating_mul(chunks), products, threads) }
    }

    /// The matrices' gradient: `outputs x rows` times `rows x inputs` for each of E experts; a chunk is a part of the
    /// outputs. What an expert's rows have of a block of columns is loaded once for all outputs of a chunk.
    pub(crate) fn matrices(rows: usize, experts: usize, [outputs, inputs]: [usize; 2], threads: usize) -> Self {
        let blocks = inputs.div_ceil(BLOCK_COLUMNS);
        let items = experts.saturating_mul(blocks).max(1);
        let chunks = (PARTS_PER_THREAD * threads).div_ceil(items).min(outputs.div_ceil(OUTER_ROWS)).max(1);
        let depth = rows.div_ceil(experts.max(1)).max(OUTER_ROWS / 8);
        let products = depth.saturating_mul(outputs.div_ceil(chunks)).saturating_mul(BLOCK_COLUMNS);
        Self { blocks, chunks, grain: grain(items.saturating_mul(chunks), products, threads) }
    }
}

/// Blocks of so many products each that a thread takes at a time: enough for a grain, and more as long as the threads have
/// `GRAINS_PER_THREAD` parts each, since the memory of a block is cleared for every part.
fn grain(blocks: usize, products: usize, threads: usize) -> usize {
    let few = OUTER_GRAIN.div_ceil(products.max(1));
    few.max(blocks / GRAINS_PER_THREAD.saturating_mul(threads).max(1))
}
