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
/// Weight rows of a tile: what there is a product for.
const WIDTHS: [u16; 4] = [128, 192, 240, 256];
/// Those that are whole boxes of 64.
const BOXES: [u16; 3] = [128, 192, 256];
/// Stages beyond which more do not help, and below which copies are not hidden.
const STAGES: [usize; 2] = [8, 3];

/// None where the device or the operands have no such kernel, or another one is faster.
pub(super) fn wgmma(sizes: &Sizes, device: &DeviceNumbers) -> Option<GroupedPlan> {
    let &Sizes { product, rows, experts, outputs, x, ends, .. } = sizes;
    let mean = rows / experts.min(rows).max(1);
    if device.compute_capability != (9, 0) || !sizes.engine || sizes.invariant || mean < SOME_ROWS {
        return None;
    }
    // down's short inner dimension leaves little time between its long epilogues
    let tall = product.stage == Stage::GateUp && mean >= MANY_ROWS && experts <= FEW_EXPERTS;
    let (tile_rows, widest, why) = if tall {
        (
            128,
            192,
            "few experts with very many rows: warpgroup tensor cores, tiles of 128 rows, each weight used the most",
        )
    } else {
        (64, 256, "many rows an expert: warpgroup tensor cores, tiles of 64 rows, little of which is empty")
    };
    let tiles = |columns: u16| {
        row_tiles(rows, experts, tile_rows.into()).saturating_mul((outputs * product.halves()).div_ceil(columns.into()))
    };
    let multiprocessors = device.multiprocessors as usize;
    let widest = if tiles(widest) < multiprocessors { WIDTHS[0] } else { widest };
    let columns = width(outputs, product.halves(), &WIDTHS, widest);
    let (tile, grid) = ring([tile_rows, columns], tiles(columns), (product.gather, experts), device)?;
    Some(GroupedPlan { kernel: GroupedKernel::Wgmma { product, format: x, tile, ends }, grid, why })
}

/// The tile and grid of a gradient of rows, whose weights come in whole boxes of columns; `gather`: whether d is gathered.
pub(super) fn backward_rows(
    problem: &GroupedBackwardProblem,
    gather: bool,
    device: &DeviceNumbers,
) -> Option<(WgmmaTile, Grid)> {
    let &GroupedBackwardProblem { rows, experts, inputs, .. } = problem;
    if device.compute_capability != (9, 0) || rows / experts.min(rows).max(1) < SOME_ROWS {
        return None;
    }
    let tiles = |columns: u16| row_tiles(rows, experts, 64).saturating_mul(inputs.div_ceil(columns.into()));
    let [narrow, .., wide] = BOXES;
    let widest = if tiles(wide) < device.multiprocessors as usize { narrow } else { wide };
    let columns = width(inputs, 1, &BOXES, widest);
    ring([64, columns], tiles(columns), (gather, experts), device)
}

/// A tile with as many stages as there is room for, and a grid for so many; None where stages would be too few.
fn ring(
    [rows, columns]: [u16; 2],
    tiles: usize,
    (gather, experts): (bool, usize),
    device: &DeviceNumbers,
) -> Option<(WgmmaTile, Grid)> {
    let tile = WgmmaTile { rows, columns, stages: STAGES[0] as u8 };
    let room = device.shared_per_block.saturating_sub(tile.other_bytes(gather, experts));
    let stages = (room / tile.stage_bytes()).min(STAGES[0]);
    if stages < STAGES[1] {
        return None;
    }
    let tile = WgmmaTile { stages: stages as u8, ..tile };
    let shared = stages * tile.stage_bytes() + tile.other_bytes(gather, experts);
    let blocks = tiles.min(device.multiprocessors as usize);
    Some((tile, Grid::line(blocks, WgmmaTile::THREADS).with_shared(shared)))
}

/// The narrowest tile that needs no more columns of tiles than the widest one does.
fn width(outputs: usize, halves: usize, widths: &[u16], widest: u16) -> u16 {
    let tiles = outputs.div_ceil(usize::from(widest) / halves).max(1);
    let needed = outputs.div_ceil(tiles) * halves;
    widths.iter().copied().find(|&width| usize::from(width) >= needed).unwrap_or(widest)
}

/// Every tile of every plan of a gradient of rows.
pub(super) fn backward_tiles() -> impl Iterator<Item = WgmmaTile> {
    BOXES.into_iter().map(|columns| WgmmaTile { rows: 64, columns, stages: 4 })
}

/// Every tile of every plan of a product.
pub(super) fn tiles() -> Vec<WgmmaTile> {
    let tile = |rows, columns, stages| WgmmaTile { rows, columns, stages };
    let small = WIDTHS.map(|columns| tile(64, columns, 4));
    let large = WIDTHS.into_iter().filter(|&columns| columns <= 192).map(|columns| tile(128, columns, 5));
    small.into_iter().chain(large).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::grouped::tests::{down, sizes};
    use crate::plan::tests::device;

    fn tile(sizes: &Sizes) -> Option<(u16, u16)> {
        match wgmma(sizes, &device())?.kernel {
            GroupedKernel::Wgmma { tile, .. } => Some((tile.rows, tile.columns)),
            _ => None,
        }
    }

    #[test]
    fn tiles_grow_with_the_rows_of_an_expert() {
        assert_eq!([1536, 4096, 65536].map(|rows| tile(&sizes(rows))), [None, Some((64, 256)), Some((64, 256))]);
        let few = |rows| Sizes { experts: 8, ..sizes(rows) };
        assert_eq!([2048, 4096].map(|rows| tile(&few(rows))), [Some((64, 256)), Some((128, 192))]);
        assert_eq!(tile(&Sizes { experts: 8, ..down(65536) }), Some((64, 256)));
    }

    #[test]
    fn tiles_are_no_wider_than_their_number_asks_for() {
        // 704 outputs: 6 tiles of 120 rather than 5 of 128 and one of 64
        assert_eq!(tile(&Sizes { outputs: 704, ..sizes(16384) }), Some((64, 240)));
        assert_eq!(tile(&Sizes { outputs: 2880, ..down(65536) }), Some((64, 240)));
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
        for rows in [2000, 20_000, 100_000] {
            for outputs in [8, 64, 100, 704, 768, 1000, 2880, 14336] {
                for sizes in [sizes(rows), Sizes { experts: 8, ..sizes(rows) }, down(rows)] {
                    let plan = tile(&Sizes { outputs, ..sizes });
                    let known = tiles().iter().any(|known| plan == Some((known.rows, known.columns)));
                    assert!(known, "{rows} {outputs}: {plan:?}");
                }
            }
        }
    }
}
