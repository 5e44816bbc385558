//! How an operation is carried out: the only place where a block, a tile or a grain is chosen. A plan follows from sizes
//! and from numbers of the device, and can say why.

use crate::arch::Isa;
use crate::device::Caches;
use fused_moe_core::DType;
use fused_moe_core::config::Activation;
use fused_moe_core::problem::{DownProblem, GateUpProblem, LayerProblem, LinearProblem};
use std::fmt;

/// Weight rows and rows of x that the kernels work on at once.
const DOT_ROWS: usize = 4;
const DOT_TOKENS: usize = 6;
/// The most weight rows in a block.
pub(crate) const MAX_BLOCK_ROWS: usize = 64;
/// The most rows of x in a tile.
pub(crate) const MAX_TILE: usize = 48;
/// The most sums of a block and a tile; they lie on the stack.
pub(crate) const MAX_SUMS: usize = 768;

/// So many elements to convert or to normalise take long compared to handing work to a thread.
pub(crate) const ELEMENTS_PER_THREAD: usize = 32 << 10;

/// What a plan needs to know about the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) threads: usize,
    pub(crate) isa: Isa,
    pub(crate) caches: Caches,
}

/// The sizes of a grouped product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// R.
    pub(crate) rows: usize,
    /// E.
    pub(crate) experts: usize,
    /// Columns of a matrix.
    pub(crate) inner: usize,
    /// Outputs of an expert.
    pub(crate) outputs: usize,
    /// Rows of its matrix that make one of them.
    pub(crate) rows_per_output: usize,
    /// Format of the matrices.
    pub(crate) weight: DType,
}

/// How a grouped product is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GroupedPlan {
    /// What it is for.
    sizes: Sizes,
    /// Outputs of an expert that a thread makes at a time.
    pub(crate) block: usize,
    /// Rows of x that meet a block at a time.
    pub(crate) tile: usize,
    /// Parts that the rows of an expert are cut into.
    pub(crate) chunks: usize,
    /// Blocks that a thread takes at a time at least.
    pub(crate) grain: usize,
}

/// Weights in a block, at most: a share of the second-level cache, of which x, the sums and what is on its way take the
/// rest.
const BLOCK_SHARE_OF_CACHE: usize = 8;
/// So many parts of work, at least, keep a thread busy while others finish.
const PARTS_PER_THREAD: usize = 4;
/// So many rows of x take no longer than fetching the weights that they meet.
const ROWS_FREE: usize = 4;
/// Fetching so many bytes of weights takes long compared to handing work to a thread.
const GRAIN_BYTES: usize = 32 << 10;

impl GroupedPlan {
    pub(crate) fn gate_up(problem: &GateUpProblem, weight: DType, device: &Device) -> Self {
        let GateUpProblem { rows, experts, hidden: inner, intermediate: outputs, activation, .. } = *problem;
        Self::new(Sizes { rows, experts, inner, outputs, rows_per_output: rows_per_output(activation), weight }, device)
    }

    pub(crate) fn down(problem: &DownProblem, weight: DType, device: &Device) -> Self {
        let DownProblem { rows, experts, intermediate: inner, hidden: outputs, .. } = *problem;
        Self::new(Sizes { rows, experts, inner, outputs, rows_per_output: 1, weight }, device)
    }

    pub(crate) fn linear(problem: &LinearProblem, device: &Device) -> Self {
        let LinearProblem { rows, inner, outer: outputs, weight, .. } = *problem;
        Self::new(Sizes { rows, experts: 1, inner, outputs, rows_per_output: 1, weight }, device)
    }

    fn new(sizes: Sizes, device: &Device) -> Self {
        let row_bytes = sizes.row_bytes();
        let block_rows = device.caches.l2 / BLOCK_SHARE_OF_CACHE / row_bytes;
        let block_rows = block_rows.clamp(DOT_ROWS, MAX_BLOCK_ROWS) / DOT_ROWS * DOT_ROWS;
        let block = (block_rows / sizes.rows_per_output).clamp(1, sizes.outputs.max(1));
        let block_rows = block * sizes.rows_per_output;
        let tile = (MAX_SUMS / block_rows).min(MAX_TILE) / DOT_TOKENS * DOT_TOKENS;
        let blocks = sizes.outputs.div_ceil(block).max(1);
        let rows_each = sizes.rows.div_ceil(sizes.experts.max(1));
        let chunks = (PARTS_PER_THREAD * device.threads).div_ceil(blocks).min(rows_each / tile).max(1);
        let passes = rows_each.div_ceil(chunks).div_ceil(ROWS_FREE).max(1);
        let work = block_rows.saturating_mul(row_bytes).saturating_mul(passes);
        Self { sizes, block, tile, chunks, grain: GRAIN_BYTES.div_ceil(work) }
    }
}

impl Sizes {
    fn row_bytes(&self) -> usize {
        self.inner.saturating_mul(self.weight.size()).max(1)
    }
}

fn rows_per_output(activation: Activation) -> usize {
    if activation.is_gated() { 2 } else { 1 }
}

impl fmt::Display for GroupedPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sizes, block, tile, chunks, grain } = self;
        let kib = (block * sizes.rows_per_output * sizes.row_bytes()).div_ceil(1024);
        write!(
            f,
            "{block} of {} outputs at a time ({kib} KiB of {} weights, which stay in the cache",
            sizes.outputs, sizes.weight
        )?;
        write!(f, " while all rows of the expert pass, {tile} by {tile})")?;
        if *chunks > 1 {
            write!(f, ", rows cut into {chunks} parts since there are too few outputs to share")?;
        }
        if *grain > 1 {
            write!(f, ", {grain} such blocks to a thread at least since each is small")?;
        }
        Ok(())
    }
}

/// How a layer is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LayerPlan {
    tokens: usize,
    device: Device,
    gate_up: GroupedPlan,
    down: GroupedPlan,
    shared: Option<[GroupedPlan; 2]>,
}

impl LayerPlan {
    pub(crate) fn new(layer: &LayerProblem, tokens: usize, device: &Device) -> Self {
        let config = &layer.config;
        let plan = |rows: usize, experts: usize, [inner, outputs, rows_per_output]: [usize; 3], weight: DType| {
            GroupedPlan::new(Sizes { rows, experts, inner, outputs, rows_per_output, weight }, device)
        };
        let (rows, hidden) = (tokens.saturating_mul(config.top_k), config.hidden);
        let gate_up = [hidden, config.intermediate, rows_per_output(config.activation)];
        let shared = config.shared.zip(layer.shared).map(|(shared, [up, down])| {
            let gate_up = [hidden, shared.intermediate, rows_per_output(shared.activation)];
            [plan(tokens, 1, gate_up, up), plan(tokens, 1, [shared.intermediate, hidden, 1], down)]
        });
        Self {
            tokens,
            device: *device,
            gate_up: plan(rows, config.experts, gate_up, layer.gate_up),
            down: plan(rows, config.experts, [config.intermediate, hidden, 1], layer.down),
            shared,
        }
    }
}

impl fmt::Display for LayerPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tokens, device, gate_up, down, shared } = self;
        writeln!(
            f,
            "{tokens} tokens on {} threads with {}; sums in one order for any batch",
            device.threads, device.isa
        )?;
        writeln!(f, "gate_up: {gate_up}; with the activation")?;
        write!(f, "down: {down}")?;
        if let Some([gate_up, down]) = shared {
            writeln!(f, "\nshared gate_up: {gate_up}; with the activation")?;
            write!(f, "shared down: {down}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(threads: usize) -> Device {
        Device { threads, isa: Isa::Avx512, caches: Caches { l1: 48 << 10, l2: 2 << 20 } }
    }

    fn sizes(rows: usize, experts: usize, [inner, outputs, rows_per_output]: [usize; 3]) -> Sizes {
        Sizes { rows, experts, inner, outputs, rows_per_output, weight: DType::BF16 }
    }

    #[test]
    fn plans_fit_the_buffers_of_the_product() {
        for l2 in [1, 64 << 10, 2 << 20, usize::MAX] {
            let device = Device { caches: Caches { l1: 1, l2 }, ..device(64) };
            for inner in [1, 7, 2048, 1 << 20, usize::MAX] {
                for (outputs, rows_per_output) in [(0, 1), (1, 1), (1, 2), (13, 2), (4096, 1), (4096, 2)] {
                    for rows in [0, 1, 8, 4096, usize::MAX / 8] {
                        let sizes = sizes(rows, 7, [inner, outputs, rows_per_output]);
                        let plan = GroupedPlan::new(sizes, &device);
                        assert!(plan.block >= 1 && plan.block * rows_per_output <= MAX_BLOCK_ROWS, "{sizes:?}");
                        assert!((1..=MAX_TILE).contains(&plan.tile), "{sizes:?}");
                        assert!(plan.block * rows_per_output * plan.tile <= MAX_SUMS, "{sizes:?}");
                        assert!(plan.chunks >= 1 && plan.grain >= 1, "{sizes:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn rows_are_cut_only_where_there_are_few_outputs() {
        let one_output = GroupedPlan::new(sizes(4096, 1, [2048, 1, 1]), &device(8));
        assert_eq!(one_output.chunks, PARTS_PER_THREAD * 8);
        assert_eq!(GroupedPlan::new(sizes(4096, 1, [2048, 4096, 1]), &device(8)).chunks, 1);
        assert_eq!(GroupedPlan::new(sizes(3, 1, [2048, 1, 1]), &device(8)).chunks, 1);
    }

    #[test]
    fn small_products_stay_on_one_thread() {
        let plan = GroupedPlan::new(sizes(1, 4, [16, 8, 2]), &device(8));
        assert!(plan.grain >= 4, "{plan:?}");
        assert!(plan.to_string().contains("since each is small"), "{plan}");
    }
}
