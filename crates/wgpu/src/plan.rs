//! How operations are carried out: pure functions of what is to be computed and of the device's numbers.

pub(crate) mod backward;
mod combine;
pub(crate) mod grouped;
mod layer;
mod route;
pub(crate) mod windows;

pub(crate) use combine::{CombineParts, CombinePlan, CombineStep, combine, down_combine};
pub(crate) use layer::{piece, schedule, tokens_at_once};
pub(crate) use route::{permute, route, threads_of_token};

use crate::Wgpu;
use crate::device::DeviceNumbers;
use crate::kernel::{Dots, Kernel};
use crate::launch::Groups;
use std::ops::Range;

/// Elements that a workgroup of an element-wise kernel takes, two a thread.
const PAIRS: usize = 512;

/// Workgroups of an element-wise kernel.
pub(crate) fn pairs(rows: u32, width: usize) -> Groups<'static> {
    Groups::Line(u64::from(rows) * width.div_ceil(PAIRS) as u64)
}

/// Bytes that a binding holds wherever they begin.
pub(crate) fn room(wgpu: &Wgpu) -> usize {
    let DeviceNumbers { binding_bytes, buffer_bytes, .. } = wgpu.numbers();
    usize::try_from((*binding_bytes).min(*buffer_bytes).saturating_sub(512)).unwrap_or(usize::MAX)
}

/// Rows that a launch takes, where all of them are more than a binding holds.
pub(crate) fn pieces(wgpu: &Wgpu, rows: usize, row_bytes: usize) -> impl Iterator<Item = Range<usize>> {
    let at_once = (room(wgpu) / row_bytes.max(1)).max(1);
    (0..rows).step_by(at_once).map(move |first| first..rows.min(first + at_once))
}

/// A matrix product: its kernel and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Product {
    pub(crate) kernel: Kernel,
    /// Rows and columns of a workgroup.
    block: [usize; 2],
    why: &'static str,
}

impl Product {
    /// Workgroups of so many rows and columns.
    pub(crate) fn groups(&self, rows: usize, columns: usize) -> u64 {
        rows.div_ceil(self.block[0]) as u64 * columns.div_ceil(self.block[1]) as u64
    }

    /// Notes why, for the next launch.
    pub(crate) fn explain(&self, wgpu: &Wgpu) {
        if let Some(recorder) = wgpu.recorder() {
            recorder.explain(self.why);
        }
    }
}

/// Rows up to which dot products read the weight fast enough, however many tiles there were.
const FEW_ROWS: usize = 16;
/// Tiles that are too few to keep a large GPU busy: each goes through the whole inner dimension alone, so that few take as
/// long as many, while dot products take a time that grows with the rows.
const FEW_TILES: usize = 64;
/// Rows that share one read of the weight.
const SHARING: u32 = 4;
/// Threads of a workgroup.
const THREADS: usize = 256;
/// Workgroups that keep a large GPU busy.
const BUSY: usize = 512;
/// Rows and columns of a tile.
pub(crate) const TILE: usize = 64;

const ONE: &str = "one row: a team of threads a column streams the weight once";
const FEW: &str = "few rows or few tiles: a team of threads a column, four rows share what it reads";
const SAME: &str = "the same bits for any number of rows: dot products, a team of threads a column";
const MANY: &str = "many rows: 64 x 64 tiles share what they read";

/// `sizes` are T, H, E. `invariant` forces dot products: they alone are fast for one token, and a tile adds up in another
/// order.
pub(crate) fn gate(sizes: [usize; 3], norm: bool, invariant: bool) -> Product {
    product(sizes, invariant, |dots| match dots {
        Some(dots) => Kernel::Gate { dots, norm },
        None => Kernel::GateTiled { norm },
    })
}

/// `sizes` are rows, C, N; `invariant` as in [`gate`].
pub(crate) fn linear(sizes: [usize; 3], invariant: bool) -> Product {
    product(sizes, invariant, |dots| dots.map_or(Kernel::LinearTiled, |dots| Kernel::Linear { dots }))
}

fn product([rows, width, columns]: [usize; 3], invariant: bool, kernel: impl Fn(Option<Dots>) -> Kernel) -> Product {
    let tiles = rows.div_ceil(TILE) * columns.div_ceil(TILE);
    if rows > FEW_ROWS && tiles >= FEW_TILES && !invariant {
        return Product { kernel: kernel(None), block: [TILE; 2], why: MANY };
    }
    let dots = Dots { tokens: if rows == 1 { 1 } else { SHARING }, team: team(width, columns) };
    let why = match rows {
        _ if invariant => SAME,
        1 => ONE,
        _ => FEW,
    };
    Product { kernel: kernel(Some(dots)), block: [dots.tokens as usize, THREADS / dots.team as usize], why }
}

/// Threads of a column: as many as its width feeds, eight elements each, and no more than keep the device busy. A function
/// of the weight alone, since it decides the order of a sum.
fn team(width: usize, columns: usize) -> u32 {
    let fed = width.div_ceil(8).next_power_of_two();
    let busy = (BUSY * THREADS / columns.max(1)).next_power_of_two();
    fed.min(busy).clamp(32, THREADS) as u32
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::device::DeviceNumbers;

    /// What every device offers, and no more.
    pub(crate) fn device() -> DeviceNumbers {
        DeviceNumbers {
            name: "test".into(),
            driver: String::new(),
            api: "vulkan".into(),
            software: false,
            subgroups: true,
            timestamps: false,
            binding_bytes: 128 << 20,
            buffer_bytes: 256 << 20,
            binding_alignment: 256,
            workgroup_bytes: 16384,
        }
    }

    #[test]
    fn few_rows_are_dot_products_and_many_are_tiles() {
        let dots = Dots { tokens: 4, team: 256 };
        assert_eq!(linear([1, 4096, 512], false).kernel, Kernel::Linear { dots: Dots { tokens: 1, team: 256 } });
        assert_eq!(linear([2, 4096, 512], false).kernel, Kernel::Linear { dots });
        assert_eq!(linear([16, 4096, 65536], false).kernel, Kernel::Linear { dots: Dots { tokens: 4, team: 32 } });
        assert_eq!(linear([17, 4096, 4096], false).kernel, Kernel::LinearTiled);
        assert_eq!(linear([448, 4096, 512], false).kernel, Kernel::Linear { dots });
        assert_eq!(linear([449, 4096, 512], false).kernel, Kernel::LinearTiled);
        assert_eq!(gate([4096, 4096, 64], true, false).kernel, Kernel::GateTiled { norm: true });
        assert_eq!(gate([4096, 48, 64], false, false).groups(4096, 64), 64);
        assert_eq!(gate([0, 48, 64], false, false).groups(0, 64), 0);
    }

    #[test]
    fn invariant_sums_have_one_order_for_any_rows() {
        for rows in [1, 2, 16, 17, 4096] {
            let Kernel::Linear { dots } = linear([rows, 4096, 512], true).kernel else { panic!("{rows}") };
            assert_eq!(dots.team, 256);
        }
    }

    #[test]
    fn teams_suit_the_weight() {
        assert_eq!(team(7168, 128), 256);
        assert_eq!(team(4096, 4096), 32);
        assert_eq!(team(4096, 1500), 128);
        assert_eq!(team(64, 8), 32);
        assert_eq!(team(512, 0), 64);
        assert_eq!(linear([1, 4096, 4096], false).groups(1, 4096), 512);
    }
}
