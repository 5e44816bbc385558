//! The gradient of a grouped product's matrices on warpgroup tensor cores: what its kernel is specialised by, and its
//! parameters.

use crate::Cuda;
use crate::error::Result;
use crate::grouped_backward::{GroupedBackward, GroupedBackwardParams, Source, Stage};
use crate::launch::{Tensor, params};
use crate::tensor_map::TensorMap;
use fused_moe_core::problem::GroupedBackwardProblem;

params! {
    MatricesWgmmaParams { a: TensorMap, b: TensorMap, product: GroupedBackwardParams }
}

/// A tile of columns of A, d or for gate_up x, and of B, the other; and the stages of the ring that feeds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct MatricesTile {
    /// Of B.
    pub(crate) columns: u16,
    /// Whether rows of A are found through slots.
    pub(crate) gathered: bool,
    pub(crate) stages: u8,
    /// Whether pairs of blocks share columns of B.
    pub(crate) paired: bool,
}

/// Rows that the copy engine brings at once.
const BOX_ROWS: u32 = 64;

impl MatricesTile {
    pub(crate) const THREADS: u32 = 384;
    /// Columns of A.
    pub(crate) const ROWS: u16 = 128;

    /// Bytes of a stage of the ring.
    pub(crate) fn stage_bytes(self) -> usize {
        (usize::from(Self::ROWS) + usize::from(self.columns)) * 128
    }

    /// Bytes beside the ring: where sums are turned into rows, barriers, where the experts' rows begin.
    pub(crate) fn other_bytes(self, experts: usize) -> usize {
        2 * 9 * 1024 + 16 * usize::from(self.stages) + 4 * (experts + 1)
    }

    /// Blocks that share columns of B.
    pub(crate) fn cluster(self) -> usize {
        if self.paired { 2 } else { 1 }
    }

    pub(crate) fn defines(self) -> [(&'static str, String); 5] {
        [
            ("TILE_M", Self::ROWS.to_string()),
            ("TILE_N", self.columns.to_string()),
            ("GATHERED", self.gathered.to_string()),
            ("STAGES", self.stages.to_string()),
            ("CLUSTER", self.cluster().to_string()),
        ]
    }
}

/// The operands as the kernel sees them: A, d or for gate_up x, which may be gathered, and B, the other; with their widths.
fn sides<'a>(stage: Stage, problem: &GroupedBackwardProblem, [d, x]: [&'a Source; 2]) -> [(&'a Source, usize); 2] {
    let [d, x] = [(d, problem.outputs), (x, problem.inputs)];
    if stage == Stage::GateUp { [x, d] } else { [d, x] }
}

/// Whether A is gathered; none where the copy engine does not reach the operands, or the gradient may not be stored four
/// elements at a time.
pub(crate) fn gathers(operands: &GroupedBackward, x: &Source, out: Tensor) -> Option<bool> {
    let problem = &operands.problem;
    let [(a, a_width), (b, b_width)] = sides(operands.stage, problem, [&operands.d, x]);
    let within = [problem.rows, a_width, b_width].iter().all(|n| (1..=i32::MAX as usize).contains(n));
    (within && b.top_k.is_none() && out.aligned(4)).then_some(a.top_k.is_some())
}

/// The parameters of a launch; maps of operands that are not there or are gathered are left empty.
pub(crate) fn params(
    cuda: &Cuda,
    operands: &GroupedBackward,
    x: &Source,
    product: &GroupedBackwardParams,
) -> Result<MatricesWgmmaParams> {
    let mut params = MatricesWgmmaParams { product: *product, ..MatricesWgmmaParams::default() };
    if cuda.recorder().is_some() {
        return Ok(params);
    }
    let during = "gradient of matrices";
    // the driver fills in maps for its current context
    let _current = cuda.device().bind(during)?;
    let [a, b] = sides(operands.stage, &operands.problem, [&operands.d, x]);
    let map = |(source, width): (&Source, usize)| {
        let sizes = [operands.problem.rows as u64, width as u64];
        TensorMap::of_rows(source.rows, source.format, sizes, BOX_ROWS, during)
    };
    if a.0.top_k.is_none() {
        params.a = map(a)?;
    }
    params.b = map(b)?;
    Ok(params)
}
