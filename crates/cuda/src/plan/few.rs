//! How a few tokens whose slots all have experts that are here go through them: two launches, as with one token, that stream
//! weights through the warps' own rings to the tensor cores.

use crate::device::DeviceNumbers;
use crate::launch::Grid;
use std::ops::RangeInclusive;

/// Tokens, which are the columns of a product of tensor cores.
const TOKENS: RangeInclusive<usize> = 2..=8;
/// What lists in shared memory have room for; see `include/few.cuh`.
const MOST_SLOTS: usize = 128;
const MOST_EXPERTS: usize = 512;
/// Slots that a warp finds for a token.
const MOST_CHOICES: usize = 32;
/// Columns that a warp takes of a row at once.
const CHUNK: usize = 64;
/// Warps of a block of gate_up and of down: no fewer than tokens, and of gate_up so few that what their sums take leaves
/// room for another such block: only then does the driver leave the second launch its room beside the first.
const WARPS: [RangeInclusive<usize>; 2] = [8..=15, 8..=16];
/// Registers of a lane for a chunk of x or of 16 rows of weights, and of gate_up and down those that it needs besides.
const CHUNK_REGISTERS: [usize; 2] = [8, 16];
const OTHER_REGISTERS: [usize; 2] = [40, 48];
/// Registers of a quarter of a multiprocessor.
const REGISTERS: usize = 16384;
/// Columns of a row are I, which lie by this many between the launches.
pub(crate) const COLUMNS: usize = 32;
/// Bytes of all stages of gate_up: as many as keep the memory busy.
const GATE_UP_BYTES: usize = 96 << 10;
/// Stages of a ring: the most that are of use, and the fewest with which it streams.
const STAGES: [usize; 2] = [8, 3];
/// What a block takes of a multiprocessor's shared memory besides what it asks for.
const OTHER_BYTES: usize = 4608;

/// What the plan follows from; formats and addresses are such that 16 bytes are read at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// T.
    pub(crate) tokens: usize,
    /// K.
    pub(crate) top_k: usize,
    /// E.
    pub(crate) experts: usize,
    /// H.
    pub(crate) hidden: usize,
    /// I.
    pub(crate) intermediate: usize,
}

/// Warps of a block, chunks of a row that each has, stages of its ring, and rows of a stage by 8.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct FewTile {
    pub(crate) warps: u8,
    pub(crate) chunks: u8,
    pub(crate) stages: u8,
    pub(crate) groups: u8,
}

impl FewTile {
    /// What the text of its kernels is specialised by.
    pub(crate) fn defines(self) -> [(&'static str, String); 3] {
        let Self { warps, stages, groups, .. } = self;
        [("WARPS", warps), ("STAGES", stages), ("GROUPS", groups)].map(|(name, n)| (name, n.to_string()))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FewPlan {
    pub(crate) tile: FewTile,
    pub(crate) grid: Grid,
    pub(crate) why: &'static str,
}

/// gate_up, and down with combine. None where lists, registers or shared memory have no room for both at once, or another way
/// is faster.
pub(crate) fn few(sizes: &Sizes, device: &DeviceNumbers) -> Option<[FewPlan; 2]> {
    let &Sizes { tokens, top_k, experts, hidden, intermediate } = sizes;
    let slots = tokens.checked_mul(top_k)?;
    let listed = TOKENS.contains(&tokens) && slots <= MOST_SLOTS && experts <= MOST_EXPERTS && top_k <= MOST_CHOICES;
    let multiprocessors = (device.multiprocessors as usize).max(1);
    let columns = hidden.div_ceil(multiprocessors);

    // both launches have their registers on one multiprocessor
    let registers = |warps: usize| REGISTERS / (32 * (2 * warps).div_ceil(4)) / 8 * 8;
    let ([x, w], [more_up, more_down]) = (CHUNK_REGISTERS, OTHER_REGISTERS);
    let [up_warps, down_warps] = WARPS;
    let up = tile(hidden, 2, up_warps, |warps, chunks| x * chunks + more_up <= registers(warps))?;
    let up = FewTile { stages: stages(up, GATE_UP_BYTES)?, ..up };
    let up_bytes = parts(up) + ring(up);

    let eights = groups(columns);
    let fits = |warps: usize, _| w * usize::from(eights.div_ceil(2)) + more_down <= registers(warps);
    let down = tile(intermediate, eights, down_warps, fits)?;
    // for the most tokens, so that all have the same kernels
    let most = TOKENS.end().checked_mul(top_k)?.min(MOST_SLOTS);
    let products = most.checked_mul(columns)?.checked_mul(4)?;
    let fixed = parts(down).checked_add(products)?;
    let room = device.shared_per_multiprocessor.checked_sub(up_bytes + 2 * OTHER_BYTES)?.checked_sub(fixed)?;
    let down = FewTile { stages: stages(down, room)?, chunks: 0, ..down };

    let plan = |tile: FewTile, shared, why| {
        let grid = Grid::line(multiprocessors, 32 * u32::from(tile.warps)).with_shared(shared);
        FewPlan { tile, grid, why }
    };
    let fits = up_bytes + OTHER_BYTES <= device.shared_per_block;
    (listed && fits).then(|| {
        [
            plan(up, up_bytes, "a few tokens: every block finds the experts, tokens are columns of tensor cores"),
            plan(down, fixed + ring(down), "a few tokens: down's weights come while gate_up still runs"),
        ]
    })
}

/// The most warps that share rows of so many columns about as evenly as can be; stages are still to be found.
fn tile(
    columns: usize,
    groups: u8,
    range: RangeInclusive<usize>,
    fits: impl Fn(usize, usize) -> bool,
) -> Option<FewTile> {
    let chunks = |warps: usize| columns.div_ceil(CHUNK).div_ceil(warps).max(1);
    let fitting = || range.clone().filter(|&warps| fits(warps, chunks(warps)));
    let even = fitting().map(|warps| warps * chunks(warps)).min()?;
    let warps = fitting().rfind(|&warps| warps * chunks(warps) - even <= even / 32)?;
    Some(FewTile { warps: warps as u8, chunks: chunks(warps).try_into().unwrap_or(u8::MAX), stages: 0, groups })
}

/// Rows of a stage, by 8, with which a block's columns leave the fewest of it empty.
fn groups(columns: usize) -> u8 {
    let eights = columns.div_ceil(8).max(1);
    if eights.div_ceil(3) * 3 < eights.div_ceil(2) * 2 { 3 } else { 2 }
}

/// Bytes of two tiles' sums.
fn parts(tile: FewTile) -> usize {
    2 * 4 * 64 * usize::from(tile.groups) * usize::from(tile.warps)
}

/// Bytes of a stage of all warps.
fn stage(tile: FewTile) -> usize {
    usize::from(tile.warps) * usize::from(tile.groups) * 8 * CHUNK * 2
}

fn ring(tile: FewTile) -> usize {
    stage(tile) * usize::from(tile.stages)
}

/// As many stages as there is room for.
fn stages(tile: FewTile, room: usize) -> Option<u8> {
    let [most, fewest] = STAGES;
    let stages = (room / stage(tile)).min(most);
    (stages >= fewest).then_some(stages as u8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::device;

    fn sizes(tokens: usize, top_k: usize, hidden: usize, intermediate: usize) -> Sizes {
        Sizes { tokens, top_k, experts: 128, hidden, intermediate }
    }

    fn tiles(tokens: usize, top_k: usize, hidden: usize, intermediate: usize) -> Option<[[u8; 4]; 2]> {
        let sizes = sizes(tokens, top_k, hidden, intermediate);
        let plans = few(&sizes, &device())?;
        let room: u32 = plans.iter().map(|plan| plan.grid.shared + OTHER_BYTES as u32).sum();
        assert!(room as usize <= device().shared_per_multiprocessor, "{plans:?}");
        assert!(2 * (plans[0].grid.shared as usize + OTHER_BYTES) <= device().shared_per_multiprocessor);
        Some(plans.map(|FewPlan { tile, .. }| [tile.warps, tile.chunks, tile.stages, tile.groups]))
    }

    #[test]
    fn warps_share_rows_and_both_launches_have_room() {
        assert_eq!(tiles(8, 8, 2048, 768), Some([[11, 3, 4, 2], [12, 0, 4, 2]]));
        assert_eq!(tiles(8, 4, 2880, 2880), Some([[15, 3, 3, 2], [9, 0, 3, 3]]));
        assert_eq!(tiles(8, 2, 4096, 14336), Some([[8, 8, 6, 2], [16, 0, 3, 2]]));
        assert_eq!(tiles(2, 1, 8, 8), Some([[8, 1, 6, 2], [8, 0, 6, 2]]));
    }

    #[test]
    fn what_has_no_room_goes_another_way() {
        assert_eq!(tiles(1, 8, 2048, 768), None);
        assert_eq!(tiles(9, 8, 2048, 768), None);
        assert_eq!(tiles(8, 17, 2048, 768), None);
        assert_eq!(tiles(2, 33, 2048, 768), None);
        assert_eq!(tiles(8, 8, 7168, 2048), None);
        // too few stages of down
        assert_eq!(tiles(8, 8, 2816, 704), None);
        assert_eq!(tiles(8, 8, usize::MAX, usize::MAX), None);
    }
}
