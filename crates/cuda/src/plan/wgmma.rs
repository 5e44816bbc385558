//! Whether a grouped product takes warpgroup tensor cores, its tile and its grid.

use super::grouped::{GroupedPlan, Sizes, row_tiles};
use crate::device::DeviceNumbers;
use crate::grouped::{GroupedKernel, Stage};
use crate::launch::Grid;
use crate::wgmma::WgmmaTile;
use fused_moe_core::problem::GroupedBackwardProblem;

/// Rows of an expert on average from which even a tile of 64 rows is no slower than a narrower one on `mma`.
const SOME_ROWS: usize = 13;
/// Rows of an expert from which tiles of 128 rows make up for how many of the last one's are empty, where so few experts
/// at most have such a last one.
const MANY_ROWS: usize = 385;
const FEW_EXPERTS: usize = 48;
/// Rows of an expert from which pairs of tiles of 128 rows make up for that where experts are more.
const PAIRED_ROWS: usize = 448;
/// Rows of an expert from which the second tile of a last pair is seldom missed.
pub(super) const VERY_MANY_ROWS: usize = 768;
/// Weight rows of a tile: what there is a product for.
const WIDTHS: [u16; 4] = [128, 192, 240, 256];
/// Those that are whole boxes of 64, and those of which each of a pair brings half.
const BOXES: [u16; 3] = [128, 192, 256];
const PAIRED_BOXES: [u16; 2] = [128, 256];
/// Stages beyond which more do not help, and below which copies are not hidden.
pub(super) const STAGES: [usize; 2] = [8, 3];

/// How a tile is cut, and who shares it.
#[derive(Clone, Copy)]
struct Form {
    rows: u16,
    widest: u16,
    /// Whether two blocks with neighbouring rows share its weight rows.
    paired: bool,
    /// Whether two warpgroups share it.
    shared: bool,
    why: &'static str,
}

const SHORT: Form = Form {
    rows: 64,
    widest: 256,
    paired: false,
    shared: false,
    why: "some rows an expert: warpgroup tensor cores, tiles of 64 rows, little of which is empty",
};
const TALL: Form = Form {
    rows: 128,
    widest: 192,
    paired: false,
    shared: false,
    why: "few experts with many rows: warpgroup tensor cores, tiles of 128 rows, each weight used the most",
};
const SHORT_PAIRED: Form = Form {
    rows: 64,
    widest: 256,
    paired: true,
    shared: false,
    why: "very many rows an expert, gate and up stored: warpgroup tensor cores, tiles of 64 rows, pairs of which share weights",
};
const PAIRED: Form = Form {
    rows: 128,
    widest: 256,
    paired: true,
    shared: true,
    why: "many rows an expert: warpgroup tensor cores, tiles of 128 rows, pairs of which share weights on their way",
};

impl Form {
    /// `mean` rows of an expert.
    fn of(sizes: &Sizes, mean: usize) -> Self {
        let both = sizes.product.gated && sizes.product.activation.is_none();
        match mean {
            // twice as many outputs find no room in registers beside the sums of the next tile
            VERY_MANY_ROWS.. if both => SHORT_PAIRED,
            VERY_MANY_ROWS.. => PAIRED,
            PAIRED_ROWS.. if sizes.experts > FEW_EXPERTS && !both => PAIRED,
            // down's short inner dimension leaves little time between its long epilogues
            MANY_ROWS.. if sizes.experts <= FEW_EXPERTS && sizes.product.stage == Stage::GateUp => TALL,
            _ => SHORT,
        }
    }

    /// Widths of a tile whose sums run over the weights' rows.
    fn boxes(self) -> &'static [u16] {
        if self.paired { &PAIRED_BOXES } else { &BOXES }
    }

    fn tile(self, columns: u16, stages: usize) -> WgmmaTile {
        WgmmaTile { rows: self.rows, columns, stages: stages as u8, paired: self.paired, shared: self.shared }
    }
}

/// None where the device or the operands have no such kernel, or another one is faster.
pub(super) fn wgmma(sizes: &Sizes, device: &DeviceNumbers) -> Option<GroupedPlan> {
    let &Sizes { product, rows, experts, outputs, x, ends, .. } = sizes;
    let mean = rows / experts.min(rows).max(1);
    if device.compute_capability != (9, 0) || !sizes.engine || sizes.invariant || mean < SOME_ROWS {
        return None;
    }
    let form = Form::of(sizes, mean);
    let cluster = if form.paired { 2 } else { 1 };
    let tiles = |columns: u16| {
        let columns = (outputs * product.halves()).div_ceil(columns.into());
        row_tiles(rows, experts, usize::from(form.rows) * cluster).saturating_mul(columns)
    };
    let multiprocessors = device.multiprocessors as usize;
    let widest = if tiles(form.widest) * cluster < multiprocessors { WIDTHS[0] } else { form.widest };
    let columns = width(outputs, product.halves(), &WIDTHS, widest);
    let (tile, grid) = ring(form.tile(columns, STAGES[0]), tiles(columns), (product.gather, experts), device)?;
    Some(GroupedPlan { kernel: GroupedKernel::Wgmma { product, format: x, tile, ends }, grid, why: form.why })
}

/// The tile and grid of a gradient of rows, whose weights come in whole boxes of columns; `gather`: whether d is gathered.
pub(super) fn backward_rows(
    problem: &GroupedBackwardProblem,
    gather: bool,
    device: &DeviceNumbers,
) -> Option<(WgmmaTile, Grid)> {
    let &GroupedBackwardProblem { rows, experts, inputs, .. } = problem;
    let mean = rows / experts.min(rows).max(1);
    if device.compute_capability != (9, 0) || mean < SOME_ROWS {
        return None;
    }
    let form = if mean < VERY_MANY_ROWS { SHORT } else { PAIRED };
    let cluster = if form.paired { 2 } else { 1 };
    let tiles = |columns: u16| {
        row_tiles(rows, experts, usize::from(form.rows) * cluster).saturating_mul(inputs.div_ceil(columns.into()))
    };
    let [narrow, .., wide] = BOXES;
    let widest = if tiles(wide) * cluster < device.multiprocessors as usize { narrow } else { wide };
    let columns = width(inputs, 1, form.boxes(), widest);
    ring(form.tile(columns, STAGES[0]), tiles(columns), (gather, experts), device)
}

/// A tile with as many stages as there is room for, at most those it has, and a grid for so many tiles or pairs of them;
/// None where stages would be too few.
fn ring(
    tile: WgmmaTile,
    tiles: usize,
    (gather, experts): (bool, usize),
    device: &DeviceNumbers,
) -> Option<(WgmmaTile, Grid)> {
    let room = device.shared_per_block.saturating_sub(tile.other_bytes(gather, experts));
    let stages = (room / tile.stage_bytes()).min(tile.stages.into());
    if stages < STAGES[1] {
        return None;
    }
    let tile = WgmmaTile { stages: stages as u8, ..tile };
    let shared = stages * tile.stage_bytes() + tile.other_bytes(gather, experts);
    let blocks = tiles.min((device.multiprocessors as usize / tile.cluster()).max(1)) * tile.cluster();
    Some((tile, Grid::line(blocks, WgmmaTile::THREADS).with_shared(shared)))
}

/// Of tiles that need at most one more column of them than the widest one does, the one with the least products; of equal
/// ones the widest.
fn width(outputs: usize, halves: usize, widths: &[u16], widest: u16) -> u16 {
    let columns = |width: u16| outputs.div_ceil(usize::from(width) / halves).max(1);
    let few = |&width: &u16| width <= widest && columns(width) <= columns(widest) + 1;
    let widths = widths.iter().copied().rev().filter(few);
    widths.min_by_key(|&width| columns(width) * usize::from(width)).unwrap_or(widest)
}

/// Every tile of every plan of a gradient of rows.
pub(super) fn backward_tiles() -> impl Iterator<Item = WgmmaTile> {
    [SHORT, PAIRED].into_iter().flat_map(|form| form.boxes().iter().map(move |&columns| form.tile(columns, 4)))
}

/// Every tile of every plan of a product.
pub(super) fn tiles() -> Vec<WgmmaTile> {
    let short = WIDTHS.map(|columns| SHORT.tile(columns, 4)).into_iter();
    let tall = WIDTHS.into_iter().filter(|&columns| columns <= TALL.widest).map(|columns| TALL.tile(columns, 5));
    let paired = [SHORT_PAIRED, PAIRED].into_iter().flat_map(|form| WIDTHS.map(|columns| form.tile(columns, 4)));
    short.chain(tall).chain(paired).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grouped::Product;
    use crate::plan::grouped::tests::{down, sizes};
    use crate::plan::tests::device;

    fn plan(sizes: &Sizes) -> Option<(WgmmaTile, Grid)> {
        let plan = wgmma(sizes, &device())?;
        match plan.kernel {
            GroupedKernel::Wgmma { tile, .. } => Some((tile, plan.grid)),
            _ => None,
        }
    }

    fn tile(sizes: &Sizes) -> Option<(u16, u16)> {
        plan(sizes).map(|(tile, _)| (tile.rows, tile.columns))
    }

    #[test]
    fn pairs_share_weights_where_rows_are_many() {
        let paired = |rows| plan(&sizes(rows)).map(|(tile, _)| tile.paired);
        assert_eq!([1536, 4096, 65536, 131_072].map(paired), [None, Some(false), Some(true), Some(true)]);
        let both = |rows| Sizes { product: Product { activation: None, ..sizes(rows).product }, ..sizes(rows) };
        let forms = [sizes(131_072), both(131_072), down(131_072)];
        assert_eq!(forms.map(|sizes| plan(&sizes).map(|(tile, _)| tile.shared)), [Some(true), Some(false), Some(true)]);
        let paired = [65536, 131_072].map(|rows| plan(&both(rows)).map(|(tile, _)| tile.paired));
        assert_eq!(paired, [Some(false), Some(true)]);
        let few = |rows| plan(&Sizes { experts: 8, ..down(rows) }).map(|(tile, _)| tile.paired);
        assert_eq!([2048, 4096, 8192].map(few), [Some(false), Some(false), Some(true)]);
        // whole pairs of blocks
        let odd = DeviceNumbers { multiprocessors: 131, ..device() };
        let grid = wgmma(&sizes(131_072), &odd).map(|plan| plan.grid.blocks);
        assert_eq!(grid, Some([130, 1, 1]));
    }

    #[test]
    fn few_experts_take_tall_tiles_before_pairs() {
        let few = |rows| Sizes { experts: 8, ..sizes(rows) };
        assert_eq!(
            [2048, 4096, 8192].map(|rows| tile(&few(rows))),
            [Some((64, 256)), Some((128, 192)), Some((128, 256))]
        );
        assert_eq!(tile(&Sizes { experts: 8, ..down(4096) }), Some((64, 256)));
    }

    #[test]
    fn tiles_are_no_wider_than_their_number_asks_for() {
        // 704 outputs: 6 tiles of 120 rather than 5 of 128 and one of 64
        assert_eq!(tile(&Sizes { outputs: 704, ..sizes(16384) }), Some((64, 240)));
        // 2880: 24 of 120 rather than 22 of 128 and one of 64
        assert_eq!(tile(&Sizes { outputs: 2880, ..sizes(16384) }), Some((64, 240)));
        assert_eq!(tile(&sizes(16384)), Some((64, 256)));
        assert_eq!(tile(&Sizes { outputs: 2880, ..down(65536) }), Some((128, 240)));
        // one expert with few rows: more blocks than tiles of 256 make
        assert_eq!(tile(&Sizes { experts: 1, ..sizes(256) }), Some((64, 128)));
    }

    #[test]
    fn what_has_no_such_kernel_goes_another_way() {
        let sizes = sizes(65536);
        assert_eq!(tile(&Sizes { engine: false, ..sizes }), None);
        assert_eq!(tile(&Sizes { invariant: true, ..sizes }), None);
        for compute_capability in [(8, 0), (8, 9), (10, 0), (12, 0)] {
            let device = DeviceNumbers { compute_capability, ..device() };
            assert!(wgmma(&sizes, &device).is_none());
        }
        let device = DeviceNumbers { shared_per_block: 99 << 10, ..device() };
        assert!(wgmma(&sizes, &device).is_none());
    }

    #[test]
    fn every_tile_is_one_of_those_that_are_compiled_in_tests() {
        for rows in [2000, 20_000, 100_000, 200_000] {
            for outputs in [8, 64, 100, 704, 768, 1000, 2880, 14336] {
                for sizes in [sizes(rows), Sizes { experts: 8, ..sizes(rows) }, down(rows)] {
                    let plan = plan(&Sizes { outputs, ..sizes }).map(|(tile, _)| WgmmaTile { stages: 0, ..tile });
                    let known = tiles().iter().any(|&known| plan == Some(WgmmaTile { stages: 0, ..known }));
                    assert!(known, "{rows} {outputs}: {plan:?}");
                }
            }
        }
    }
}
