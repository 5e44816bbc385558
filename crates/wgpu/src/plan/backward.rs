//! How gradients are carried out.

use super::windows::windows;
use std::ops::Range;

/// Rows and columns of a tile.
pub(crate) const TILE: usize = 64;
/// Columns of a workgroup that adds up rows.
pub(crate) const COLUMNS: usize = 64;
/// Matrix rows that windows are made of where there is room: eights of d's columns are read by 16 bytes.
const EIGHT: usize = 8;
/// Tokens of a workgroup of a loss at the least: it counts the slots of their sequence once.
const TOKENS: usize = 64;

pub(crate) const WHY_ROWS: &str = "rows times transposed matrices: 64 x 64 tiles share what they read";
pub(crate) const WHY_MATRICES: &str =
    "sums over the rows of an expert: 64 x 64 tiles of its matrix share what they read";

/// Workgroups of the gradient of so many rows, at most; those that find nothing to do end at once.
pub(crate) fn tiles_of_rows(experts: usize, rows: usize, columns: usize) -> u64 {
    ((rows / TILE + experts.min(rows)) as u64).saturating_mul(columns.div_ceil(TILE) as u64)
}

/// Workgroups of the gradient of so many matrices.
pub(crate) fn tiles_of_matrices(experts: usize, height: usize, width: usize) -> u64 {
    (experts as u64).saturating_mul(height.div_ceil(TILE) as u64).saturating_mul(width.div_ceil(TILE) as u64)
}

/// Workgroups of so many rows of sums over rows.
pub(crate) fn column_sums(rows: usize, columns: usize) -> u64 {
    rows as u64 * columns.div_ceil(COLUMNS) as u64
}

/// Some rows of the matrices of some experts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MatrixWindow {
    pub(crate) experts: Range<usize>,
    pub(crate) rows: Range<usize>,
}

impl MatrixWindow {
    /// The rows between its first and its last, in a stack of matrices of `height` rows.
    pub(crate) fn span(&self, height: usize) -> Range<usize> {
        let last = self.experts.end.saturating_sub(1);
        self.experts.start * height + self.rows.start..last * height + self.rows.end
    }
}

/// Windows in order that are all of a stack of matrices of `height` rows, of which `room` fit at once: whole experts, or rows
/// of one. `None`: not even one fits.
pub(crate) fn matrix_windows(experts: usize, height: usize, room: usize) -> Option<Vec<MatrixWindow>> {
    let unit = if room >= EIGHT { EIGHT } else { 1 };
    let span = |n: usize, units: usize| (n - 1).saturating_mul(height).saturating_add((unit * units).min(height));
    let windows = windows(experts, height.div_ceil(unit), room, span)?;
    let rows = |units: Range<usize>| unit * units.start..height.min(unit * units.end);
    Some(windows.into_iter().map(|w| MatrixWindow { experts: w.experts, rows: rows(w.pairs) }).collect())
}

/// Tokens of a workgroup of a loss, of which there may be `most`.
pub(crate) fn tokens_of_loss(tokens: usize, most: usize) -> usize {
    tokens.div_ceil(most.max(1)).max(TOKENS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(experts: usize, height: usize, room: usize) -> Vec<MatrixWindow> {
        let windows = matrix_windows(experts, height, room).unwrap();
        let mut seen = vec![0; experts * height];
        for window in &windows {
            assert!(window.span(height).len() <= room, "{window:?}");
            for e in window.experts.clone() {
                window.rows.clone().for_each(|row| seen[e * height + row] += 1);
            }
        }
        assert!(seen.iter().all(|&n| n == 1));
        windows
    }

    #[test]
    fn windows_hold_every_row_once() {
        for room in 1..200 {
            for (experts, height) in [(9, 20), (3, 33), (1, 1), (4, 8)] {
                let windows = check(experts, height, room);
                assert!(room < height * experts || windows.len() == 1);
                for MatrixWindow { experts, rows } in windows {
                    assert!(rows == (0..height) || experts.len() == 1);
                    assert!(room < EIGHT || rows.start % EIGHT == 0);
                }
            }
        }
        assert_eq!(matrix_windows(1, 1, 0), None);
        // 8 experts of 28672 x 4096 in f32: where 2 GiB are bound, and 128 MiB
        assert_eq!(check(8, 28672, (2 << 30) / 16384 - 1).len(), 2);
        assert_eq!(check(8, 28672, (128 << 20) / 16384 - 1).len(), 8 * 4);
    }

    #[test]
    fn every_tile_has_a_workgroup() {
        assert_eq!(tiles_of_rows(8, 0, 4096), 0);
        // 63 experts with a row each, one with 65
        assert!(tiles_of_rows(64, 128, 64) >= 63 + 2);
        assert_eq!(tiles_of_matrices(8, 65, 64), 16);
        assert_eq!([column_sums(3, 64), column_sums(3, 65)], [3, 6]);
    }

    #[test]
    fn the_tokens_of_a_loss_fit() {
        for tokens in [0, 1, 64, 65, 8192, 1 << 24] {
            let block = tokens_of_loss(tokens, 32768);
            assert!(block >= 64 && tokens.div_ceil(block) <= 32768);
        }
    }
}
