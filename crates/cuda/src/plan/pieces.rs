//! How element-wise kernels go over the rows of their operands.

use crate::launch::{Grid, Tensor, dtype_of};
use fused_moe_core::DType;

/// What an element-wise kernel reads and writes at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Pieces {
    /// The format of all operands, where they have one.
    pub(crate) format: Option<DType>,
    /// Neighbours of a row.
    pub(crate) vector: u8,
}

/// The most neighbours: 16 bytes of a 2-byte format.
const VECTOR: u8 = 8;
/// Rows that a thread has on their way, and blocks of 256 threads that a multiprocessor holds then.
const ROWS: [u8; 2] = [2, 3];

impl Pieces {
    /// Of operands in rows of so many elements; `whole`: whether neighbours lie side by side.
    pub(crate) fn of(operands: &[Tensor], width: usize, whole: bool) -> Self {
        let present = || operands.iter().filter(|operand| operand.data != 0);
        let first = present().next().map_or(0, |operand| operand.dtype);
        let format = present().all(|operand| operand.dtype == first).then(|| dtype_of(first));
        let many =
            whole && width.is_multiple_of(VECTOR.into()) && present().all(|operand| operand.aligned(VECTOR.into()));
        Self { format, vector: if many { VECTOR } else { 1 } }
    }

    /// Whether a rounding to the operands' format covers what instructions of a lesser precision are off by.
    pub(crate) fn is_narrow(self) -> bool {
        self.format.is_some_and(|format| format.size() == 2)
    }

    /// The sigmoid that is exact enough.
    pub(crate) fn sigmoid(self) -> &'static str {
        if self.is_narrow() { "brief_sigmoid" } else { "sigmoid" }
    }

    /// See [`ROWS`].
    fn rows(self) -> [u8; 2] {
        if self.is_narrow() && self.vector > 1 { ROWS } else { [1, 2] }
    }

    /// What the text is specialised by.
    pub(crate) fn defines(self) -> [(&'static str, String); 5] {
        let [rows, blocks] = self.rows();
        [
            ("X_T", self.format.unwrap_or(DType::F32).to_string()),
            ("MIXED", self.format.is_none().to_string()),
            ("VEC", self.vector.to_string()),
            ("ROWS", rows.to_string()),
            ("BLOCKS", blocks.to_string()),
        ]
    }

    /// A thread for each piece of each few rows.
    pub(crate) fn grid(self, rows: usize, width: usize) -> Grid {
        let columns = width.div_ceil(self.vector.into());
        // no more threads than a row has work for
        let threads = columns.next_multiple_of(32).min(256);
        Grid::plane(columns.div_ceil(threads.max(1)), rows.div_ceil(self.rows()[0].into()), threads as u32)
    }

    /// The same where rows may be so narrow that a block has several of them; and the threads that a row has.
    pub(crate) fn grid_of_groups(self, rows: usize, width: usize) -> (Grid, u32) {
        let columns = width.div_ceil(self.vector.into());
        let lanes = if columns <= 32 { columns.next_power_of_two() } else { columns.next_multiple_of(32).min(256) };
        let groups = (128 / lanes).max(1);
        let blocks = rows.div_ceil(self.rows()[0].into()).div_ceil(groups);
        (Grid::plane(blocks, columns.div_ceil(lanes), (groups * lanes) as u32), lanes as u32)
    }

    /// Those that are compiled in tests.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let formats = [None, Some(DType::F32), Some(DType::F16), Some(DType::BF16)];
        formats.into_iter().flat_map(|format| [1, VECTOR].map(|vector| Self { format, vector }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(dtype: u32, data: u64) -> Tensor {
        Tensor { data, stride: 768, dtype, zero: 0 }
    }

    #[test]
    fn pieces_are_of_one_format_and_of_16_bytes_where_they_may_be() {
        let pieces = |operands: &[Tensor], width, whole| {
            let Pieces { format, vector } = Pieces::of(operands, width, whole);
            (format, vector)
        };
        let [bf16, f32, absent] = [tensor(2, 512), tensor(0, 512), tensor(0, 0)];
        assert_eq!(pieces(&[bf16, absent, bf16], 768, true), (Some(DType::BF16), 8));
        assert_eq!(pieces(&[bf16, f32], 768, true), (None, 8));
        assert_eq!(pieces(&[f32, f32], 769, true), (Some(DType::F32), 1));
        assert_eq!(pieces(&[bf16, tensor(2, 514)], 768, true), (Some(DType::BF16), 1));
        assert_eq!(pieces(&[bf16, bf16], 768, false), (Some(DType::BF16), 1));
    }

    #[test]
    fn a_block_has_as_many_threads_as_a_row_has_pieces() {
        let pieces = Pieces { format: Some(DType::BF16), vector: 8 };
        assert_eq!(pieces.grid(65536, 768), Grid::plane(1, 32768, 96));
        assert_eq!(pieces.grid(3, 4096), Grid::plane(2, 2, 256));
        assert_eq!(pieces.grid(0, 768).blocks[1], 0);
    }

    #[test]
    fn narrow_rows_share_a_block() {
        let pieces = Pieces { format: Some(DType::F32), vector: 1 };
        assert_eq!(pieces.grid_of_groups(65536, 1), (Grid::plane(512, 1, 128), 1));
        assert_eq!(pieces.grid_of_groups(100, 20), (Grid::plane(25, 1, 128), 32));
        let pieces = Pieces { format: Some(DType::BF16), vector: 8 };
        assert_eq!(pieces.grid_of_groups(65536, 768), (Grid::plane(32768, 1, 96), 96));
        assert_eq!(pieces.grid_of_groups(6, 8192), (Grid::plane(3, 4, 256), 256));
    }
}
