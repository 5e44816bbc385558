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
    /// Columns of a matrix.
    pub(crate) inner: usize,
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

/// Rows that an expert has on average, up to which multiply-adds keep up with weights that stream past.
const FEW_ROWS: usize = 8;
/// Rows on average, up to which half of a tile of 64 would be empty.
const SOME_ROWS: usize = 48;
/// Elements that a team of the streaming kernel reads at once.
const STEP: usize = 256;
/// Pairs of matrix rows of a workgroup of the streaming kernel, and of a tile.
const TEAMS: usize = 4;
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
    let &Sizes { product, rows, experts, inner, grouping, .. } = sizes;
    let find = match grouping {
        Grouping::One => Find::One,
        Grouping::Slots => Find::Slots,
        _ if rows < experts => Find::Rows,
        _ => Find::Experts,
    };
    let loads = inner / STEP;
    // as many as come out even; else the last ones go one by one
    let even = (2..=4).rev().find(|&n| loads.is_multiple_of(n));
    let unroll = if loads < 4 { loads.max(1) } else { even.unwrap_or(4) } as u32;
    let at_once = match (grouping, mean) {
        (Grouping::Slots, _) | (Grouping::One, 1) => 1,
        (_, 0..=2) => {
            if rows == 1 {
                1
            } else {
                4
            }
        }
        _ => 8,
    };
    let kernel = GroupedKernel::Dot { product, find, unroll, rows: at_once };
    GroupedPlan { kernel, why: "few rows an expert: the weights stream past, all of a row at once" }
}

/// Workgroups for so many experts, rows and pairs, at most; those that find nothing to do end at once.
pub(crate) fn workgroups(kernel: GroupedKernel, experts: usize, rows: usize, pairs: usize) -> u64 {
    let (first, columns) = match kernel {
        GroupedKernel::Dot { find: Find::Experts | Find::One, .. } => (experts, pairs.div_ceil(TEAMS)),
        GroupedKernel::Dot { .. } => (rows, pairs.div_ceil(TEAMS)),
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
        for (find, unroll, rows) in [(Find::One, 1, 1), (Find::Slots, 4, 1), (Find::Experts, 2, 4), (Find::Rows, 3, 8)]
        {
            all.push(GroupedKernel::Dot { product, find, unroll, rows });
        }
        for (find, tile) in [(Find::One, 32), (Find::Experts, 32), (Find::Experts, 64), (Find::Tiles, 64)] {
            all.push(GroupedKernel::Tiled { product, find, tile });
        }
    }
    let plain: ActivationKind = Activation::Plain(Function::ReluSquared).into();
    let clamped: ActivationKind = Activation::ClampedSwish { alpha: 1.0, limit: 1.0 }.into();
    for (gated, activation) in [(true, Some(clamped)), (false, Some(plain)), (true, None), (false, None)] {
        let product = gate_up(gated, activation);
        all.push(GroupedKernel::Dot { product, find: Find::Experts, unroll: 4, rows: 4 });
        all.push(GroupedKernel::Tiled { product, find: Find::Experts, tile: 32 });
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(rows: usize) -> Sizes {
        let (product, grouping) = (Product::DOWN, Grouping::Offsets);
        Sizes { product, rows, experts: 128, inner: 2048, grouping, invariant: false }
    }

    #[test]
    fn few_rows_stream() {
        for (rows, find, at_once) in [(8, Find::Rows, 4), (128, Find::Experts, 4), (1024, Find::Experts, 8)] {
            let kernel = grouped(&sizes(rows)).kernel;
            assert_eq!(kernel, GroupedKernel::Dot { product: Product::DOWN, find, unroll: 4, rows: at_once });
        }
        let slots = grouped(&Sizes { inner: 768, grouping: Grouping::Slots, ..sizes(8) });
        let expected = GroupedKernel::Dot { product: Product::DOWN, find: Find::Slots, unroll: 3, rows: 1 };
        assert_eq!(slots.kernel, expected);
        assert_eq!(workgroups(expected, 128, 8, 1024), 2048);
    }

    #[test]
    fn loads_come_out_even_or_are_four() {
        for (inner, expected) in [(40, 1), (256, 1), (704, 2), (2048, 4), (2816, 4), (2304, 3), (7168, 4)] {
            let plan = grouped(&Sizes { inner, ..sizes(8) });
            assert!(matches!(plan.kernel, GroupedKernel::Dot { unroll, .. } if unroll == expected), "{inner} {plan:?}");
        }
    }

    #[test]
    fn tiles_grow_with_the_rows_of_an_expert() {
        for (rows, tile) in [(4096, 32), (65536, 64)] {
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
