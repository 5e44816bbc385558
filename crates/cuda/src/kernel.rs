//! Every kernel, what it is specialised by, and the text it is compiled from.

mod all;
pub(crate) mod backward;
mod headers;

use crate::combine::CombineKernel;
use crate::grouped::{self, GroupedKernel, Product};
use crate::launch::Params;
#[cfg(test)]
use crate::launch::Tensor;
use crate::plan::few::FewTile;
use crate::plan::pieces::Pieces;
use crate::{
    accumulate, activation, combine, copy, down_combine, drop_overflow, few, gate, linear, measure, permute, ring,
    route, route_permute,
};
use backward::BackwardKernel;
use fused_moe_core::DType;
use fused_moe_core::config::{Activation, Function};
use headers::*;

/// A kernel and what it is specialised by. `choice` is the format of logits and how many a lane has, `ring` warps and stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kernel {
    Gate { x: DType, router: DType, vector: u8, tokens: u8 },
    GateTiled { x: DType, router: DType, vector: u8 },
    GateMma { format: DType, weighted: bool, tile: SplitTile },
    GateRoute { x: DType, router: DType, vector: u8 },
    Route { logits: DType, threads: u16, lane_logits: u8 },
    RoutePermute { logits: DType, lane_logits: u8 },
    GatherWeights { scores: DType },
    Permute,
    PermuteCount,
    PermuteScan,
    PermuteScatter,
    DropOverflow,
    TileSchedule,
    Activation { activation: ActivationKind, pieces: Pieces },
    Combine(CombineKernel),
    Linear { x: DType, weight: DType, vector: u8 },
    LinearTiled { x: DType, weight: DType, vector: u8 },
    LinearMma { format: DType, tile: SplitTile },
    Zero,
    Accumulate,
    Copy,
    Counts,
    ReadAll,
    Grouped(GroupedKernel),
    Backward(BackwardKernel),
    DownCombine { x: DType, weight: DType, vector: u8, slots: u8, unroll: u8 },
    GateUpRing { product: Product, format: DType, choice: (DType, u8), ring: [u8; 2] },
    DownCombineRing { format: DType, choice: (DType, u8), ring: [u8; 2] },
    GateUpFew { product: Product, format: DType, choice: (DType, u8), tile: FewTile },
    DownCombineFew { format: DType, choice: (DType, u8), tile: FewTile },
}

/// Rows and columns that a block of a matrix product has, its warps a slice of the inner dimension each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct SplitTile {
    pub(crate) rows: u8,
    pub(crate) columns: u8,
}

/// Threads of a block of the split product on tensor cores, and of that in multiply-adds.
pub(crate) const SPLIT_THREADS: [u32; 2] = [256, 1024];

/// Tokens that a warp of a matrix-vector kernel takes at once.
pub(crate) const TOKENS: u32 = 4;

/// Threads a token of the fused gate and route.
pub(crate) const GATE_ROUTE_THREADS: u32 = 512;

/// An activation without its numbers, as the device's headers name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ActivationKind {
    pub(crate) form: &'static str,
    pub(crate) function: &'static str,
}

impl ActivationKind {
    /// What the text of its kernels is specialised by.
    fn defines(self) -> [(&'static str, String); 2] {
        [("FORM", self.form.to_string()), ("FUNCTION", self.function.to_string())]
    }
}

impl From<Activation> for ActivationKind {
    fn from(activation: Activation) -> Self {
        let (form, function) = match activation {
            Activation::Gated(function) => ("FORM_GATED", function),
            Activation::ClampedSilu { .. } => ("FORM_CLAMPED_SILU", Function::Silu),
            Activation::ClampedSwish { .. } => ("FORM_CLAMPED_SWISH", Function::Silu),
            Activation::SiluThenClamp { .. } => ("FORM_SILU_THEN_CLAMP", Function::Silu),
            Activation::SoftcappedSilu { .. } => ("FORM_SOFTCAPPED_SILU", Function::Silu),
            Activation::Plain(function) => ("FORM_PLAIN", function),
        };
        let function = match function {
            Function::Silu => "FUNCTION_SILU",
            Function::GeluTanh => "FUNCTION_GELU_TANH",
            Function::GeluErf => "FUNCTION_GELU_ERF",
            Function::Relu => "FUNCTION_RELU",
            Function::ReluSquared => "FUNCTION_RELU_SQUARED",
            Function::Identity => "FUNCTION_IDENTITY",
        };
        Self { form, function }
    }
}

impl Kernel {
    /// The name of its entry and of its file.
    pub(crate) fn entry(self) -> &'static str {
        match self {
            Self::Gate { .. } => "gate",
            Self::GateTiled { .. } => "gate_tiled",
            Self::GateMma { .. } => "gate_mma",
            Self::GateRoute { .. } => "gate_route",
            Self::Route { .. } => "route",
            Self::RoutePermute { .. } => "route_permute",
            Self::GatherWeights { .. } => "gather_weights",
            Self::Permute => "permute",
            Self::PermuteCount => "permute_count",
            Self::PermuteScan => "permute_scan",
            Self::PermuteScatter => "permute_scatter",
            Self::DropOverflow => "drop_overflow",
            Self::TileSchedule => "tile_schedule",
            Self::Activation { .. } => "activation",
            Self::Combine(_) => "combine",
            Self::Linear { .. } => "linear",
            Self::LinearTiled { .. } => "linear_tiled",
            Self::LinearMma { .. } => "linear_mma",
            Self::Zero => "zero",
            Self::Accumulate => "accumulate",
            Self::Copy => "copy",
            Self::Counts => "counts",
            Self::ReadAll => "read_all",
            Self::Grouped(kernel) => kernel.entry(),
            Self::Backward(kernel) => kernel.entry(),
            Self::DownCombine { .. } => "down_combine",
            Self::GateUpRing { .. } => "gate_up_ring",
            Self::DownCombineRing { .. } => "down_combine_ring",
            Self::GateUpFew { .. } => "gate_up_few",
            Self::DownCombineFew { .. } => "down_combine_few",
        }
    }

    /// The definition of its parameter.
    pub(crate) fn params(self) -> &'static str {
        match self {
            Self::Gate { .. } | Self::GateTiled { .. } | Self::GateMma { .. } => gate::GateParams::DEFINITION,
            Self::GateRoute { .. } => gate::GateRouteParams::DEFINITION,
            Self::Route { .. } => route::RouteParams::DEFINITION,
            Self::RoutePermute { .. } => route_permute::RoutePermuteParams::DEFINITION,
            Self::GatherWeights { .. } => route::GatherWeightsParams::DEFINITION,
            Self::Permute | Self::PermuteCount | Self::PermuteScan | Self::PermuteScatter => {
                permute::PermuteParams::DEFINITION
            }
            Self::DropOverflow => drop_overflow::DropOverflowParams::DEFINITION,
            Self::TileSchedule => permute::TileScheduleParams::DEFINITION,
            Self::Activation { .. } => activation::ActivationParams::DEFINITION,
            Self::Combine(_) => combine::CombineParams::DEFINITION,
            Self::Linear { .. } | Self::LinearTiled { .. } | Self::LinearMma { .. } => linear::LinearParams::DEFINITION,
            Self::Zero => accumulate::ZeroParams::DEFINITION,
            Self::Accumulate => accumulate::AccumulateParams::DEFINITION,
            Self::Copy => copy::CopyParams::DEFINITION,
            Self::Counts => copy::CountsParams::DEFINITION,
            Self::ReadAll => measure::ReadAllParams::DEFINITION,
            Self::Grouped(kernel) => kernel.params(),
            Self::Backward(kernel) => kernel.params(),
            Self::DownCombine { .. } => down_combine::DownCombineParams::DEFINITION,
            Self::GateUpRing { .. } => ring::GateUpRingParams::DEFINITION,
            Self::DownCombineRing { .. } => ring::DownCombineRingParams::DEFINITION,
            Self::GateUpFew { .. } => few::GateUpFewParams::DEFINITION,
            Self::DownCombineFew { .. } => few::DownCombineFewParams::DEFINITION,
        }
    }

    /// Headers, definitions and the kernel's own file, in order.
    fn parts(self) -> Vec<&'static str> {
        let (choice, gate) = (route::ChoiceParams::DEFINITION, gate::GateParams::DEFINITION);
        let permute = permute::PermuteParams::DEFINITION;
        let (route, down) = (route::RouteParams::DEFINITION, grouped::GroupedParams::DEFINITION);
        let own = self.params();
        match self {
            Self::Gate { .. } => vec![REDUCE, DOT, own, GATE, include_str!("gate.cu")],
            Self::GateTiled { .. } => vec![TILES, own, GATE, include_str!("gate_tiled.cu")],
            Self::GateMma { .. } => vec![MMA, SPLIT, own, GATE, include_str!("gate_mma.cu")],
            Self::GateRoute { .. } => {
                vec![REDUCE, DOT, gate, GATE, choice, ROUTE, own, include_str!("gate_route.cu")]
            }
            Self::Route { .. } => vec![REDUCE, choice, ROUTE, own, include_str!("route.cu")],
            Self::RoutePermute { .. } => {
                vec![REDUCE, CLUSTER, choice, ROUTE, route, permute, own, include_str!("route_permute.cu")]
            }
            Self::GatherWeights { .. } => vec![REDUCE, own, include_str!("gather_weights.cu")],
            Self::Permute => vec![own, PERMUTE, include_str!("permute.cu")],
            Self::PermuteCount => vec![own, PERMUTE, include_str!("permute_count.cu")],
            Self::PermuteScan => vec![own, PERMUTE, include_str!("permute_scan.cu")],
            Self::PermuteScatter => vec![own, PERMUTE, include_str!("permute_scatter.cu")],
            Self::DropOverflow => vec![REDUCE, own, include_str!("drop_overflow.cu")],
            Self::TileSchedule => vec![permute, PERMUTE, own, include_str!("tile_schedule.cu")],
            Self::Activation { .. } => vec![PIECES, ACTIVATION, own, include_str!("activation.cu")],
            Self::Combine(_) => vec![REDUCE, own, include_str!("combine.cu")],
            Self::Linear { .. } => vec![REDUCE, DOT, own, include_str!("linear.cu")],
            Self::LinearTiled { .. } => vec![TILES, own, include_str!("linear_tiled.cu")],
            Self::LinearMma { .. } => vec![MMA, SPLIT, own, include_str!("linear_mma.cu")],
            Self::Zero => vec![own, include_str!("zero.cu")],
            Self::Accumulate => vec![own, include_str!("accumulate.cu")],
            Self::Copy => vec![own, include_str!("copy.cu")],
            Self::Counts => vec![own, include_str!("counts.cu")],
            Self::ReadAll => vec![own, include_str!("read_all.cu")],
            Self::Grouped(kernel) => [vec![REDUCE, ACTIVATION], kernel.parts()].concat(),
            Self::Backward(kernel) => kernel.parts(),
            Self::DownCombine { .. } => {
                let parts = [grouped::STREAM, own, DOWN_COMBINE, include_str!("down_combine.cu")];
                [[REDUCE, ACTIVATION, down, grouped::GROUPED], parts].concat()
            }
            Self::GateUpRing { .. } => {
                let parts = [choice, ROUTE, route, own, RING, include_str!("gate_up_ring.cu")];
                [&[REDUCE, ACTIVATION, MMA, down, grouped::GROUPED][..], &parts].concat()
            }
            Self::DownCombineRing { .. } => {
                let combine = [down_combine::DownCombineParams::DEFINITION, DOWN_COMBINE];
                let parts = [choice, ROUTE, route, own, RING, include_str!("down_combine_ring.cu")];
                [&[REDUCE, ACTIVATION, MMA, down, grouped::GROUPED][..], &combine, &parts].concat()
            }
            Self::GateUpFew { .. } => {
                let parts = [choice, ROUTE, route, own, FEW, include_str!("gate_up_few.cu")];
                [&[REDUCE, ACTIVATION, MMA, down, grouped::GROUPED][..], &parts].concat()
            }
            Self::DownCombineFew { .. } => {
                let combine = [down_combine::DownCombineParams::DEFINITION, DOWN_COMBINE];
                let parts = [choice, ROUTE, route, own, FEW, include_str!("down_combine_few.cu")];
                [&[REDUCE, ACTIVATION, MMA, down, grouped::GROUPED][..], &combine, &parts].concat()
            }
        }
    }

    /// The text that is compiled.
    pub(crate) fn source(self) -> String {
        let mut text = String::from(TYPES);
        for part in self.parts() {
            text.push('\n');
            text.push_str(part);
        }
        text
    }

    /// Whether it may use more shared memory than a launch gives unasked.
    pub(crate) fn asks_for_shared(self) -> bool {
        match self {
            Self::Route { .. }
            | Self::GateRoute { .. }
            | Self::Permute
            | Self::Grouped(_)
            | Self::GateUpRing { .. }
            | Self::DownCombineRing { .. }
            | Self::GateUpFew { .. }
            | Self::DownCombineFew { .. } => true,
            Self::Backward(kernel) => kernel.asks_for_shared(),
            _ => false,
        }
    }

    /// Whether a multiprocessor is to have as much shared memory while it runs as it can: it needs little, but others before
    /// and behind it need much, and a multiprocessor's memory is divided anew only when it is idle.
    pub(crate) fn leaves_shared(self) -> bool {
        matches!(
            self,
            Self::Gate { .. }
                | Self::GateRoute { .. }
                | Self::Route { .. }
                | Self::RoutePermute { .. }
                | Self::Permute
                | Self::Combine(_)
        )
    }

    /// Whether it may begin before the launch before has ended; then it waits for that one by itself.
    pub(crate) fn takes_turn(self) -> bool {
        match self {
            Self::Gate { .. }
            | Self::GateTiled { .. }
            | Self::GateMma { .. }
            | Self::GateRoute { .. }
            | Self::Route { .. }
            | Self::RoutePermute { .. }
            | Self::Permute
            | Self::PermuteCount
            | Self::PermuteScan
            | Self::PermuteScatter
            | Self::Combine(_)
            | Self::Linear { .. }
            | Self::DownCombine { .. }
            | Self::GateUpRing { .. }
            | Self::DownCombineRing { .. }
            | Self::GateUpFew { .. }
            | Self::DownCombineFew { .. } => true,
            Self::Grouped(kernel) => kernel.takes_turn(),
            Self::Backward(_)
            | Self::GatherWeights { .. }
            | Self::DropOverflow
            | Self::TileSchedule
            | Self::Activation { .. }
            | Self::LinearTiled { .. }
            | Self::LinearMma { .. }
            | Self::Zero
            | Self::Accumulate
            | Self::Copy
            | Self::Counts
            | Self::ReadAll => false,
        }
    }

    /// Whether its blocks are one cluster.
    pub(crate) fn is_cluster(self) -> bool {
        matches!(self, Self::RoutePermute { .. })
    }

    /// What the text is specialised by.
    pub(crate) fn defines(self) -> Vec<(&'static str, String)> {
        let number = |n: u32| n.to_string();
        let product = |x: DType, name, weight: DType, vector: u8| {
            vec![("X_T", x.to_string()), (name, weight.to_string()), ("VEC", number(vector.into()))]
        };
        let with = |mut defines: Vec<_>, name, value| {
            defines.push((name, value));
            defines
        };
        let split = |format: DType, weighted: bool, tile: SplitTile| {
            vec![
                ("X_T", format.to_string()),
                ("WEIGHTED", u8::from(weighted).to_string()),
                ("TILE_M", tile.rows.to_string()),
                ("TILE_N", tile.columns.to_string()),
            ]
        };
        let ring = |product: Product, format: DType, (logits, lane_logits): (DType, u8), [warps, stages]: [u8; 2]| {
            let mut defines = product.defines();
            defines.extend([
                ("W_T", format.to_string()),
                ("LOGITS_T", logits.to_string()),
                ("LANE_LOGITS", number(lane_logits.into())),
                ("WARPS", number(warps.into())),
                ("STAGES", number(stages.into())),
                ("SPAN", crate::plan::ring::SPAN.to_string()),
                ("WIDE", crate::plan::ring::ROWS.to_string()),
            ]);
            defines
        };
        let few = |product: Product, format: DType, (logits, lane_logits): (DType, u8), tile: FewTile| {
            let mut defines = product.defines();
            defines.extend([
                ("W_T", format.to_string()),
                ("LOGITS_T", logits.to_string()),
                ("LANE_LOGITS", number(lane_logits.into())),
            ]);
            defines.extend(tile.defines());
            defines
        };
        match self {
            Self::Gate { x, router, vector, tokens } => {
                with(product(x, "ROUTER_T", router, vector), "TOKENS", tokens.to_string())
            }
            Self::GateTiled { x, router, vector } => product(x, "ROUTER_T", router, vector),
            Self::GateMma { format, weighted, tile } => split(format, weighted, tile),
            Self::GateRoute { x, router, vector } => {
                with(product(x, "ROUTER_T", router, vector), "THREADS", number(GATE_ROUTE_THREADS))
            }
            Self::Route { logits, threads, lane_logits } => vec![
                ("LOGITS_T", logits.to_string()),
                ("THREADS", number(threads.into())),
                ("LANE_LOGITS", number(lane_logits.into())),
            ],
            Self::RoutePermute { logits, lane_logits } => route_permute::defines(logits, lane_logits),
            Self::GatherWeights { scores } => vec![("SCORES_T", scores.to_string())],
            Self::Activation { activation, pieces } => {
                with([&activation.defines()[..], &pieces.defines()].concat(), "SIGMOID", pieces.sigmoid().to_string())
            }
            Self::Combine(kernel) => kernel.defines(),
            Self::Linear { x, weight, vector } => {
                with(product(x, "WEIGHT_T", weight, vector), "TOKENS", number(TOKENS))
            }
            Self::LinearTiled { x, weight, vector } => product(x, "WEIGHT_T", weight, vector),
            Self::LinearMma { format, tile } => split(format, false, tile),
            Self::Permute | Self::PermuteScan => vec![("COUNTERS", crate::workspace::COUNTERS.to_string())],
            Self::PermuteCount
            | Self::PermuteScatter
            | Self::DropOverflow
            | Self::TileSchedule
            | Self::Zero
            | Self::Accumulate
            | Self::Copy
            | Self::Counts
            | Self::ReadAll => vec![],
            Self::Grouped(kernel) => kernel.defines(),
            Self::Backward(kernel) => kernel.defines(),
            Self::DownCombine { x, weight, vector, slots, unroll } => {
                let mut defines = grouped::Product::DOWN.defines();
                defines.extend(product(x, "W_T", weight, vector));
                defines.extend([("SLOTS", number(slots.into())), ("UNROLL", number(unroll.into()))]);
                defines
            }
            Self::GateUpRing { product, format, choice, ring: of } => ring(product, format, choice, of),
            Self::DownCombineRing { format, choice, ring: of } => ring(Product::DOWN, format, choice, of),
            Self::GateUpFew { product, format, choice, tile } => {
                with(few(product, format, choice, tile), "CHUNKS", number(tile.chunks.into()))
            }
            Self::DownCombineFew { format, choice, tile } => few(Product::DOWN, format, choice, tile),
        }
    }

    /// Whether it has instructions of this architecture alone, where that is another.
    pub(crate) fn is_for(self, architecture: &str) -> bool {
        let warpgroups = match self {
            Self::Grouped(kernel) => kernel.has_warpgroups(),
            Self::Backward(kernel) => kernel.has_warpgroups(),
            _ => false,
        };
        !warpgroups || architecture == "sm_90a"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_has_its_entry_and_what_it_is_specialised_by() {
        for kernel in Kernel::all() {
            let source = kernel.source();
            assert!(source.contains(&format!(" {}(const __grid_constant__", kernel.entry())), "{kernel:?}");
            assert!(source.contains(kernel.params()), "{kernel:?}");
            assert_eq!(source.matches("extern \"C\"").count(), 1, "{kernel:?}");
            // high tiles, launched behind the launch before, have the text of low ones: they wait for nothing
            let waits = kernel.takes_turn() || matches!(kernel, Kernel::Grouped(GroupedKernel::Swapped { .. }));
            let own = source.strip_prefix(TYPES).unwrap();
            let turn = ["take_turn();", "wait_for_launch_before();"].iter().any(|wait| own.contains(wait));
            assert_eq!(turn, waits, "{kernel:?}");
            // only beside such launches does it matter
            assert!(!kernel.leaves_shared() || kernel.takes_turn(), "{kernel:?}");
            for (name, value) in kernel.defines() {
                assert!(source.contains(name), "{kernel:?}: {name} is not read");
                assert!(!value.contains("UNKNOWN"), "{kernel:?}");
            }
        }
    }

    #[test]
    fn the_operand_struct_is_the_headers() {
        let fields = |text: &str| text.split_whitespace().collect::<String>();
        assert!(fields(TYPES).contains(&fields(Tensor::DEFINITION)));
    }
}
