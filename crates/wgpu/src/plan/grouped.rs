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
    /// By expert, and cut into tiles.
    Tiles,
}

/// A kernel, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GroupedPlan {
    pub(crate) kernel: GroupedKernel,
    pub(crate) why: &'static str,
}

/// Rows that an expert has on average, up to which weights that stream past once for every four of them cost less than a
/// tile, which costs the same for any 8 of its rows: the tile's price does not fall with its rows, that of streaming grows
/// with each.
const FEW_ROWS: usize = 6;
/// Rows of a tile.
pub(crate) const TILE: usize = 32;
/// Pairs of matrix rows of a workgroup of the streaming kernel: two of each of eight teams.
const STREAMED: usize = 16;
/// Pairs of matrix rows of a tile.
pub(crate) const PAIRS: usize = 64;

pub(crate) fn grouped(sizes: &Sizes) -> GroupedPlan {
    let &Sizes { product, rows, experts, grouping, .. } = sizes;
    let experts = if grouping == Grouping::One { 1 } else { experts };
    let mean = rows.div_ceil(experts.min(rows).max(1));
    if grouping == Grouping::Slots || (mean <= FEW_ROWS && !sizes.invariant) {
        return dot(sizes, mean);
    }
    let (find, why) = match grouping {
        Grouping::Tiles => (Find::Tiles, "tiles of a schedule"),
        _ if sizes.invariant => (find(grouping), "batch-invariant: tiles for any number of rows"),
        _ => (find(grouping), "many rows an expert: tiles of 32 rows share what they read"),
    };
    GroupedPlan { kernel: GroupedKernel::Tiled { product, find }, why }
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
        GroupedKernel::Tiled { .. } => (tiles(rows, experts), column_tiles(pairs)),
    };
    (first as u64).saturating_mul(columns as u64)
}

/// Tiles that so many rows make at most.
pub(crate) fn tiles(rows: usize, experts: usize) -> usize {
    rows / TILE + rows.min(experts)
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
        all.extend([Find::One, Find::Experts, Find::Tiles].map(|find| GroupedKernel::Tiled { product, find }));
    }
    let plain: ActivationKind = Activation::Plain(Function::ReluSquared).into();
    let clamped: ActivationKind = Activation::ClampedSwish { alpha: 1.0, limit: 1.0 }.into();
    for (gated, activation) in [(true, Some(clamped)), (false, Some(plain)), (true, None), (false, None)] {
        let product = gate_up(gated, activation);
        all.push(GroupedKernel::Dot { product, find: Find::Experts, rows: 4 });
        all.push(GroupedKernel::Tiled { product, find: Find::Experts });
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
            (768, Find::Experts, 4),
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
    fn many_rows_take_tiles() {
        for rows in [769, 8192, 65536] {
            let kernel = grouped(&sizes(rows)).kernel;
            assert_eq!(kernel, GroupedKernel::Tiled { product: Product::DOWN, find: Find::Experts });
        }
        let kernel = grouped(&Sizes { grouping: Grouping::Tiles, ..sizes(4096) }).kernel;
        assert_eq!(kernel, GroupedKernel::Tiled { product: Product::DOWN, find: Find::Tiles });
        assert_eq!(workgroups(kernel, 128, 4096, 1024), (128 + 128) * 16);
    }

    #[test]
    fn invariant_rows_take_one_kernel_whatever_their_number() {
        for rows in [1, 8, 100, 100_000] {
            let kernel = grouped(&Sizes { invariant: true, ..sizes(rows) }).kernel;
            assert_eq!(kernel, GroupedKernel::Tiled { product: Product::DOWN, find: Find::Experts });
        }
    }
}
