//! How the second product of one token is formed and added up in one launch.

use super::grouped::unroll;
use super::{Plan, vector};
use crate::kernel::Kernel;
use crate::launch::Grid;
use fused_moe_core::DType;

/// Warps of a block.
const WARPS: usize = 4;
/// Loads of 16 bytes that a lane has on their way.
const LOADS: usize = 16;

/// What the plan follows from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// K.
    pub(crate) slots: usize,
    /// I.
    pub(crate) inner: usize,
    /// H.
    pub(crate) outputs: usize,
    pub(crate) x: DType,
    pub(crate) weight: DType,
}

/// `aligned` says whether groups of so many elements of rows and weights may be read at once.
pub(crate) fn down_combine(sizes: &Sizes, aligned: impl Fn(u64) -> bool) -> Plan {
    let &Sizes { slots, inner, outputs, x, weight } = sizes;
    let vector = vector(super::dot_vector(x, weight), aligned);
    let unroll = unroll(inner.div_ceil(32 * usize::from(vector)).max(1));
    // as many slots at once as come out even
    let most = (LOADS / unroll).max(1);
    let at_once = (1..=most).rev().find(|n| slots.is_multiple_of(*n)).unwrap_or(1);
    let kernel = Kernel::DownCombine { x, weight, vector, slots: at_once as u8, unroll: unroll as u8 };
    let grid = Grid::line(outputs.div_ceil(WARPS), 32 * WARPS as u32);
    Plan { kernel, grid, why: "one token: a warp an output, over all slots" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_and_pieces_come_out_even() {
        let plan = |slots, inner| {
            let sizes = Sizes { slots, inner, outputs: 2048, x: DType::BF16, weight: DType::BF16 };
            match down_combine(&sizes, |_| true).kernel {
                Kernel::DownCombine { slots, unroll, .. } => (slots, unroll),
                _ => (0, 0),
            }
        };
        assert_eq!(plan(8, 768), (4, 3));
        assert_eq!(plan(8, 2048), (2, 8));
        assert_eq!(plan(2, 14336), (2, 8));
        assert_eq!(plan(7, 100), (7, 1));
        assert_eq!(plan(5, 768), (5, 3));
        assert_eq!(plan(1, 1), (1, 1));
    }

    #[test]
    fn odd_sizes_are_read_one_by_one() {
        let sizes = Sizes { slots: 8, inner: 7, outputs: 5, x: DType::F32, weight: DType::BF16 };
        let plan = down_combine(&sizes, |_| false);
        assert!(matches!(plan.kernel, Kernel::DownCombine { vector: 1, .. }));
        assert_eq!(plan.grid, Grid::line(2, 128));
    }
}
