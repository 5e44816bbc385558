use super::{Device, GRAIN_BYTES, PARTS_PER_THREAD, ROWS_FREE, rows_per_output};
use crate::arch::{Isa, PANEL, PANEL_BLOCK, group};
use fused_moe_core::DType;
use fused_moe_core::problem::{DownProblem, GateUpProblem};
use std::fmt;

/// The most rows of a pass of vectors: their part of x and their sums lie on the stack, and in the second-level cache while
/// the panels of a block pass.
pub(crate) const PASS_ROWS: usize = 48;
/// Rows of a pass that is one of few: as many as meet a panel at once where vectors are longest.
pub(crate) const FEW_ROWS: usize = 12;
/// Rows of a pass of tiles; what an expert has beyond them reads its panels again.
pub(crate) const TILES_ROWS: usize = 96;
/// Numbers of x that few rows have in the first-level cache, f32 or pairs of bf16: the longer their parts, the less often
/// reading jumps from panel to panel.
pub(crate) const FEW_WORDS: usize = 8 << 10;
/// The same of each of many rows: a panel's part is in the first-level cache too while they pass.
const PART_WORDS: usize = 272;
/// The same of all rows of a pass.
pub(crate) const PASS_WORDS: usize = PASS_ROWS * PART_WORDS;
/// The same of tiles, which take x from the second-level cache: whole rows of 2048 bf16, or a part of longer ones.
pub(crate) const TILES_WORDS: usize = TILES_ROWS * (1024 + 16);

/// Up to so many rows are no slower than memory, and Zen 5, where this was found, looks far enough ahead by itself: requests
/// would only hold it up. A Xeon with tiles does not, and loses a quarter of the bandwidth without them.
const UNAIDED: usize = 4;

/// How a grouped product with packed matrices is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PanelPlan {
    rows: usize,
    experts: usize,
    outputs: usize,
    weight: DType,
    /// Panels of a matrix.
    panels: usize,
    panel_bytes: usize,
    threads: usize,
    isa: Isa,
    /// Whether x stays in bf16, of which the instruction set forms products.
    pub(crate) pairs: bool,
}

/// How its work is shared out, given how many experts have rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Share {
    /// Panels that a thread takes at a time.
    pub(crate) block: usize,
    /// Parts that the rows of an expert are cut into.
    pub(crate) chunks: usize,
    /// Blocks that a thread takes at a time.
    pub(crate) grain: usize,
    /// How far after a block, or a part of its rows, what its thread takes next lies.
    pub(crate) stride: usize,
}

impl PanelPlan {
    pub(crate) fn gate_up(problem: &GateUpProblem, weight: DType, device: &Device) -> Self {
        let GateUpProblem { rows, experts, hidden, intermediate, activation, x, .. } = *problem;
        let panels = intermediate.div_ceil(PANEL / rows_per_output(activation));
        Self::new([rows, experts, intermediate], [panels, hidden], [x, weight], device)
    }

    pub(crate) fn down(problem: &DownProblem, weight: DType, device: &Device) -> Self {
        let DownProblem { rows, experts, intermediate, hidden, a, .. } = *problem;
        Self::new([rows, experts, hidden], [hidden.div_ceil(PANEL), intermediate], [a, weight], device)
    }

    fn new(
        [rows, experts, outputs]: [usize; 3],
        [panels, inner]: [usize; 2],
        [x, weight]: [DType; 2],
        device: &Device,
    ) -> Self {
        let panel_bytes = inner.div_ceil(group(weight)).saturating_mul(PANEL * group(weight) * weight.size());
        let pairs = operand(x, weight, device.isa) == DType::BF16;
        Self { rows, experts, outputs, weight, panels, panel_bytes, threads: device.threads, isa: device.isa, pairs }
    }

    /// Whether products are of tiles.
    pub(crate) fn tiles(&self) -> bool {
        self.pairs && self.isa.has_tiles()
    }

    /// The most rows of a pass where an expert has `most` rows.
    pub(crate) fn pass_rows(&self, most: usize) -> usize {
        match self.tiles() {
            false if most <= FEW_ROWS => FEW_ROWS,
            false => PASS_ROWS,
            // what few rows have is room for wide rows of fewer
            true if most <= FEW_ROWS / 3 => FEW_ROWS,
            true => TILES_ROWS,
        }
    }

    /// Numbers of x that each of `rows` rows of a pass has in the cache, of the `room` that there is for all.
    pub(crate) fn words(&self, rows: usize, room: usize) -> usize {
        let room = if rows <= FEW_ROWS && !self.tiles() { room.min(FEW_WORDS) } else { room };
        room / rows.max(1)
    }

    /// The most rows for which no memory is asked for ahead of time.
    pub(crate) fn unaided(&self) -> usize {
        if self.isa.has_tiles() { 0 } else { UNAIDED }
    }

    /// For so many experts with rows.
    pub(crate) fn share(&self, busy: usize) -> Share {
        let (all, parts) = (self.panels.saturating_mul(busy).max(1), PARTS_PER_THREAD * self.threads);
        // Experts differ in rows: smaller parts than equal ones would have to be.
        let block = (all / (2 * parts)).clamp(1, PANEL_BLOCK);
        let rows = self.rows.div_ceil(busy.max(1));
        let chunks = parts.div_ceil(all).min(rows / self.pass_rows(rows)).max(1);
        let passes = rows.div_ceil(chunks).div_ceil(ROWS_FREE).max(1);
        let work = self.panel_bytes.saturating_mul(block).saturating_mul(passes).max(1);
        let grain = GRAIN_BYTES.div_ceil(work);
        Share { block, chunks, grain, stride: if grain == 1 { self.threads } else { 1 } }
    }
}

/// The format that rows of x are multiplied in: bf16, where the instruction set forms products of such numbers and both
/// operands are of that format, else f32. It is also the format of what lies between gate_up and down.
pub(crate) fn operand(x: DType, weight: DType, isa: Isa) -> DType {
    if isa.has_bf16_products() && x == DType::BF16 && weight == DType::BF16 { DType::BF16 } else { DType::F32 }
}

impl fmt::Display for PanelPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Share { block, chunks, grain, .. } = self.share(self.experts.min(self.rows));
        let kib = self.panel_bytes.saturating_mul(block).div_ceil(1024);
        write!(
            f,
            "{block} of {} panels of {} outputs at a time ({kib} KiB of {}",
            self.panels, self.outputs, self.weight
        )?;
        write!(f, " weights), {} rows of an expert at a time at most", self.pass_rows(self.rows))?;
        match (self.pairs, self.weight) {
            (true, _) => write!(f, ", products of bf16 as {} forms them", self.isa)?,
            (false, DType::F32) => {}
            (false, _) => {
                write!(f, ", weights widened since x is not of their format or {} has no such products", self.isa)?
            }
        }
        if chunks > 1 {
            write!(f, ", rows cut into {chunks} parts since there are too few outputs to share")?;
        }
        if grain > 1 {
            write!(f, ", {grain} such blocks to a thread at a time since each is small")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Caches;

    fn plan([rows, experts]: [usize; 2], [panels, inner]: [usize; 2], isa: Isa, threads: usize) -> PanelPlan {
        let device = Device { threads, isa, caches: Caches { l2: 1 << 20 } };
        PanelPlan::new([rows, experts, 32 * panels], [panels, inner], [DType::BF16, DType::BF16], &device)
    }

    #[test]
    fn blocks_fit_the_buffers_and_are_enough_for_the_threads() {
        for inner in [1, 2048, usize::MAX - 1] {
            for panels in [1, 7, 64, 4096] {
                for rows in [0, 1, 4096, usize::MAX] {
                    for busy in [0, 1, 8, 4096] {
                        let plan = plan([rows, 4096], [panels, inner], Isa::Scalar, 8);
                        let Share { block, chunks, grain, .. } = plan.share(busy);
                        assert!((1..=PANEL_BLOCK).contains(&block) && chunks >= 1 && grain >= 1, "{plan:?}");
                        let blocks = (panels * busy).div_ceil(block) * chunks;
                        assert!(blocks >= 32 || block == 1, "{plan:?}: {blocks}");
                    }
                }
            }
        }
    }

    #[test]
    fn rows_are_cut_only_where_there_are_few_panels() {
        assert_eq!(plan([4096, 1], [1, 2048], Isa::Scalar, 8).share(1).chunks, 32);
        assert_eq!(plan([4096, 1], [64, 2048], Isa::Scalar, 8).share(1).chunks, 1);
        assert_eq!(plan([3, 1], [1, 2048], Isa::Scalar, 8).share(1).chunks, 1);
    }

    #[test]
    fn rows_have_room_for_the_columns_of_a_line() {
        for isa in [Isa::Avx512, Isa::Avx512Bf16, Isa::Amx] {
            let plan = plan([4096, 1], [64, 2048], isa, 8);
            assert_eq!(plan.tiles(), isa == Isa::Amx);
            for most in [1, FEW_ROWS, FEW_ROWS + 1, PASS_ROWS, 4096] {
                let rows = plan.pass_rows(most);
                let room = match rows {
                    FEW_ROWS => FEW_WORDS,
                    PASS_ROWS => PASS_WORDS,
                    _ => TILES_WORDS,
                };
                assert!(rows >= most.min(FEW_ROWS) && rows <= TILES_ROWS);
                assert!((1..=rows).all(|rows| plan.words(rows, room) >= 256), "{isa}, {rows} rows");
            }
        }
    }

    #[test]
    fn small_products_stay_on_one_thread() {
        let plan = plan([1, 4], [1, 16], Isa::Scalar, 8);
        assert!(plan.share(4).grain >= 4 && plan.to_string().contains("since each is small"), "{plan}");
    }

    #[test]
    fn bf16_stays_where_products_of_it_are_formed() {
        use DType::{BF16, F16, F32};
        let (with, without) = (Isa::Avx512Bf16, Isa::Avx512);
        assert_eq!([operand(BF16, BF16, with), operand(BF16, BF16, without)], [BF16, F32]);
        assert_eq!(operand(BF16, BF16, Isa::Amx), BF16);
        assert_eq!([operand(F32, BF16, with), operand(BF16, F32, with), operand(F16, F16, with)], [F32; 3]);
        assert!(plan([1, 4], [1, 16], with, 8).to_string().contains("products of bf16 as avx512bf16 forms them"));
        assert!(plan([1, 4], [1, 16], without, 8).to_string().contains("avx512 has no such products"));
    }
}
