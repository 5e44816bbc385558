//! The grouped product on warpgroup tensor cores: what its kernel is specialised by, and its parameters.

use crate::Cuda;
use crate::error::Result;
use crate::grouped::{Grouped, GroupedParams, Product};
use crate::grouped_backward::GroupedBackwardParams;
use crate::launch::{Tensor, dtype_code, dtype_of, params};
use crate::tensor_map::TensorMap;
use fused_moe_core::DType;
use fused_moe_core::problem::GroupedBackwardProblem;

params! {
    WgmmaParams { weights: TensorMap, x: TensorMap, product: GroupedParams, scale: f32 }
}

/// The instructions of its kernels, and the ring that feeds them.
pub(crate) const INSTRUCTIONS: [&str; 3] =
    [include_str!("include/mma.cuh"), include_str!("include/wgmma.cuh"), include_str!("include/barrier_ring.cuh")];

/// A tile, and the stages of the ring that feeds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct WgmmaTile {
    pub(crate) rows: u16,
    pub(crate) columns: u16,
    pub(crate) stages: u8,
    /// Whether pairs of blocks share weight rows.
    pub(crate) paired: bool,
    /// Whether the two warpgroups that multiply share it, half of its rows each; else they take turns, a tile each.
    pub(crate) shared: bool,
}

/// Rows of x that the copy engine brings at once, and of weights where sums run over these.
const BOX_ROWS: u32 = 64;

impl WgmmaTile {
    pub(crate) const THREADS: u32 = 384;

    /// Bytes of a stage of the ring.
    pub(crate) fn stage_bytes(self) -> usize {
        (usize::from(self.rows) + usize::from(self.columns)) * 128
    }

    /// Bytes beside the ring: where outputs are turned into rows, barriers, items, where gathered rows begin, the schedule.
    pub(crate) fn other_bytes(self, gather: bool, experts: usize) -> usize {
        let begins = if gather { 8 * usize::from(self.rows) } else { 0 };
        16 * 1024 + 16 * usize::from(self.stages) + 192 + begins + 8 * (experts + 1)
    }

    /// Blocks that share weight rows.
    pub(crate) fn cluster(self) -> usize {
        if self.paired { 2 } else { 1 }
    }

    /// The part of the text that multiplies it.
    pub(crate) fn part(self) -> &'static str {
        if self.shared { include_str!("include/wgmma_shared.cuh") } else { include_str!("include/wgmma_turns.cuh") }
    }

    pub(crate) fn defines(self) -> [(&'static str, String); 5] {
        [
            ("TILE_M", self.rows.to_string()),
            ("TILE_N", self.columns.to_string()),
            ("STAGES", self.stages.to_string()),
            ("CLUSTER", self.cluster().to_string()),
            ("SHARED", self.shared.to_string()),
        ]
    }
}

/// A tile whose left side are weights, and the stages of the ring that feeds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct SwappedTile {
    /// Rows of x at most, a multiple of 32.
    pub(crate) rows: u16,
    pub(crate) stages: u8,
}

impl SwappedTile {
    /// Rows of x that the copy engine brings at once.
    const ROWS: u32 = 32;
    /// Weight rows.
    pub(crate) const COLUMNS: usize = 256;

    /// Whether it waits for weights and little else, so that copies of a launch that begins early come on top.
    pub(crate) fn is_low(self) -> bool {
        self.rows <= 96
    }

    /// Neighbouring outputs that a thread has of a row.
    fn neighbours(product: Product) -> usize {
        4 / product.halves()
    }

    /// Outputs that the copy engine brings as one.
    pub(crate) fn group(product: Product) -> usize {
        8 * Self::neighbours(product)
    }

    /// Bytes of a stage of the ring.
    pub(crate) fn stage_bytes(self) -> usize {
        (usize::from(self.rows) + Self::COLUMNS) * 128
    }

    /// Bytes beside the ring: barriers, the schedule.
    pub(crate) fn other_bytes(self, experts: usize) -> usize {
        16 * usize::from(self.stages) + 8 * (experts + 1)
    }

    pub(crate) fn defines(self) -> [(&'static str, String); 2] {
        [("TILE_M", self.rows.to_string()), ("STAGES", self.stages.to_string())]
    }
}

/// What becomes of sums besides the activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Ends {
    /// Whether outputs are of x's format and may be stored 16 bytes at a time.
    pub(crate) pieces: bool,
    /// The format of the biases, where there are any that are added two at a time.
    pub(crate) bias: Option<DType>,
}

impl Ends {
    pub(crate) fn of(operands: &Grouped) -> Self {
        let Grouped { table, out, x: (_, x), .. } = operands;
        let pieces = Self::without_bias(*out, *x, table.outputs).pieces && table.bias.aligned(2);
        Self { pieces, bias: (pieces && table.bias.data != 0).then(|| dtype_of(table.bias.dtype)) }
    }

    /// Of so many outputs a row, which a product of operands in `x` has.
    pub(crate) fn without_bias(out: Tensor, x: DType, outputs: usize) -> Self {
        Self { pieces: out.dtype == dtype_code(x) && out.aligned(8) && outputs.is_multiple_of(8), bias: None }
    }

    pub(crate) fn defines(self) -> [(&'static str, String); 4] {
        let [biased, format, sigmoid] = self.of_pieces();
        [("PIECES", self.pieces.to_string()), biased, format, sigmoid]
    }

    /// The same for a kernel that stores nothing but pieces.
    pub(crate) fn of_pieces(self) -> [(&'static str, String); 3] {
        [
            ("BIAS", self.bias.is_some().to_string()),
            ("BIAS_T", self.bias.unwrap_or(DType::F32).to_string()),
            // 2-byte formats keep nothing of what it leaves out
            ("SIGMOID", "brief_sigmoid".into()),
        ]
    }
}

/// Whether coordinates and offsets of the copies fit the 31 and 32 bits that they have.
pub(crate) fn is_within_reach(operands: &Grouped) -> bool {
    let &Grouped { product, rows, x: (x, _), top_k, table, .. } = operands;
    let weight_rows = table.here.saturating_mul(table.outputs).saturating_mul(product.halves());
    [rows, weight_rows, table.inner].into_iter().all(fits) && are_found(x, rows.div_ceil(top_k.max(1)))
}

/// The same of the gradient of rows, which reads `d`, K of its rows from one of d where K is given.
pub(crate) fn is_within_reach_of_rows(problem: &GroupedBackwardProblem, d: Tensor, top_k: Option<usize>) -> bool {
    let &GroupedBackwardProblem { rows, experts, outputs, inputs, .. } = problem;
    [rows, experts, outputs, inputs].into_iter().all(fits) && are_found(d, rows.div_ceil(top_k.unwrap_or(1).max(1)))
}

fn fits(n: usize) -> bool {
    (1..=i32::MAX as usize).contains(&n)
}

/// Whether 32 bits count the pieces of so many rows.
fn are_found(x: Tensor, rows: usize) -> bool {
    (rows as u64).saturating_mul(x.stride / 8) <= u64::from(u32::MAX)
}

/// The parameters of a launch; maps of operands that are not there are left empty.
pub(crate) fn params(cuda: &Cuda, operands: &Grouped, tile: WgmmaTile, product: GroupedParams) -> Result<WgmmaParams> {
    params_with(cuda, operands, product, BOX_ROWS, |during| {
        let Grouped { product: kind, x: (_, format), table, .. } = operands;
        let weight_rows = (table.here * kind.halves() * table.outputs) as u64;
        let sizes = [weight_rows, table.inner as u64];
        TensorMap::of_rows(table.weights(), *format, sizes, u32::from(tile.columns) / 2, during)
    })
}

/// The same where weights are the left side: boxes of gate rows, of up rows or, where there is no gate, of any, with zeros
/// beyond them.
pub(crate) fn params_swapped(cuda: &Cuda, operands: &Grouped, product: GroupedParams) -> Result<WgmmaParams> {
    params_with(cuda, operands, product, SwappedTile::ROWS, |during| {
        let Grouped { product: kind, x: (_, format), table, .. } = operands;
        let stack = (table.weights(), (table.expert_stride / kind.halves()) as u64);
        let sizes = [(table.here * kind.halves()) as u64, table.outputs as u64, table.inner as u64];
        TensorMap::of_groups(stack, *format, sizes, SwappedTile::neighbours(*kind) as u64, during)
    })
}

/// With the map of the weights that `weights` makes, and rows of x in boxes of so many.
fn params_with(
    cuda: &Cuda,
    operands: &Grouped,
    product: GroupedParams,
    x_rows: u32,
    weights: impl FnOnce(&'static str) -> Result<TensorMap>,
) -> Result<WgmmaParams> {
    let &Grouped { product: kind, x: (x, format), table, rows, .. } = operands;
    let mut params = WgmmaParams { product, scale: 1.0, ..WgmmaParams::default() };
    // the matrices are reckoned from the stack
    params.product.table = 0;
    if cuda.recorder().is_some() {
        return Ok(params);
    }
    let during = "grouped product";
    // the driver fills in maps for its current context
    let _current = cuda.device().bind(during)?;
    params.weights = weights(during)?;
    if !kind.gather {
        params.x = TensorMap::of_rows(x, format, [rows as u64, table.inner as u64], x_rows, during)?;
    }
    Ok(params)
}

/// The same of the gradient of rows, in a format; `gather`: whether d is gathered.
pub(crate) fn params_of_rows(
    cuda: &Cuda,
    (backward, gather): (&GroupedBackwardParams, bool),
    format: DType,
) -> Result<WgmmaParams> {
    let GroupedBackwardParams { grouped, d, scale, .. } = *backward;
    let mut params = WgmmaParams { product: GroupedParams { x: d, ..grouped }, scale, ..WgmmaParams::default() };
    if cuda.recorder().is_some() {
        return Ok(params);
    }
    let during = "gradient of rows";
    let _current = cuda.device().bind(during)?;
    let GroupedParams { experts, inner, outputs, expert_stride, .. } = grouped;
    let stack = Tensor { data: grouped.weights, stride: grouped.row_stride, ..Tensor::default() };
    let sizes = [experts.into(), inner, outputs];
    params.weights = TensorMap::of_stack((stack, expert_stride), format, sizes, BOX_ROWS, during)?;
    if !gather {
        params.x = TensorMap::of_rows(d, format, [grouped.rows, inner], BOX_ROWS, during)?;
    }
    Ok(params)
}
