//! Which kernel a grouped product takes, its tile and its grid.

use super::{swapped, vector, wgmma};
use crate::device::DeviceNumbers;
use crate::grouped::{GroupedKernel, MmaTile, Product, Stage};
use crate::kernel::ActivationKind;
use crate::launch::Grid;
use crate::wgmma::Ends;
use fused_moe_core::DType;
use fused_moe_core::config::{Activation, Function};

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
    /// Outputs of an expert.
    pub(crate) outputs: usize,
    pub(crate) x: DType,
    pub(crate) weight: DType,
    /// Whether the rows are slots, not grouped by expert.
    pub(crate) slots: bool,
    /// Whether a row's bits must not depend on the others.
    pub(crate) invariant: bool,
    /// How outputs may be stored.
    pub(crate) ends: Ends,
    /// Whether the tensor copy engine reaches the operands.
    pub(crate) engine: bool,
}

/// A kernel, its grid, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GroupedPlan {
    pub(crate) kernel: GroupedKernel,
    pub(crate) grid: Grid,
    pub(crate) why: &'static str,
}

/// Rows up to which a warp an output streams the weights no slower than tensor cores do, and than the general kernel.
const FEW_ROWS: [usize; 2] = [8, 48];
/// Rows of an expert that share a weight in registers.
const ROWS_AT_ONCE: u8 = 4;
/// Loads of 16 bytes that a warp has on their way.
const LOADS: usize = 16;
/// Loads of 16 bytes from one row.
const MOST_UNROLLED: usize = 8;
/// Warps of a block of the streaming kernel.
const DOT_WARPS: usize = 4;
/// Rows and columns of a tile of the general kernel.
const TILE: usize = 64;

/// Tiles of the tensor-core kernel by the rows that an expert has on average: wide where there are many, and where there
/// are few, narrow enough for the weights to be all that is waited for.
const TILES: [(usize, MmaTile); 4] = [
    (12, MmaTile { rows: 16, columns: 64, warps: [1, 4], stages: 5, blocks: 4 }),
    (40, MmaTile { rows: 32, columns: 128, warps: [1, 4], stages: 3, blocks: 3 }),
    (160, MmaTile { rows: 64, columns: 128, warps: [2, 2], stages: 3, blocks: 3 }),
    (usize::MAX, MmaTile { rows: 128, columns: 128, warps: [2, 4], stages: 3, blocks: 2 }),
];

impl MmaTile {
    pub(super) fn stage_bytes(self) -> usize {
        (usize::from(self.rows) + usize::from(self.columns)) * 64 * 2
    }

    pub(super) fn threads(self) -> u32 {
        32 * u32::from(self.warps[0]) * u32::from(self.warps[1])
    }

    /// The same with as many stages as the device has room for, two at least.
    pub(super) fn fit(self, schedule: usize, device: &DeviceNumbers) -> Self {
        let room = device.shared_per_block.saturating_sub(schedule) / self.stage_bytes();
        Self { stages: self.stages.min(room.clamp(2, 255) as u8), ..self }
    }
}

/// `aligned` says whether groups of so many elements of x and weights may be read at once.
pub(crate) fn grouped(sizes: &Sizes, aligned: impl Fn(u64) -> bool, device: &DeviceNumbers) -> GroupedPlan {
    let fast = sizes.x == sizes.weight && sizes.x.size() == 2 && aligned(8);
    let few = FEW_ROWS[usize::from(!fast)];
    if sizes.slots || (sizes.rows <= few && !sizes.invariant) {
        return dot(sizes, aligned);
    }
    if !fast {
        return tiled(sizes, aligned, device);
    }
    let warpgroups = swapped::swapped(sizes, device).or_else(|| wgmma::wgmma(sizes, device));
    warpgroups.unwrap_or_else(|| mma(sizes, device))
}

fn dot(sizes: &Sizes, aligned: impl Fn(u64) -> bool) -> GroupedPlan {
    let &Sizes { product, rows, inner, outputs, x, weight, slots, .. } = sizes;
    let vector = vector(super::dot_vector(x, weight), aligned);
    let loads = inner.div_ceil(32 * usize::from(vector)).max(1);
    let unroll = unroll(loads);
    let each = if 2 * unroll * product.halves() > LOADS { 1 } else { 2 };
    let each = if 4 * unroll * product.halves() > LOADS { each } else { 4 };
    let at_once = if (slots || rows == 1) && x == weight { 1 } else { ROWS_AT_ONCE };
    let (outputs_each, unroll) = (each as u8, unroll as u8);
    let kernel = GroupedKernel::Dot { product, x, weight, vector, outputs: outputs_each, unroll, rows: at_once };
    let grid = Grid::plane(outputs.div_ceil(DOT_WARPS * each), rows, 32 * DOT_WARPS as u32);
    GroupedPlan { kernel, grid, why: "few rows: warps stream the weights of their outputs" }
}

/// Of so many loads of a row, those at once: as many as come out even; else the last ones are in part beyond the row.
pub(super) fn unroll(loads: usize) -> usize {
    let even = (1..=MOST_UNROLLED).rev().find(|&n| loads.is_multiple_of(n) && 2 * n >= loads.min(MOST_UNROLLED));
    even.unwrap_or(MOST_UNROLLED)
}

fn mma(sizes: &Sizes, device: &DeviceNumbers) -> GroupedPlan {
    let &Sizes { product, rows, experts, outputs, x, .. } = sizes;
    // and the numbers of two tiles, in whole lines
    let schedule = 4 * (experts + 1) + 128;
    let mean = rows / experts.min(rows).max(1);
    let widest = TILES.iter().find(|(most, _)| mean <= *most).unwrap_or(&TILES[3]).1;
    let tile = widest.fit(schedule, device);
    let columns = (outputs * product.halves()).div_ceil(tile.columns.into());
    let tiles = row_tiles(rows, experts, tile.rows.into()).saturating_mul(columns);
    let resident = device.multiprocessors as usize * usize::from(tile.blocks);
    let shared = usize::from(tile.stages) * tile.stage_bytes() + schedule;
    let grid = Grid::line(tiles.min(resident), tile.threads()).with_shared(shared);
    let why = match tile.rows {
        16 => "a handful of rows an expert: tensor cores, narrow tiles, weights through a deep ring",
        32 => "some rows an expert: tensor cores, tiles of 32 rows",
        64 => "many rows an expert: tensor cores, tiles of 64 rows, little of which is empty",
        _ => "very many rows an expert: tensor cores, tiles of 128 rows, each weight used the most",
    };
    GroupedPlan { kernel: GroupedKernel::Mma { product, format: x, tile }, grid, why }
}

fn tiled(sizes: &Sizes, aligned: impl Fn(u64) -> bool, device: &DeviceNumbers) -> GroupedPlan {
    let &Sizes { product, rows, experts, outputs, x, weight, .. } = sizes;
    let columns = (outputs * product.halves()).div_ceil(TILE);
    let tiles = row_tiles(rows, experts, TILE).saturating_mul(columns);
    let grid = Grid::line(tiles.min(device.multiprocessors as usize * 4), 256).with_shared(4 * (experts + 1));
    let kernel = GroupedKernel::Tiled { product, x, weight, vector: vector(4, aligned) };
    GroupedPlan { kernel, grid, why: "f32, mixed formats or odd sizes: multiply-adds in f32" }
}

/// The most row tiles there can be.
pub(super) fn row_tiles(rows: usize, experts: usize, tile: usize) -> usize {
    rows / tile + experts.min(rows)
}

/// Neighbouring outputs that a kernel stores at once.
pub(crate) fn neighbours(kernel: GroupedKernel) -> u64 {
    match kernel {
        GroupedKernel::Dot { outputs, .. } => outputs.into(),
        GroupedKernel::Wgmma { .. }
        | GroupedKernel::Swapped { .. }
        | GroupedKernel::Mma { .. }
        | GroupedKernel::Tiled { .. } => 2,
    }
}

/// Every kernel of every plan: formats, tiles and activations, combined as far as they meet in one text.
pub(crate) fn all() -> Vec<GroupedKernel> {
    let floats = [DType::F32, DType::F16, DType::BF16];
    let silu: ActivationKind = Activation::default().into();
    let gate_up = |gated, activation| Product { stage: Stage::GateUp, gather: true, gated, activation };
    let mut all = Vec::new();
    let ends = |pieces, bias| Ends { pieces, bias };
    for product in [gate_up(true, Some(silu)), Product::DOWN] {
        for format in [DType::F16, DType::BF16] {
            for tile in swapped::tiles() {
                all.push(GroupedKernel::Swapped { product, format, tile, ends: ends(true, None) });
            }
            for tile in wgmma::tiles() {
                all.push(GroupedKernel::Wgmma { product, format, tile, ends: ends(true, None) });
            }
            all.extend(TILES.map(|(_, tile)| GroupedKernel::Mma { product, format, tile }));
        }
        for x in floats {
            for weight in floats {
                for vector in [1, super::dot_vector(x, weight)] {
                    for rows in [1, ROWS_AT_ONCE].into_iter().filter(|&rows| rows > 1 || x == weight) {
                        let outputs = if product.gated { 1 } else { 2 };
                        all.push(GroupedKernel::Dot { product, x, weight, vector, outputs, unroll: 8, rows });
                    }
                }
                all.extend([1, 4].map(|vector| GroupedKernel::Tiled { product, x, weight, vector }));
            }
        }
    }
    let limit = 1.0;
    let mut activations = vec![
        Activation::ClampedSilu { limit },
        Activation::ClampedSwish { alpha: 1.0, limit },
        Activation::SiluThenClamp { limit },
        Activation::SoftcappedSilu { gate_cap: 1.0, up_cap: 1.0 },
    ];
    for function in [Function::GeluTanh, Function::GeluErf, Function::Relu, Function::ReluSquared, Function::Identity] {
        activations.push(Activation::Gated(function));
    }
    activations.extend([Activation::Plain(Function::Silu), Activation::Plain(Function::ReluSquared)]);
    let mut products: Vec<_> =
        activations.iter().map(|&activation| gate_up(activation.is_gated(), Some(activation.into()))).collect();
    products.extend([true, false].map(|gated| gate_up(gated, None)));
    products.push(Product { gather: false, ..gate_up(true, Some(silu)) });
    let (x, weight) = (DType::BF16, DType::BF16);
    for product in products {
        for (tile, bias) in swapped::tiles().zip([None, Some(DType::F32)]) {
            all.push(GroupedKernel::Swapped { product, format: x, tile, ends: ends(true, bias) });
        }
        for (tile, ends) in wgmma::tiles().into_iter().zip([ends(true, Some(DType::F32)), ends(false, None)]) {
            all.push(GroupedKernel::Wgmma { product, format: x, tile, ends });
        }
        let [(_, tile), ..] = TILES;
        all.push(GroupedKernel::Mma { product, format: x, tile });
        all.push(GroupedKernel::Dot { product, x, weight, vector: 8, outputs: 4, unroll: 2, rows: ROWS_AT_ONCE });
        all.push(GroupedKernel::Tiled { product, x, weight, vector: 1 });
    }
    all
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// One without the newest tensor cores' instructions.
    fn device() -> DeviceNumbers {
        DeviceNumbers { compute_capability: (8, 0), ..crate::plan::tests::device() }
    }

    pub(crate) fn down(rows: usize) -> Sizes {
        Sizes { product: Product::DOWN, inner: 768, outputs: 2048, ..sizes(rows) }
    }

    pub(crate) fn sizes(rows: usize) -> Sizes {
        let product =
            Product { stage: Stage::GateUp, gather: true, gated: true, activation: Some(Activation::default().into()) };
        let (x, weight) = (DType::BF16, DType::BF16);
        let (experts, inner, outputs) = (128, 2048, 768);
        let ends = Ends { pieces: true, bias: None };
        Sizes { product, rows, experts, inner, outputs, x, weight, slots: false, invariant: false, ends, engine: true }
    }

    fn tile_rows(rows: usize) -> u16 {
        match grouped(&sizes(rows), |_| true, &device()).kernel {
            GroupedKernel::Mma { tile, .. } => tile.rows,
            _ => 0,
        }
    }

    #[test]
    fn tiles_grow_with_the_rows_of_an_expert() {
        assert_eq!([8, 256, 4096, 16384, 65536].map(tile_rows), [0, 16, 32, 64, 128]);
    }

    #[test]
    fn few_rows_stream() {
        let plan = grouped(&Sizes { slots: true, ..sizes(8) }, |_| true, &device());
        assert!(matches!(plan.kernel, GroupedKernel::Dot { vector: 8, outputs: 1, unroll: 8, rows: 1, .. }));
        assert_eq!(plan.grid, Grid::plane(192, 8, 128));
        let plan = grouped(&down(8), |_| true, &device());
        assert!(matches!(plan.kernel, GroupedKernel::Dot { outputs: 4, unroll: 3, rows: 4, .. }));
        let unaligned = grouped(&sizes(8), |_| false, &device());
        assert!(matches!(unaligned.kernel, GroupedKernel::Dot { vector: 1, .. }));
    }

    #[test]
    fn what_tensor_cores_do_not_take_goes_the_general_way() {
        let odd = grouped(&sizes(4096), |_| false, &device());
        let wide = grouped(&Sizes { x: DType::F32, ..sizes(4096) }, |_| true, &device());
        for plan in [odd, wide] {
            assert!(matches!(plan.kernel, GroupedKernel::Tiled { .. }), "{plan:?}");
        }
    }

    #[test]
    fn invariant_rows_take_one_kernel_whatever_their_number() {
        for rows in [1, 8, 100, 100_000] {
            let plan = grouped(&Sizes { invariant: true, ..sizes(rows) }, |_| true, &device());
            assert!(matches!(plan.kernel, GroupedKernel::Mma { .. }));
            let plan = grouped(&Sizes { invariant: true, ..sizes(rows) }, |_| false, &device());
            assert!(matches!(plan.kernel, GroupedKernel::Tiled { .. }));
        }
    }

    #[test]
    fn blocks_fit_the_device() {
        for rows in [49, 500, 5000, 50_000, 1 << 24] {
            for experts in [1, 128, 4096] {
                for shared in [99 << 10, 163 << 10, 227 << 10] {
                    let device = DeviceNumbers { shared_per_block: shared, ..device() };
                    let plan = grouped(&Sizes { experts, ..sizes(rows) }, |_| true, &device);
                    assert!(plan.grid.shared as usize <= shared, "{plan:?}");
                }
            }
        }
    }
}
