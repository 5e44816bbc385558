//! Which kernel a grouped product takes, its tile and how its workgroups find their rows.

use crate::grouped::{Find, GroupedKernel, Product};

/// What a plan of a grouped product follows from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub(crate) product: Product,
    /// R.
    pub(crate) rows: usize,
    /// E.
    pub(crate) experts: usize,
    pub(crate) grouping: Grouping,
    /// Whether a row's bits must not depend on the others.
    pub(crate) invariant: bool,
}

/// How rows are grouped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Grouping {
    One,
    Slots,
    Offsets,
    /// By expert, and cut into tiles of so many rows.
    Tiles(u32),
}

/// A kernel, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GroupedPlan {
    pub(crate) kernel: GroupedKernel,
    pub(crate) why: &'static str,
}

/// Rows that an expert has on average, up to which weights that stream past once for every four of them cost less than a
/// tile, which costs the same however few of its 32 rows there are. On an H200 (128 experts of 2048 x 768) the one takes 8 us
/// a token, the other 1.46 ms up to 16 rows an expert: they meet near 12.
const FEW_ROWS: usize = 12;
/// Rows on average, up to which tiles of 64 are left too empty: on an H200 tiles of 32 are faster by 17 % at 32 rows and by
/// 5 % at 64, slower by 3 % at 128.
const SOME_ROWS: usize = 64;
/// Pairs of matrix rows of a workgroup of the streaming kernel: two of each of eight teams.
const STREAMED: usize = 16;
/// Pairs of matrix rows of a tile.
const PAIRS: usize = 32;

pub(crate) fn grouped(sizes: &Sizes) -> GroupedPlan {
    let &Sizes { product, rows, experts, grouping, .. } = sizes;
    let experts = if grouping == Grouping::One { 1 } else { experts };
    let mean = rows.div_ceil(experts.min(rows).max(1));
    if grouping == Grouping::Slots || (mean <= FEW_ROWS && !sizes.invariant) {
        return dot(sizes, mean);
    }
    let (find, tile, why) = match grouping {
        Grouping::Tiles(tile) => (Find::Tiles, tile, "tiles of a schedule"),
        _ if sizes.invariant => (find(grouping), 32, "batch-invariant: the same tiles for any number of rows"),
        _ if mean <= SOME_ROWS => (find(grouping), 32, "some rows an expert: tiles of 32 rows"),
        _ => (find(grouping), 64, "many rows an expert: tiles of 64 rows"),
    };
    GroupedPlan { kernel: GroupedKernel::Tiled { product, find, tile }, why }
}

fn find(grouping: Grouping) -> Find {
    if grouping == Grouping::One { Find::One } else { Find::Experts }
}

fn dot(sizes: &Sizes, mean: usize) -> GroupedPlan {
    let &Sizes { product, rows, experts, grouping, .. } = sizes;
    let find = match grouping {
        Grouping::One => Find::One,
        Grouping::Slots => Find::Slots,
        _ if rows < experts => Find::Rows,
        _ => Find::Experts,
    };
    // registers that other rows would take keep more weights on their way
    let at_once = match mean {
        _ if grouping == Grouping::Slots || rows == 1 => 1,
        // where rows are spread over experts, some have two
        0..=1 => 2,
        _ => 4,
    };
    let kernel = GroupedKernel::Dot { product, find, rows: at_once };
    GroupedPlan { kernel, why: "few rows an expert: the weights stream past" }
}

/// Workgroups for so many experts, rows and pairs, at most; those that find nothing to do end at once.
pub(crate) fn workgroups(kernel: GroupedKernel, experts: usize, rows: usize, pairs: usize) -> u64 {
    let (first, columns) = match kernel {
        GroupedKernel::Dot { find: Find::Experts | Find::One, .. } => (experts, pairs.div_ceil(STREAMED)),
        GroupedKernel::Dot { .. } => (rows, pairs.div_ceil(STREAMED)),
        GroupedKernel::Tiled { tile, .. } => (rows / tile as usize + experts.min(rows), column_tiles(pairs)),
    };
    (first as u64).saturating_mul(columns as u64)
}

/// Tiles that the pairs of a matrix make.
pub(crate) fn column_tiles(pairs: usize) -> usize {
    pairs.div_ceil(PAIRS)
}

/// Every kernel of every plan, as far as parts of its text differ.
#[cfg(test)]
pub(crate) fn all() -> Vec<GroupedKernel> {
    use crate::grouped::Stage;
    use crate::kernel::ActivationKind;
    use fused_moe_core::config::{Activation, Function};
    let silu: ActivationKind = Activation::default().into();
    let gate_up = |gated, activation| Product { stage: Stage::GateUp, gated, activation };
    let mut all = Vec::new();
    for product in [gate_up(true, Some(silu)), Product::DOWN] {
        for (find, rows) in [(Find::One, 1), (Find::Slots, 1), (Find::Experts, 4), (Find::Rows, 2)] {
            all.push(GroupedKernel::Dot { product, find, rows });
        }
        for (find, tile) in [(Find::One, 32), (Find::Experts, 32), (Find::Experts, 64), (Find::Tiles, 64)] {
            all.push(GroupedKernel::Tiled { product, find, tile });
        }
    }
    let plain: ActivationKind = Activation::Plain(Function::ReluSquared).into();
    let clamped: ActivationKind = Activation::ClampedSwish { alpha: 1.0, limit: 1.0 }.into();
    for (gated, activation) in [(true, Some(clamped)), (false, Some(plain)), (true, None), (false, None)] {
        let product = gate_up(gated, activation);
        all.push(GroupedKernel::Dot { product, find: Find::Experts, rows: 4 });
        all.push(GroupedKernel::Tiled { product, find: Find::Experts, tile: 32 });
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(rows: usize) -> Sizes {
        let (product, grouping) = (Product::DOWN, Grouping::Offsets);
        Sizes { product, rows, experts: 128, grouping, invariant: false }
    }

    #[test]
    fn few_rows_stream() {
        for (rows, find, at_once) in [
            (1, Find::Rows, 1),
            (8, Find::Rows, 2),
            (128, Find::Experts, 2),
            (256, Find::Experts, 4),
            (1536, Find::Experts, 4),
        ] {
            let kernel = grouped(&sizes(rows)).kernel;
            assert_eq!(kernel, GroupedKernel::Dot { product: Product::DOWN, find, rows: at_once }, "{rows}");
        }
        let slots = grouped(&Sizes { grouping: Grouping::Slots, ..sizes(8) });
        let expected = GroupedKernel::Dot { product: Product::DOWN, find: Find::Slots, rows: 1 };
        assert_eq!(slots.kernel, expected);
        assert_eq!(workgroups(expected, 128, 8, 1024), 512);
    }

    #[test]
    fn tiles_grow_with_the_rows_of_an_expert() {
        for (rows, tile) in [(1537, 32), (8192, 32), (8193, 64), (65536, 64)] {
            let kernel = grouped(&sizes(rows)).kernel;
            assert_eq!(kernel, GroupedKernel::Tiled { product: Product::DOWN, find: Find::Experts, tile });
        }
        let kernel = grouped(&Sizes { grouping: Grouping::Tiles(64), ..sizes(4096) }).kernel;
        assert_eq!(kernel, GroupedKernel::Tiled { product: Product::DOWN, find: Find::Tiles, tile: 64 });
        assert_eq!(workgroups(kernel, 128, 4096, 1024), (64 + 128) * 32);
    }

    #[test]
    fn invariant_rows_take_one_kernel_whatever_their_number() {
        for rows in [1, 8, 100, 100_000] {
            let kernel = grouped(&Sizes { invariant: true, ..sizes(rows) }).kernel;
            assert_eq!(kernel, GroupedKernel::Tiled { product: Product::DOWN, find: Find::Experts, tile: 32 });
        }
    }
}
