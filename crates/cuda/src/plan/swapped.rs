//! Whether a grouped product takes warpgroup tensor cores with weights as the left side, its tile and its grid.

use super::grouped::{GroupedPlan, Sizes, row_tiles};
use super::wgmma::STAGES;
use crate::device::DeviceNumbers;
use crate::grouped::GroupedKernel;
use crate::launch::Grid;
use crate::wgmma::{SwappedTile, WgmmaTile};
use std::ops::RangeInclusive;

/// Rows of an expert on average that are too many for narrow tiles on `mma`, and few enough for most experts to be one tile.
const ROWS: RangeInclusive<usize> = 13..=136;
/// Rows beyond which the epilogue, which nothing runs behind, is short beside no sum of fewer columns than these.
const MANY_ROWS: usize = 100;
const MANY_COLUMNS: usize = 2560;
/// Rows of a tile at most: what a thread has registers for, and less where less will do, for more stages.
const HEIGHTS: [u16; 5] = [32, 64, 96, 128, 160];

/// None where the device or the operands have no such kernel, or another one is faster.
pub(super) fn swapped(sizes: &Sizes, device: &DeviceNumbers) -> Option<GroupedPlan> {
    let &Sizes { product, rows, experts, inner, outputs, x, ends, .. } = sizes;
    let mean = rows / experts.min(rows).max(1);
    let whole = outputs.is_multiple_of(SwappedTile::group(product));
    if device.compute_capability != (9, 0) || !sizes.engine || !ends.pieces || !whole {
        return None;
    }
    let hidden = mean <= MANY_ROWS || inner >= MANY_COLUMNS;
    if sizes.invariant || !hidden || !ROWS.contains(&mean) {
        return None;
    }
    let tile = SwappedTile { rows: height(mean), stages: STAGES[0] as u8 };
    let room = device.shared_per_block.saturating_sub(tile.other_bytes(experts));
    let stages = (room / tile.stage_bytes()).min(STAGES[0]);
    if stages < STAGES[1] {
        return None;
    }
    let tile = SwappedTile { stages: stages as u8, ..tile };
    let columns = (outputs * product.halves()).div_ceil(SwappedTile::COLUMNS);
    let tiles = row_tiles(rows, experts, tile.rows.into()).saturating_mul(columns);
    let shared = stages * tile.stage_bytes() + tile.other_bytes(experts);
    let grid = Grid::line(tiles.min(device.multiprocessors as usize), WgmmaTile::THREADS).with_shared(shared);
    let why =
        "some rows an expert: warpgroup tensor cores, weights as the left side, so that a tile costs what its rows do";
    Some(GroupedPlan { kernel: GroupedKernel::Swapped { product, format: x, tile, ends }, grid, why })
}

/// Of tiles that hold all rows of most experts: few of them have more than twice the root of the mean above it.
fn height(mean: usize) -> u16 {
    let [.., greatest] = HEIGHTS;
    HEIGHTS.into_iter().find(|&height| usize::from(height) >= mean + 2 * mean.isqrt()).unwrap_or(greatest)
}

/// Every tile of every plan.
pub(super) fn tiles() -> impl Iterator<Item = SwappedTile> {
    HEIGHTS.into_iter().map(|rows| SwappedTile { rows, stages: 4 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grouped::Stage;
    use crate::plan::grouped::tests::{down, sizes};
    use crate::plan::tests::device;
    use crate::wgmma::Ends;
    use fused_moe_conformance::cases::Operation;
    use fused_moe_conformance::{Scale, cases};
    use fused_moe_core::operation::GateUpOutput;

    fn tile(sizes: &Sizes) -> Option<SwappedTile> {
        match swapped(sizes, &device())?.kernel {
            GroupedKernel::Swapped { tile, .. } => Some(tile),
            _ => None,
        }
    }

    #[test]
    fn tiles_are_as_high_as_most_experts_have_rows() {
        let heights = |inner| {
            [1536, 2048, 4096, 8192, 12288, 16384, 20000]
                .map(|rows| tile(&Sizes { inner, ..sizes(rows) }).map(|tile| tile.rows))
        };
        assert_eq!(heights(2048), [None, Some(32), Some(64), Some(96), Some(128), None, None]);
        assert_eq!(heights(4096), [None, Some(32), Some(64), Some(96), Some(128), Some(160), None]);
        assert_eq!(tile(&down(4096)).map(|tile| tile.rows), Some(64));
    }

    /// The tile that an operation of a case takes whose operands lie in pieces of 16 bytes, as in memory of their own.
    fn tile_of(operation: &Operation) -> Option<(Stage, u16)> {
        let (stage, [t, k, h, i, experts], [x, weight, out]) = match operation {
            Operation::GateUp(case)
                if case.output == GateUpOutput::Activated && case.activation.is_gated() && !case.input_weights =>
            {
                (Stage::GateUp, case.sizes, case.dtypes)
            }
            Operation::Down(case) => (Stage::Down, case.sizes, case.dtypes),
            _ => return None,
        };
        let whole = x.size() == 2 && weight == x && h % 8 == 0 && i % 8 == 0;
        let of = if stage == Stage::GateUp {
            Sizes { inner: h, outputs: i, ..sizes(t * k) }
        } else {
            Sizes { inner: i, outputs: h, ..down(t * k) }
        };
        let ends = Ends { pieces: out == x, bias: None };
        let sizes = Sizes { experts, x, weight, ends, engine: whole, ..of };
        tile(&sizes).map(|tile| (stage, tile.rows))
    }

    #[test]
    fn the_conformance_suite_meets_every_tile() {
        let met: Vec<_> = cases(Scale::Quick).iter().filter_map(|case| tile_of(&case.operation)).collect();
        for stage in [Stage::GateUp, Stage::Down] {
            for height in HEIGHTS {
                assert!(met.contains(&(stage, height)), "{stage:?}, tiles of {height} rows");
            }
        }
    }

    #[test]
    fn lower_tiles_have_more_stages() {
        let stages = [2048, 4096, 12288].map(|rows| tile(&sizes(rows)).map(|tile| tile.stages));
        assert_eq!(stages, [Some(6), Some(5), Some(4)]);
    }

    #[test]
    fn blocks_fit_the_device() {
        for mean in [16, 40, 60, 100, 130] {
            let planned = |experts: &usize| {
                let plan = swapped(&Sizes { experts: *experts, inner: 4096, ..sizes(mean * experts) }, &device());
                assert!(plan.is_none_or(|plan| plan.grid.shared as usize <= device().shared_per_block), "{plan:?}");
                plan.is_some()
            };
            assert!((1..20_000).filter(planned).count() > 1000);
        }
    }

    #[test]
    fn what_has_no_such_kernel_goes_another_way() {
        let sizes = sizes(4096);
        assert!(tile(&sizes).is_some());
        // whole groups of 16 outputs with a gate, of 32 without
        assert!(tile(&Sizes { outputs: 720, ..sizes }).is_some());
        assert_eq!(tile(&Sizes { outputs: 712, ..sizes }), None);
        assert_eq!(tile(&Sizes { outputs: 720, ..down(4096) }), None);
        assert_eq!(tile(&Sizes { engine: false, ..sizes }), None);
        assert_eq!(tile(&Sizes { invariant: true, ..sizes }), None);
        assert_eq!(tile(&Sizes { ends: crate::wgmma::Ends { pieces: false, bias: None }, ..sizes }), None);
        for compute_capability in [(8, 0), (8, 9), (10, 0), (12, 0)] {
            assert!(swapped(&sizes, &DeviceNumbers { compute_capability, ..device() }).is_none());
        }
        assert!(swapped(&sizes, &DeviceNumbers { shared_per_block: 99 << 10, ..device() }).is_none());
    }
}
