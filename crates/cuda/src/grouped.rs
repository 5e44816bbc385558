//! The grouped product, which gate_up, down and the shared expert are: its kernels, and how they are launched.

use crate::error::Result;
use crate::kernel::{ActivationKind, Kernel};
use crate::launch::{Params, Tensor, launch, params};
use crate::pack::Table;
use crate::plan::grouped as plan;
use crate::wgmma::{self, Ends, SwappedTile, WgmmaParams, WgmmaTile};
use crate::{Cuda, CudaStream};
use fused_moe_core::DType;

params! {
    GroupedParams {
        x: Tensor, out: Tensor, input_weights: Tensor, bias: Tensor,
        weights: u64, table: u64, expert_stride: u64, row_stride: u64, offsets: u64, row_slot: u64, slot_experts: u64,
        rows: u64, inner: u64, outputs: u64,
        experts: u32, first: u32, here: u32, top_k: u32, input_columns: u32, neighbours: u32, limit: f32, alpha: f32,
        early: u32, zero: u32, counter: u64,
    }
}

/// Which product a kernel computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Product {
    pub(crate) stage: Stage,
    /// Whether rows of x are found through slots.
    pub(crate) gather: bool,
    /// Whether matrices are gate rows, then up rows.
    pub(crate) gated: bool,
    /// What is applied before storing.
    pub(crate) activation: Option<ActivationKind>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Stage {
    GateUp,
    Down,
}

impl Product {
    pub(crate) const DOWN: Self = Self { stage: Stage::Down, gather: false, gated: false, activation: None };

    /// Rows of a matrix that make one output.
    pub(crate) fn halves(self) -> usize {
        if self.gated { 2 } else { 1 }
    }

    /// What the text of its kernels is specialised by.
    pub(crate) fn defines(self) -> Vec<(&'static str, String)> {
        let Self { gather, gated, activation, .. } = self;
        let none = ActivationKind { form: "FORM_PLAIN", function: "FUNCTION_IDENTITY" };
        let ActivationKind { form, function } = activation.unwrap_or(none);
        vec![
            ("GATHER", gather.to_string()),
            ("GATED", gated.to_string()),
            ("ACTIVATE", activation.is_some().to_string()),
            ("FORM", form.to_string()),
            ("FUNCTION", function.to_string()),
        ]
    }
}

/// A tile of the tensor-core kernel, the warps that share it, and the ring that feeds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct MmaTile {
    pub(crate) rows: u16,
    pub(crate) columns: u16,
    pub(crate) warps: [u8; 2],
    pub(crate) stages: u8,
    /// Blocks that a multiprocessor holds.
    pub(crate) blocks: u8,
}

impl MmaTile {
    pub(crate) fn defines(self) -> [(&'static str, String); 6] {
        let [m, n] = self.warps;
        [
            ("TILE_M", self.rows.to_string()),
            ("TILE_N", self.columns.to_string()),
            ("WARPS_M", m.to_string()),
            ("WARPS_N", n.to_string()),
            ("STAGES", self.stages.to_string()),
            ("BLOCKS", self.blocks.to_string()),
        ]
    }
}

/// A kernel of the grouped product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum GroupedKernel {
    Wgmma { product: Product, format: DType, tile: WgmmaTile, ends: Ends },
    Swapped { product: Product, format: DType, tile: SwappedTile, ends: Ends },
    Mma { product: Product, format: DType, tile: MmaTile },
    Dot { product: Product, x: DType, weight: DType, vector: u8, outputs: u8, unroll: u8, rows: u8 },
    Tiled { product: Product, x: DType, weight: DType, vector: u8 },
}

pub(crate) const GROUPED: &str = include_str!("include/grouped.cuh");
/// What warpgroup tensor cores need of the text for such a tile, the parameters among it.
pub(crate) fn wgmma_parts(tile: WgmmaTile) -> [&'static str; 6] {
    let [products, warpgroups, ring] = wgmma::INSTRUCTIONS;
    let product = include_str!("include/grouped_wgmma.cuh");
    [products, warpgroups, ring, WgmmaParams::DEFINITION, product, tile.part()]
}
/// The same with weights as the left side.
fn swapped_parts() -> [&'static str; 5] {
    let [products, warpgroups, ring] = wgmma::INSTRUCTIONS;
    [products, warpgroups, ring, WgmmaParams::DEFINITION, include_str!("include/grouped_swapped.cuh")]
}
pub(crate) const STREAM: &str = include_str!("include/stream.cuh");

impl GroupedKernel {
    fn product(self) -> Product {
        match self {
            Self::Wgmma { product, .. }
            | Self::Swapped { product, .. }
            | Self::Mma { product, .. }
            | Self::Dot { product, .. }
            | Self::Tiled { product, .. } => product,
        }
    }

    /// Whether it has instructions of sm_90a alone.
    pub(crate) fn has_warpgroups(self) -> bool {
        matches!(self, Self::Wgmma { .. } | Self::Swapped { .. })
    }

    /// Whether it may begin before the launch before it has ended.
    pub(crate) fn takes_turn(self) -> bool {
        match self {
            Self::Wgmma { .. } => false,
            Self::Swapped { tile, .. } => tile.is_low(),
            Self::Mma { .. } | Self::Dot { .. } | Self::Tiled { .. } => true,
        }
    }

    /// The definition of its parameter.
    pub(crate) fn params(self) -> &'static str {
        match self {
            Self::Wgmma { .. } | Self::Swapped { .. } => WgmmaParams::DEFINITION,
            _ => GroupedParams::DEFINITION,
        }
    }

    /// The name of its entry and of its file.
    pub(crate) fn entry(self) -> &'static str {
        match (self.product().stage, self) {
            (Stage::GateUp, Self::Wgmma { .. }) => "gate_up_wgmma",
            (Stage::GateUp, Self::Swapped { .. }) => "gate_up_swapped",
            (Stage::GateUp, Self::Mma { .. }) => "gate_up_mma",
            (Stage::GateUp, Self::Dot { .. }) => "gate_up_dot",
            (Stage::GateUp, Self::Tiled { .. }) => "gate_up",
            (Stage::Down, Self::Wgmma { .. }) => "down_wgmma",
            (Stage::Down, Self::Swapped { .. }) => "down_swapped",
            (Stage::Down, Self::Mma { .. }) => "down_mma",
            (Stage::Down, Self::Dot { .. }) => "down_dot",
            (Stage::Down, Self::Tiled { .. }) => "down",
        }
    }

    /// The parts of its text from its parameters on.
    pub(crate) fn parts(self) -> Vec<&'static str> {
        let mut parts = vec![GroupedParams::DEFINITION, GROUPED];
        parts.extend(match self {
            Self::Wgmma { tile, .. } => wgmma_parts(tile).to_vec(),
            Self::Swapped { .. } => swapped_parts().to_vec(),
            Self::Mma { .. } => vec![include_str!("include/mma.cuh"), include_str!("include/grouped_mma.cuh")],
            Self::Dot { .. } => vec![STREAM, include_str!("include/grouped_dot.cuh")],
            Self::Tiled { .. } => vec![include_str!("include/tiles.cuh"), include_str!("include/grouped_tiled.cuh")],
        });
        parts.push(match (self.product().stage, self) {
            (Stage::GateUp, Self::Wgmma { .. }) => include_str!("gate_up_wgmma.cu"),
            (Stage::GateUp, Self::Swapped { .. }) => include_str!("gate_up_swapped.cu"),
            (Stage::GateUp, Self::Mma { .. }) => include_str!("gate_up_mma.cu"),
            (Stage::GateUp, Self::Dot { .. }) => include_str!("gate_up_dot.cu"),
            (Stage::GateUp, Self::Tiled { .. }) => include_str!("gate_up.cu"),
            (Stage::Down, Self::Wgmma { .. }) => include_str!("down_wgmma.cu"),
            (Stage::Down, Self::Swapped { .. }) => include_str!("down_swapped.cu"),
            (Stage::Down, Self::Mma { .. }) => include_str!("down_mma.cu"),
            (Stage::Down, Self::Dot { .. }) => include_str!("down_dot.cu"),
            (Stage::Down, Self::Tiled { .. }) => include_str!("down.cu"),
        });
        parts
    }

    /// What its text is specialised by.
    pub(crate) fn defines(self) -> Vec<(&'static str, String)> {
        let mut defines = self.product().defines();
        match self {
            Self::Wgmma { format, tile, ends, .. } => {
                defines.extend([("W_T", format.to_string()), ("TRANSPOSED", "false".into())]);
                defines.extend(tile.defines());
                defines.extend(ends.defines());
            }
            Self::Swapped { format, tile, ends, .. } => {
                defines.push(("W_T", format.to_string()));
                defines.extend(tile.defines());
                defines.extend(ends.of_pieces());
            }
            Self::Mma { format, tile, .. } => {
                defines.push(("W_T", format.to_string()));
                defines.extend(tile.defines());
            }
            Self::Dot { x, weight, vector, outputs, unroll, rows, .. } => defines.extend([
                ("X_T", x.to_string()),
                ("W_T", weight.to_string()),
                ("VEC", vector.to_string()),
                ("OUTPUTS", outputs.to_string()),
                ("UNROLL", unroll.to_string()),
                ("ROWS", rows.to_string()),
            ]),
            Self::Tiled { x, weight, vector, .. } => {
                defines.extend([("X_T", x.to_string()), ("W_T", weight.to_string()), ("VEC", vector.to_string())])
            }
        }
        defines
    }
}

/// Which rows are whose.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Groups {
    /// All of them the first expert's.
    One,
    /// Grouped by expert, as offsets `[E+1]` say; a row's slot is `row_slot[r]` where rows are gathered. `counter` is the
    /// address of a zero of this product's own, by which its blocks take tiles as they come; 0: each has its share.
    Offsets { offsets: Tensor, row_slot: Tensor, counter: u64 },
    /// The slots themselves, for which experts `[R]` are given, each in range.
    Slots { experts: Tensor },
}

/// Operands of [`grouped`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grouped {
    pub(crate) product: Product,
    /// R.
    pub(crate) rows: usize,
    pub(crate) groups: Groups,
    /// `[R, C]`, or `[T, C]` to gather from, and its format.
    pub(crate) x: (Tensor, DType),
    /// K, where rows are gathered.
    pub(crate) top_k: usize,
    /// f32, one a slot (a row without gather), in rows of so many: multiplies the row of x, by linearity the product.
    pub(crate) input_weights: (Tensor, usize),
    pub(crate) table: Table,
    /// The activation's limit and alpha.
    pub(crate) constants: (f32, f32),
    pub(crate) out: Tensor,
    /// Whether a row's bits must not depend on the others.
    pub(crate) invariant: bool,
    /// Whether all but the rows was there already when the launch before this one began: weights, which rows are
    /// whose, and the zero of a counter.
    pub(crate) early: bool,
}

/// Enqueues a grouped product.
pub(crate) fn grouped(cuda: &Cuda, stream: &CudaStream, operands: &Grouped) -> Result<()> {
    let Grouped { product, rows, groups, x: (x, x_format), table, input_weights, out, .. } = *operands;
    let sizes = plan::Sizes {
        product,
        rows,
        experts: table.experts,
        inner: table.inner,
        outputs: table.outputs,
        x: x_format,
        weight: table.format,
        slots: matches!(groups, Groups::Slots { .. }),
        invariant: operands.invariant,
        ends: Ends::of(operands),
        engine: wgmma::is_within_reach(operands),
    };
    let (w, inner) = (table.weights(), table.inner as u64);
    let aligned = |n: u64| x.aligned(n) && w.aligned(n) && inner.is_multiple_of(n);
    let plan = plan::grouped(&sizes, aligned, cuda.numbers());
    let neighbours = plan::neighbours(plan.kernel);
    let halves_aligned = product.activation.is_some() || (table.outputs as u64).is_multiple_of(neighbours);
    let mut params = GroupedParams {
        x,
        out,
        input_weights: input_weights.0,
        table: if matches!(groups, Groups::Slots { .. }) { 0 } else { table.entries },
        rows: rows as u64,
        top_k: operands.top_k as u32,
        input_columns: input_weights.1 as u32,
        neighbours: (halves_aligned && out.aligned(neighbours)).into(),
        limit: operands.constants.0,
        alpha: operands.constants.1,
        early: operands.early.into(),
        ..table.params()
    };
    match groups {
        Groups::One => {}
        Groups::Offsets { offsets, row_slot, counter } => {
            params.offsets = offsets.data;
            params.counter = counter;
            params.row_slot = if product.gather { row_slot.data } else { 0 };
        }
        Groups::Slots { experts } => params.slot_experts = experts.data,
    }
    if let Some(recorder) = cuda.recorder() {
        recorder.explain(plan.why);
    }
    let kernel = Kernel::Grouped(plan.kernel);
    match plan.kernel {
        GroupedKernel::Wgmma { tile, .. } => {
            launch(cuda, stream, kernel, plan.grid, &wgmma::params(cuda, operands, tile, params)?)
        }
        GroupedKernel::Swapped { .. } => {
            launch(cuda, stream, kernel, plan.grid, &wgmma::params_swapped(cuda, operands, params)?)
        }
        _ => launch(cuda, stream, kernel, plan.grid, &params),
    }
}
