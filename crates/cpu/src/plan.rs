//! How an operation is carried out: the only place where a block, a tile or a grain is chosen. A plan follows from sizes
//! and from numbers of the device, and can say why.

pub(crate) mod backward;
mod layer;
mod panels;

pub(crate) use layer::LayerPlan;
pub(crate) use panels::{
    FEW_ROWS, FEW_WORDS, PASS_ROWS, PASS_WORDS, PanelPlan, Share, TILES_ROWS, TILES_WORDS, operand,
};

use crate::arch::Isa;
use crate::device::Caches;
use fused_moe_core::DType;
use fused_moe_core::config::Activation;
use fused_moe_core::problem::{DownProblem, GateUpProblem, LinearProblem};
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
    /// Blocks that a thread takes at a time.
    pub(crate) grain: usize,
}

/// Weights in a block, at most: a share of the second-level cache, of which x, the sums and what is on its way take the
/// rest.
const BLOCK_SHARE_OF_CACHE: usize = 8;
/// An output of so many bytes leaves the second-level caches before it is read, whichever way it is written.
const STREAMED_BYTES: usize = 64 << 20;
/// So many parts of work for each thread let all of them end at about the same time.
const PARTS_PER_THREAD: usize = 4;
/// So many rows of x take no longer than fetching the weights that they meet.
const ROWS_FREE: usize = 4;
/// Fetching so many bytes of weights takes long compared to handing work to a thread.
const GRAIN_BYTES: usize = 32 << 10;

/// Whether an output of so many bytes is written past the caches: lines that are written whole need not be read first, and what
/// products work on stays.
pub(crate) fn streams(bytes: usize) -> bool {
    bytes >= STREAMED_BYTES
}

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
            write!(f, ", {grain} such blocks to a thread at a time since each is small")?;
        }
        Ok(())
    }
}

/// Tokens of a block of the gate: what they have of x stays in the second-level cache while the router passes by.
pub(crate) const GATE_TOKENS: usize = 24;
/// The most router rows of a block of the gate.
pub(crate) const GATE_EXPERTS: usize = 32;
/// Router rows of a block where there are fewer tokens than a block has, for the sake of more blocks.
const GATE_FEW_EXPERTS: usize = 8;
/// Columns of normalised tokens that a block of the gate holds at a time: with `GATE_TOKENS` they are 48 KiB.
pub(crate) const GATE_COLUMNS: usize = 512;
/// So many products of the gate take long compared to handing work to a thread.
const GATE_GRAIN: usize = 1 << 17;

/// How the gate is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GatePlan {
    /// Router rows of a block.
    pub(crate) experts: usize,
    /// Blocks that a thread takes at a time.
    pub(crate) grain: usize,
}

impl GatePlan {
    /// For x `[T, H]`; `normed`: each block has to normalise its tokens, so that more of them would cost more.
    pub(crate) fn new([tokens, hidden]: [usize; 2], normed: bool) -> Self {
        let experts = if tokens < GATE_TOKENS && !normed { GATE_FEW_EXPERTS } else { GATE_EXPERTS };
        let products = hidden.saturating_mul(experts * tokens.clamp(1, GATE_TOKENS));
        Self { experts, grain: (GATE_GRAIN / products.max(1)).max(1) }
    }
}

impl fmt::Display for GatePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} experts at a time, {GATE_TOKENS} tokens of x in the cache", self.experts)?;
        match self.grain {
            1 => Ok(()),
            grain => write!(f, ", {grain} such blocks to a thread at a time since each is small"),
        }
    }
}

/// The E up to which a token's ranks and a thread's counters lie in small arrays; else these are `MAX_EXPERTS` long.
pub(crate) const FEW_EXPERTS: usize = 512;
/// How many of the best are found one by one, which takes no branches that depend on the data; more are sorted.
pub(crate) const ONE_BY_ONE: usize = 32;
/// The most parts that a token's ranks are looked at in: each of the best costs a look at the parts and at one of them.
pub(crate) const RANK_PARTS: usize = 64;
/// The fewest ranks in such a part, which vectors go through at once.
pub(crate) const RANKS_OF_A_PART: usize = 16;
/// Terms of a softmax that are summed in f32 before f64 takes the sum: enough for vectors, and too few for rounding
/// errors to add up.
pub(crate) const SOFTMAX_TERMS: usize = 128;

/// How routing is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RoutePlan {
    top_k: usize,
    /// Whether E is at most `FEW_EXPERTS`.
    pub(crate) few_experts: bool,
    /// Its tokens.
    pub(crate) rows: RowsPlan,
}

impl RoutePlan {
    pub(crate) fn new(experts: usize, top_k: usize) -> Self {
        Self { top_k, few_experts: experts <= FEW_EXPERTS, rows: RowsPlan::new(LOGITS_PER_THREAD, experts) }
    }
}

impl fmt::Display for RoutePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.top_k {
            ..=ONE_BY_ONE => write!(f, "the {} best found one by one", self.top_k)?,
            _ => write!(f, "the {} best sorted since they are many", self.top_k)?,
        }
        write!(f, "; {}", self.rows)
    }
}

/// The most threads that share a permutation: each has counters of its own, which lie on the stack.
pub(crate) const PERMUTE_THREADS: usize = 16;
/// So many slots take long compared to handing work to a thread and to adding up its counters.
const PERMUTE_GRAIN: usize = 1 << 14;

/// How slots are permuted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PermutePlan {
    slots: usize,
    /// Whether E is at most `FEW_EXPERTS`.
    pub(crate) few_experts: bool,
    /// How many count and place, each some successive tokens.
    pub(crate) threads: usize,
}

impl PermutePlan {
    pub(crate) fn new(slots: usize, experts: usize, device: &Device) -> Self {
        let threads = if slots < 2 * PERMUTE_GRAIN { 1 } else { device.threads.clamp(1, PERMUTE_THREADS) };
        Self { slots, few_experts: experts <= FEW_EXPERTS, threads }
    }
}

impl fmt::Display for PermutePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.threads {
            1 => write!(f, "{} slots counted by one thread", self.slots),
            threads => write!(f, "{} slots counted by {threads} threads, {PERMUTE_THREADS} at most", self.slots),
        }
    }
}

/// Columns of a row that are worked on at a time, as f32 on the stack: few enough for the first-level cache.
pub(crate) const CHUNK: usize = 1024;
/// Columns of a token that combine keeps unrounded between the two passes of the norm; of wider tokens each part is
/// computed twice.
pub(crate) const COMBINE_COLUMNS: usize = 8 * CHUNK;

/// So many elements to add, to convert or to normalise take long compared to handing work to a thread.
const ELEMENTS_PER_THREAD: usize = 1 << 15;
/// The same of bytes to clear, which are only written.
const ZEROS_PER_THREAD: usize = 1 << 17;
/// The same of activations: each is an exponential.
const ACTIVATIONS_PER_THREAD: usize = 1 << 14;
/// The same of logits: each is a score, a rank and a look or more.
const LOGITS_PER_THREAD: usize = 1 << 12;
/// The same of slots whose weight is gathered: each reads somewhere.
const GATHERED_PER_THREAD: usize = 1 << 9;

/// The same of slots of an expert: each is compared and, of some, dropped.
const LIMITED_PER_THREAD: usize = 1 << 12;

/// How rows that do not meet are shared out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RowsPlan {
    /// So many rows, or fewer, are not shared.
    pub(crate) grain: usize,
}

impl RowsPlan {
    /// Rows of `columns` elements that are read once each and added, converted or normalised.
    pub(crate) fn elements(columns: usize) -> Self {
        Self::new(ELEMENTS_PER_THREAD, columns)
    }

    pub(crate) fn combine(hidden: usize, top_k: usize) -> Self {
        Self::elements(hidden.saturating_mul(top_k.saturating_add(1)))
    }

    pub(crate) fn zero(row_bytes: usize) -> Self {
        Self::new(ZEROS_PER_THREAD, row_bytes)
    }

    pub(crate) fn activation(intermediate: usize) -> Self {
        Self::new(ACTIVATIONS_PER_THREAD, intermediate)
    }

    pub(crate) fn gather_weights(top_k: usize) -> Self {
        Self::new(GATHERED_PER_THREAD, top_k)
    }

    /// Experts that have so many slots together.
    pub(crate) fn overflow(slots: usize, experts: usize) -> Self {
        Self::new(LIMITED_PER_THREAD, slots / experts.max(1))
    }

    /// Each row is a part of the work of its own.
    pub(crate) fn single() -> Self {
        Self { grain: 1 }
    }

    fn new(per_thread: usize, per_row: usize) -> Self {
        Self { grain: (per_thread / per_row.max(1)).max(1) }
    }

    /// The most rows of a part when `rows` of them are shared by `threads`.
    pub(crate) fn part(self, rows: usize, threads: usize) -> usize {
        self.grain.max(rows.div_ceil(PARTS_PER_THREAD * threads))
    }
}

impl fmt::Display for RowsPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.grain {
            1 => write!(f, "tokens shared by the threads"),
            grain => write!(f, "{grain} tokens or fewer on one thread, more shared"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(threads: usize) -> Device {
        Device { threads, isa: Isa::Avx512, caches: Caches { l2: 2 << 20 } }
    }

    fn sizes(rows: usize, experts: usize, [inner, outputs, rows_per_output]: [usize; 3]) -> Sizes {
        Sizes { rows, experts, inner, outputs, rows_per_output, weight: DType::BF16 }
    }

    #[test]
    fn plans_fit_the_buffers_of_the_product() {
        for l2 in [1, 64 << 10, 2 << 20, usize::MAX] {
            let device = Device { caches: Caches { l2 }, ..device(64) };
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

    #[test]
    fn few_tokens_cut_the_router_finer_unless_they_are_normalised() {
        assert_eq!(GatePlan::new([1, 2048], false), GatePlan { experts: GATE_FEW_EXPERTS, grain: 8 });
        assert_eq!(GatePlan::new([1, 2048], true).experts, GATE_EXPERTS);
        assert_eq!(GatePlan::new([64, 2048], false), GatePlan { experts: GATE_EXPERTS, grain: 1 });
        assert_eq!(GatePlan::new([0, usize::MAX], false).grain, 1);
    }

    #[test]
    fn few_slots_are_permuted_by_one_thread() {
        assert_eq!(PermutePlan::new(2 * PERMUTE_GRAIN - 1, 8, &device(64)).threads, 1);
        assert_eq!(PermutePlan::new(2 * PERMUTE_GRAIN, 8, &device(64)).threads, PERMUTE_THREADS);
        assert_eq!(PermutePlan::new(usize::MAX, 8, &device(2)).threads, 2);
    }

    #[test]
    fn rows_of_any_width_are_shared() {
        for width in [0, 1, 2048, usize::MAX] {
            assert!(RowsPlan::combine(width, usize::MAX).grain >= 1);
            assert!(RowsPlan::elements(width).part(usize::MAX, 8) >= usize::MAX / (PARTS_PER_THREAD * 8));
        }
        assert_eq!(RowsPlan::elements(2048).part(4, 8), 16);
    }
}
