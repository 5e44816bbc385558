//! How one token whose slots are its rows goes through its experts: two launches that stream weights through the warps' own
//! rings, the second beside the first.

use crate::device::DeviceNumbers;
use crate::launch::Grid;

/// Warps of a block, each with a ring of its own: the more, the more of the arithmetic is hidden.
const WARPS: [usize; 2] = [12, 8];
/// Columns of a row that a warp reads at once, and their bytes.
pub(crate) const SPAN: usize = 256;
const SPAN_BYTES: usize = 2 * SPAN;
/// Rows that a warp has at once.
pub(crate) const ROWS: usize = 4;
/// Bytes of all stages of gate_up: as many as keep the memory busy.
const GATE_UP_BYTES: usize = 96 << 10;
/// Stages of the ring that waits for the rows: the most that are of use, and the fewest with which it streams.
const DOWN_STAGES: [usize; 2] = [8, 3];
/// Slots that a warp finds the routes of.
const MOST_SLOTS: usize = 32;
/// What a block takes of a multiprocessor's shared memory besides what it asks for.
const OTHER_BYTES: usize = 2048;

/// What the plan follows from; formats and addresses are such that 16 bytes are read at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// K.
    pub(crate) slots: usize,
    /// H.
    pub(crate) hidden: usize,
    /// I.
    pub(crate) intermediate: usize,
    /// Rows of gate_up that make one output.
    pub(crate) halves: usize,
}

/// Warps of a block, stages of each one's ring, the grid, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RingPlan {
    pub(crate) warps: u8,
    pub(crate) stages: u8,
    pub(crate) grid: Grid,
    pub(crate) why: &'static str,
}

impl RingPlan {
    /// Warps and stages.
    pub(crate) fn ring(&self) -> [u8; 2] {
        [self.warps, self.stages]
    }
}

/// gate_up, and down with combine. None where the rows do not fit shared memory.
pub(crate) fn ring(sizes: &Sizes, device: &DeviceNumbers) -> Option<[RingPlan; 2]> {
    let &Sizes { slots, hidden, intermediate, halves } = sizes;
    let multiprocessors = (device.multiprocessors as usize).max(1);
    let rows = |count: usize, inner: usize| count.checked_mul(inner.div_ceil(SPAN))?.checked_mul(SPAN_BYTES);
    // the fewest rounds for all the device's warps decide
    let units = slots.checked_mul(intermediate)?.checked_mul(halves)?.div_ceil(ROWS);
    let time = |warps: usize| units.div_ceil(warps * multiprocessors) * warps;
    let warps = if time(WARPS[0]) * 20 <= time(WARPS[1]) * 21 { WARPS[0] } else { WARPS[1] };
    let stage_bytes = warps * ROWS * SPAN_BYTES;
    let gate_up = rows(1, hidden)?.checked_add(GATE_UP_BYTES)?;
    let products = hidden.div_ceil(multiprocessors).checked_mul(slots)?.checked_mul(4)?.checked_next_multiple_of(16)?;
    let fixed = rows(slots, intermediate)?.checked_add(products)?;
    let [most, fewest] = DOWN_STAGES;
    let stages =
        |room: usize| room.checked_sub(fixed).map(|room| (room / stage_bytes).min(most)).filter(|&n| n >= fewest);
    let both = device.shared_per_multiprocessor.checked_sub(gate_up.checked_add(2 * OTHER_BYTES)?);
    let down_stages = both.and_then(stages).or_else(|| stages(device.shared_per_block.checked_sub(OTHER_BYTES)?))?;
    let fits = slots <= MOST_SLOTS && gate_up.checked_add(OTHER_BYTES)? <= device.shared_per_block;
    let plan = |stages: usize, shared, why| {
        let grid = Grid::line(multiprocessors, 32 * warps as u32).with_shared(shared);
        RingPlan { warps: warps as u8, stages: stages as u8, grid, why }
    };
    fits.then(|| {
        [
            plan(
                GATE_UP_BYTES / stage_bytes,
                gate_up,
                "one token: every block finds the experts, warps stream rows of weights",
            ),
            plan(
                down_stages,
                fixed + down_stages * stage_bytes,
                "one token: down's weights come while gate_up still runs",
            ),
        ]
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::device;

    /// Warps, and the stages of both.
    fn stages(slots: usize, hidden: usize, intermediate: usize) -> Option<(u8, [u8; 2])> {
        let plans = ring(&Sizes { slots, hidden, intermediate, halves: 2 }, &device())?;
        Some((plans[0].warps, plans.map(|plan| plan.stages)))
    }

    #[test]
    fn the_second_launch_takes_the_room_that_the_first_one_leaves() {
        for [slots, hidden, intermediate] in [[8, 2048, 768], [4, 2880, 2880], [8, 2816, 704], [1, 8, 8]] {
            let plans = ring(&Sizes { slots, hidden, intermediate, halves: 2 }, &device()).unwrap();
            let room: u32 = plans.iter().map(|plan| plan.grid.shared + 2048).sum();
            assert!(room as usize <= device().shared_per_multiprocessor, "{plans:?}");
            assert!(plans[1].stages >= 3);
        }
        assert_eq!(stages(8, 7168, 2048), Some((8, [6, 5])));
        assert_eq!(stages(8, 2048, 1024), Some((8, [6, 6])));
        assert_eq!(stages(8, 2048, 768), Some((12, [4, 4])));
    }

    #[test]
    fn rows_that_do_not_fit_go_another_way() {
        assert_eq!(stages(33, 64, 64), None);
        assert_eq!(stages(8, 2048, 16384), None);
        assert_eq!(stages(1, 131_072, 64), None);
        assert_eq!(stages(8, usize::MAX, usize::MAX), None);
    }
}
