//! Slots grouped by expert.

use crate::{NO_EXPERT, NO_ROW, Status};
use std::ops::Range;

/// Operands of [`permute`].
#[derive(Clone, Debug)]
pub struct Permute<'a> {
    /// Expert of every slot, `[R]`.
    pub ids: &'a [u32],
    /// E.
    pub experts: usize,
    /// The experts that are here, within `0..E`; slots of the others are left out.
    pub local: Range<usize>,
}

/// What [`permute`] returns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permutation {
    /// `[R]`: the slot of a row; [`NO_ROW`] from `offsets[E]` on.
    pub row_slot: Vec<u32>,
    /// `[R]`: the row of a slot; [`NO_ROW`] for a slot that was left out.
    pub slot_row: Vec<u32>,
    /// `[E + 1]`: the rows of expert e are `offsets[e]..offsets[e+1]`.
    pub offsets: Vec<u32>,
    /// What was noticed.
    pub status: Status,
}

impl Permutation {
    /// Rows of each expert, `[E]`.
    pub fn counts(&self) -> Vec<u32> {
        self.offsets.windows(2).map(|pair| pair[1] - pair[0]).collect()
    }
}

/// Stable counting sort of the slots by expert: rows ascend by expert, and by slot within an expert.
///
/// ```text
/// T = 3, K = 2, E = 4          slot       0  1  2  3  4  5
///                              ids        2  0  0  2  -  2        - is NO_EXPERT
///
///                              row        0  1  2  3  4  5
/// expert of the row                       0  0  2  2  2
///                              row_slot   1  2  0  3  5  -        - is NO_ROW
///                              slot_row   2  0  1  3  -  4
///                              offsets    0  2  2  5  5           expert 1 and 3: no rows
/// ```
///
/// A slot is left out, having `slot_row = NO_ROW`, if its id is [`NO_EXPERT`], outside `local`, or `>= E`; the last raises
/// [`Status::EXPERT_OUT_OF_RANGE`]. Experts that are not local have empty ranges. Rows past `offsets[E]` have
/// `row_slot = NO_ROW`.
///
/// ```
/// use fused_moe_core::{NO_EXPERT, NO_ROW, reference::{Permute, permute}};
/// let permutation = permute(&Permute { ids: &[2, 0, 0, 2, NO_EXPERT, 2], experts: 4, local: 0..4 });
/// assert_eq!(permutation.row_slot, [1, 2, 0, 3, 5, NO_ROW]);
/// assert_eq!(permutation.slot_row, [2, 0, 1, 3, NO_ROW, 4]);
/// assert_eq!(permutation.offsets, [0, 2, 2, 5, 5]);
/// ```
pub fn permute(op: &Permute<'_>) -> Permutation {
    let mut row_slot = vec![NO_ROW; op.ids.len()];
    let mut slot_row = vec![NO_ROW; op.ids.len()];
    let mut offsets = vec![0];
    let mut row = 0;
    for expert in 0..op.experts {
        if op.local.contains(&expert) {
            for (slot, &id) in op.ids.iter().enumerate() {
                if id as usize == expert {
                    row_slot[row] = slot as u32;
                    slot_row[slot] = row as u32;
                    row += 1;
                }
            }
        }
        offsets.push(row as u32);
    }
    let mut status = Status::OK;
    for &id in op.ids {
        if id as usize >= op.experts && id != NO_EXPERT {
            status |= Status::EXPERT_OUT_OF_RANGE;
        }
    }
    Permutation { row_slot, slot_row, offsets, status }
}

/// Up to `tile_rows` consecutive rows of one expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Whose rows they are.
    pub expert: u32,
    /// The first of them, a row of the permutation.
    pub first_row: u32,
    /// How many, at least 1.
    pub rows: u32,
}

/// The tiles that a grouped matrix product runs over: the rows of each expert cut into pieces of `tile_rows`, the last
/// piece shorter; in the order of the rows. Rows are not padded, and an expert without rows has no tile.
///
/// - `offsets`: `[E + 1]`, of a [`Permutation`]
/// - `tile_rows`: at least 1; 0 counts as 1
///
/// There are at most `R / tile_rows + E` tiles, and at most R.
///
/// ```
/// use fused_moe_core::reference::{Tile, tile_schedule};
/// assert_eq!(tile_schedule(&[0, 3, 3, 4], 2), [
///     Tile { expert: 0, first_row: 0, rows: 2 },
///     Tile { expert: 0, first_row: 2, rows: 1 },
///     Tile { expert: 2, first_row: 3, rows: 1 },
/// ]);
/// ```
pub fn tile_schedule(offsets: &[u32], tile_rows: u32) -> Vec<Tile> {
    let tile_rows = tile_rows.max(1);
    let mut tiles = Vec::new();
    for (expert, range) in offsets.windows(2).enumerate() {
        let mut first_row = range[0];
        while first_row < range[1] {
            let rows = tile_rows.min(range[1] - first_row);
            tiles.push(Tile { expert: expert as u32, first_row, rows });
            first_row += rows;
        }
    }
    tiles
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(ids: &[u32], experts: usize) -> Permutation {
        permute(&Permute { ids, experts, local: 0..experts })
    }

    #[test]
    fn stable_within_an_expert() {
        let permutation = of(&[1, 0, 1, 1, 0], 3);
        assert_eq!(permutation.row_slot, [1, 4, 0, 2, 3]);
        assert_eq!(permutation.slot_row, [2, 0, 3, 4, 1]);
        assert_eq!(permutation.offsets, [0, 2, 5, 5]);
        assert_eq!(permutation.counts(), [2, 3, 0]);
        assert!(permutation.status.is_ok());
    }

    #[test]
    fn all_on_one_expert_and_no_slot_at_all() {
        assert_eq!(of(&[2; 4], 4).offsets, [0, 0, 0, 4, 4]);
        assert_eq!(of(&[2; 4], 4).row_slot, [0, 1, 2, 3]);
        assert_eq!(of(&[0; 3], 1).offsets, [0, 3]);
        let empty = of(&[], 3);
        assert_eq!(empty.offsets, [0; 4]);
        assert!(empty.row_slot.is_empty() && empty.slot_row.is_empty());
    }

    #[test]
    fn bad_ids_and_no_expert_are_left_out() {
        let bad = of(&[1, 4, 0, NO_EXPERT], 4);
        assert_eq!(bad.slot_row, [1, NO_ROW, 0, NO_ROW]);
        assert_eq!(bad.row_slot, [2, 0, NO_ROW, NO_ROW]);
        assert_eq!(bad.offsets, [0, 1, 2, 2, 2]);
        assert_eq!(bad.status, Status::EXPERT_OUT_OF_RANGE);
        assert!(of(&[NO_EXPERT], 4).status.is_ok());
    }

    #[test]
    fn local_range() {
        let local = permute(&Permute { ids: &[0, 1, 2, 3, 2, 1], experts: 4, local: 1..3 });
        assert_eq!(local.offsets, [0, 0, 2, 4, 4]);
        assert_eq!(local.row_slot, [1, 5, 2, 4, NO_ROW, NO_ROW]);
        assert_eq!(local.slot_row, [NO_ROW, 0, 2, NO_ROW, 3, 1]);
        assert!(local.status.is_ok());
        assert_eq!(permute(&Permute { ids: &[0, 1], experts: 2, local: 1..1 }).offsets, [0; 3]);
    }

    #[test]
    fn tiles() {
        let tile = |expert, first_row, rows| Tile { expert, first_row, rows };
        assert_eq!(tile_schedule(&[0, 4, 4, 9], 4), [tile(0, 0, 4), tile(2, 4, 4), tile(2, 8, 1)]);
        assert_eq!(tile_schedule(&[0, 2], 100), [tile(0, 0, 2)]);
        assert_eq!(tile_schedule(&[0, 2], 0), [tile(0, 0, 1), tile(0, 1, 1)]);
        assert!(tile_schedule(&[0, 0, 0], 16).is_empty());
    }
}
