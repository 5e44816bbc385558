//! Every kernel, what it is specialised by, and the text it is compiled from.

mod backward;
mod bindings;
mod eight;
mod operand;
#[cfg(test)]
mod tests;

use crate::grouped::{GroupedKernel, GroupedParams};
use crate::launch::Params;
use crate::route::RuleKind;
use crate::{
    accumulate, activation, combine, copy, down_combine, drop_overflow, gate, linear, measure, permute, plan, route,
};
pub(crate) use backward::BackwardKernel;
use bindings::*;
use fused_moe_core::DType;
use fused_moe_core::config::{Activation, Function};
use std::fmt::Write;

/// A kernel and what it is specialised by, formats apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kernel {
    Activation {
        activation: ActivationKind,
    },
    Combine(CombineKernel),
    /// Slots at once.
    DownCombine {
        slots: u32,
        in_place: bool,
    },
    /// Threads a token, and keys a thread.
    Route {
        rule: RuleKind,
        threads: u32,
        keys: u32,
    },
    /// Of a gradient.
    Backward(BackwardKernel),
    GatherWeights,
    DropOverflow,
    Permute,
    PermuteCount,
    PermuteScan,
    PermuteScatter,
    TileSchedule,
    Zero,
    /// Whether acc is assigned and not added to.
    Accumulate {
        assign: bool,
    },
    Copy,
    Counts,
    ReadAll,
    Gate {
        dots: Dots,
        norm: bool,
    },
    GateTiled {
        norm: bool,
    },
    Linear {
        dots: Dots,
    },
    LinearTiled,
    Grouped(GroupedKernel),
}

/// Who makes dot products: of so many rows at once, a team of so many threads each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Dots {
    /// 1 or 4.
    pub(crate) tokens: u32,
    /// A power of two from 32 to 256.
    pub(crate) team: u32,
}

/// How a token's rows are added up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct CombineKernel {
    /// Whether a workgroup has a whole row, for its norm.
    pub(crate) norm: bool,
    /// Whether out is the residual.
    pub(crate) in_place: bool,
    /// Elements that a workgroup keeps; 0: it forms them again.
    pub(crate) stash: u32,
}

/// An operand as a kernel's text knows it: `load_<name>(i)` and, where it is written, `store_<name>(i, value)` take the
/// number of an element in the binding; `has_<name>` says whether it is there. Eight elements at once are in `eight`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Binding {
    pub(crate) name: &'static str,
    pub(crate) written: bool,
    pub(crate) kind: Kind,
}

/// What the elements of an operand are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// f32, f16 or bf16; loaded as f32.
    Float,
    /// u32.
    Integer,
    /// The status word: `raise(bits)`.
    Status,
}

pub(crate) const fn reads(name: &'static str) -> Binding {
    Binding { name, written: false, kind: Kind::Float }
}
pub(crate) const fn writes(name: &'static str) -> Binding {
    Binding { name, written: true, kind: Kind::Float }
}
pub(crate) const fn reads_integers(name: &'static str) -> Binding {
    Binding { name, written: false, kind: Kind::Integer }
}
pub(crate) const fn writes_integers(name: &'static str) -> Binding {
    Binding { name, written: true, kind: Kind::Integer }
}
pub(crate) const STATUS: Binding = Binding { name: "status", written: true, kind: Kind::Status };

/// Operands of a kernel, of which at most [`BINDINGS`] are there.
pub(crate) const OPERANDS: usize = 11;

/// How an operand of a launch is bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Slot {
    pub(crate) format: DType,
    /// Its buffer is written by the same launch, if not through this operand: wgpu wants it bound for writing then.
    pub(crate) shared: bool,
    /// Read by 16 bytes.
    pub(crate) wide: bool,
}

/// A kernel and the operands it is compiled for: what a pipeline is kept by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Variant {
    pub(crate) kernel: Kernel,
    pub(crate) slots: [Option<Slot>; OPERANDS],
}

/// An activation without its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ActivationKind {
    pub(crate) form: &'static str,
    pub(crate) function: &'static str,
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

const TYPES: &str = include_str!("include/types.wgsl");
const MATH: &str = include_str!("include/math.wgsl");
const ACTIVATION: &str = include_str!("include/activation.wgsl");
/// Sums; what they stand on is chosen by whether there are subgroups.
const REDUCE: &str = include_str!("include/reduce.wgsl");
const REDUCE_SUBGROUP: &str = include_str!("include/reduce_subgroup.wgsl");
const REDUCE_MEMORY: &str = include_str!("include/reduce_memory.wgsl");
/// Eight elements of an operand.
const EIGHT: &str = include_str!("include/eight.wgsl");
const DOT: &str = include_str!("include/dot.wgsl");
const TILE: &str = include_str!("include/tile.wgsl");
/// Products of columns in workgroup memory.
const COLUMNS: &str = include_str!("include/columns.wgsl");
/// Products of streamed weights.
const STREAMED: &str = include_str!("include/streamed.wgsl");
/// What a token's slots are added to.
const BESIDE: &str = include_str!("include/beside.wgsl");
const GATE: &str = include_str!("include/gate.wgsl");
/// Numbers as words that sort.
const WORDS: &str = include_str!("include/words.wgsl");
const ROUTE: &str = include_str!("include/route.wgsl");
const SCORE: &str = include_str!("include/score.wgsl");
/// What a routing rule is made of.
const RULE: &str = include_str!("include/rule.wgsl");
const CHOOSE: &str = include_str!("include/choose.wgsl");
const SCAN: &str = include_str!("include/scan.wgsl");
const PERMUTE: &str = include_str!("include/permute.wgsl");

impl Kernel {
    /// The name of its entry and of its file.
    pub(crate) fn entry(self) -> &'static str {
        match self {
            Self::Activation { .. } => "activation",
            Self::Combine(_) => "combine",
            Self::DownCombine { .. } => "down_combine",
            Self::Route { .. } => "route",
            Self::Backward(kernel) => kernel.entry(),
            Self::GatherWeights => "gather_weights",
            Self::DropOverflow => "drop_overflow",
            Self::Permute => "permute",
            Self::PermuteCount => "permute_count",
            Self::PermuteScan => "permute_scan",
            Self::PermuteScatter => "permute_scatter",
            Self::TileSchedule => "tile_schedule",
            Self::Zero => "zero",
            Self::Accumulate { .. } => "accumulate",
            Self::Copy => "copy",
            Self::Counts => "counts",
            Self::ReadAll => "read_all",
            Self::Gate { .. } => "gate",
            Self::GateTiled { .. } => "gate_tiled",
            Self::Linear { .. } => "linear",
            Self::LinearTiled => "linear_tiled",
            Self::Grouped(kernel) => kernel.entry(),
        }
    }

    /// The definition of its parameters, and their size in bytes.
    pub(crate) fn params(self) -> (&'static str, u32) {
        fn of<P: Params>() -> (&'static str, u32) {
            (P::DEFINITION, size_of::<P>() as u32)
        }
        match self {
            Self::Activation { .. } => of::<activation::ActivationParams>(),
            Self::Combine(_) => of::<combine::CombineParams>(),
            Self::DownCombine { .. } => of::<down_combine::DownCombineParams>(),
            Self::Route { .. } => of::<route::RouteParams>(),
            Self::Backward(kernel) => kernel.params(),
            Self::GatherWeights => of::<route::GatherWeightsParams>(),
            Self::DropOverflow => of::<drop_overflow::DropOverflowParams>(),
            Self::Permute | Self::PermuteCount | Self::PermuteScan | Self::PermuteScatter => {
                of::<permute::PermuteParams>()
            }
            Self::TileSchedule => of::<permute::TileScheduleParams>(),
            Self::Zero => of::<accumulate::ZeroParams>(),
            Self::Accumulate { .. } => of::<accumulate::AccumulateParams>(),
            Self::Copy => of::<copy::CopyParams>(),
            Self::Counts => of::<copy::CountsParams>(),
            Self::ReadAll => of::<measure::ReadAllParams>(),
            Self::Gate { .. } | Self::GateTiled { .. } => of::<gate::GateParams>(),
            Self::Linear { .. } | Self::LinearTiled => of::<linear::LinearParams>(),
            Self::Grouped(_) => of::<GroupedParams>(),
        }
    }

    /// Its operands, in the order of their bindings.
    pub(crate) fn bindings(self) -> &'static [Binding] {
        match self {
            Self::Activation { .. } => const { &[reads("gate"), reads("up"), writes("out")] },
            Self::Combine(_) => COMBINE,
            Self::DownCombine { .. } => DOWN_COMBINE,
            Self::DropOverflow => DROP_OVERFLOW,
            Self::Route { rule, .. } if rule.by_table() => ROUTE_BY_TABLE,
            Self::Route { .. } => ROUTE_BY_KEY,
            Self::Backward(kernel) => kernel.bindings(),
            Self::GatherWeights => {
                const { &[reads("scores"), reads_integers("experts"), reads("scale"), writes("weights"), STATUS] }
            }
            Self::Permute | Self::PermuteCount | Self::PermuteScatter => PERMUTE_SLOTS,
            Self::PermuteScan => const { &[writes_integers("slot_row"), writes_integers("offsets")] },
            Self::TileSchedule => TILE_SCHEDULE,
            Self::Zero => const { &[writes("out")] },
            Self::Accumulate { .. } => const { &[reads("weights"), reads("y"), writes("acc")] },
            Self::Copy => const { &[reads_integers("source"), writes_integers("out")] },
            Self::Counts => const { &[reads_integers("offsets"), writes_integers("out")] },
            Self::ReadAll => const { &[reads("from"), writes_integers("sink")] },
            Self::Gate { .. } | Self::GateTiled { .. } => {
                const {
                    &[
                        reads("x"),
                        reads("weight"),
                        reads("bias"),
                        reads("norm_weight"),
                        writes("normed"),
                        writes("logits"),
                    ]
                }
            }
            Self::Linear { .. } | Self::LinearTiled => {
                const { &[reads("x"), reads("weight"), reads("bias"), writes("out")] }
            }
            Self::Grouped(_) => {
                const {
                    &[
                        reads("x"),
                        reads("gate"),
                        reads("up"),
                        reads("bias"),
                        reads_integers("groups"),
                        reads_integers("row_slot"),
                        reads("input_weights"),
                        writes("out"),
                    ]
                }
            }
        }
    }

    /// Its own file, after the headers that it needs.
    fn parts(self) -> Vec<&'static str> {
        match self {
            Self::Activation { .. } => vec![MATH, ACTIVATION, include_str!("activation.wgsl")],
            Self::Combine(_) => vec![MATH, REDUCE, BESIDE, include_str!("combine.wgsl")],
            Self::DownCombine { .. } => vec![MATH, REDUCE, EIGHT, STREAMED, BESIDE, include_str!("down_combine.wgsl")],
            Self::Route { rule, .. } => {
                let mut parts = vec![MATH, ROUTE, WORDS, SCORE, RULE, include_str!("route.wgsl")];
                if rule.by_table() {
                    parts.push(include_str!("route_by_table.wgsl"));
                } else {
                    parts.extend([CHOOSE, include_str!("route_by_key.wgsl")]);
                }
                parts
            }
            Self::Backward(kernel) => kernel.parts(),
            Self::GatherWeights => vec![ROUTE, include_str!("gather_weights.wgsl")],
            Self::DropOverflow => vec![ROUTE, WORDS, include_str!("drop_overflow.wgsl")],
            Self::Permute => vec![SCAN, PERMUTE, include_str!("permute.wgsl")],
            Self::PermuteCount => vec![SCAN, PERMUTE, include_str!("permute_count.wgsl")],
            Self::PermuteScan => vec![SCAN, include_str!("permute_scan.wgsl")],
            Self::PermuteScatter => vec![SCAN, PERMUTE, include_str!("permute_scatter.wgsl")],
            Self::TileSchedule => vec![SCAN, include_str!("tile_schedule.wgsl")],
            Self::Zero => vec![include_str!("zero.wgsl")],
            Self::Accumulate { .. } => vec![include_str!("accumulate.wgsl")],
            Self::Copy => vec![include_str!("copy.wgsl")],
            Self::Counts => vec![include_str!("counts.wgsl")],
            Self::ReadAll => vec![EIGHT, include_str!("read_all.wgsl")],
            Self::Gate { .. } => vec![MATH, REDUCE, EIGHT, DOT, GATE, include_str!("gate.wgsl")],
            Self::GateTiled { .. } => vec![MATH, EIGHT, COLUMNS, TILE, GATE, include_str!("gate_tiled.wgsl")],
            Self::Linear { .. } => vec![REDUCE, EIGHT, DOT, include_str!("linear.wgsl")],
            Self::LinearTiled => vec![EIGHT, COLUMNS, TILE, include_str!("linear_tiled.wgsl")],
            Self::Grouped(kernel) => {
                let products: &[&str] = match kernel {
                    GroupedKernel::Dot { .. } => &[REDUCE, EIGHT, STREAMED],
                    GroupedKernel::Tiled { .. } => &[EIGHT, COLUMNS],
                };
                [MATH, ACTIVATION].iter().chain(products).copied().chain(kernel.parts()).collect()
            }
        }
    }

    /// Constants that its text reads: names and values.
    fn constants(self) -> Vec<(&'static str, String)> {
        match self {
            Self::Activation { activation: ActivationKind { form, function } } => {
                vec![("FORM", form.into()), ("FUNCTION", function.into())]
            }
            Self::Combine(CombineKernel { norm, in_place, stash }) => {
                vec![("NORM", norm.to_string()), ("IN_PLACE", in_place.to_string()), ("STASH", format!("{stash}u"))]
            }
            Self::DownCombine { slots, in_place } => {
                vec![("SLOTS", format!("{slots}u")), ("IN_PLACE", in_place.to_string())]
            }
            Self::Gate { dots, norm } => {
                let mut constants = dots.constants();
                constants.push(("SQUARES", norm.to_string()));
                constants
            }
            Self::GateTiled { norm } => vec![("SQUARES", norm.to_string()), size("TILE", plan::TILE)],
            Self::Linear { dots } => dots.constants(),
            Self::Grouped(kernel) => kernel.constants(),
            Self::Route { rule, threads, keys } => {
                let sizes = [("THREADS", threads), ("KEYS", keys), ("CAPACITY", (threads * keys).min(1024))];
                let mut constants = rule.constants();
                constants.extend(sizes.map(|(name, size)| (name, format!("{size}u"))));
                constants
            }
            Self::Backward(kernel) => kernel.constants(),
            Self::GatherWeights | Self::DropOverflow => vec![("THREADS", "32u".into()), ("CAPACITY", "32u".into())],
            Self::Permute | Self::PermuteCount | Self::PermuteScan | Self::PermuteScatter | Self::TileSchedule => {
                vec![]
            }
            Self::Accumulate { assign } => vec![("ASSIGN", assign.to_string())],
            Self::LinearTiled => vec![size("TILE", plan::TILE)],
            Self::Zero | Self::Copy | Self::Counts | Self::ReadAll => vec![],
        }
    }

    /// Every kernel of every plan.
    #[cfg(test)]
    pub(crate) fn all() -> Vec<Self> {
        let mut all = vec![Self::Zero, Self::Copy, Self::Counts, Self::ReadAll];
        all.extend(crate::plan::grouped::all().into_iter().map(Self::Grouped));
        all.extend([Self::Permute, Self::PermuteCount, Self::PermuteScan, Self::PermuteScatter]);
        all.extend([false, true].map(|assign| Self::Accumulate { assign }));
        all.extend([Self::GatherWeights, Self::DropOverflow, Self::TileSchedule]);
        let sizes = [(32, 1), (32, 4), (128, 4), (256, 16)].into_iter().cycle();
        let routes = RuleKind::all().into_iter().zip(sizes);
        all.extend(routes.map(|(rule, (threads, keys))| Self::Route { rule, threads, keys }));
        all.extend(BackwardKernel::all().into_iter().map(Self::Backward));
        all.extend(activations().map(|activation| Self::Activation { activation: activation.into() }));
        for (norm, in_place, stash) in [(false, false, 0), (false, true, 0), (true, false, 0), (true, true, 2048)] {
            all.push(Self::Combine(CombineKernel { norm, in_place, stash }));
        }
        for (slots, in_place) in [(1, false), (4, true), (8, false)] {
            all.push(Self::DownCombine { slots, in_place });
        }
        for dots in [Dots { tokens: 1, team: 32 }, Dots { tokens: 4, team: 256 }] {
            all.extend([Self::Linear { dots }, Self::Gate { dots, norm: false }, Self::Gate { dots, norm: true }]);
        }
        all.extend([Self::LinearTiled, Self::GateTiled { norm: false }, Self::GateTiled { norm: true }]);
        all
    }
}

impl Dots {
    fn constants(self) -> Vec<(&'static str, String)> {
        vec![("TOKENS", format!("{}u", self.tokens)), ("TEAM", format!("{}u", self.team))]
    }
}

impl Variant {
    /// The text that is compiled, with or without the adding up of subgroups.
    pub(crate) fn source(&self, subgroups: bool) -> String {
        let mut text = String::from(TYPES);
        for (name, value) in self.kernel.constants() {
            let _ = writeln!(text, "const {name} = {value};");
        }
        let parts = self.kernel.parts();
        for (index, (binding, slot)) in self.kernel.bindings().iter().zip(self.slots).enumerate() {
            operand::declare(&mut text, index, binding, slot);
            if eight::wanted(binding.name, &parts) {
                eight::declare(&mut text, binding.name, slot);
            }
        }
        let (params, _) = self.kernel.params();
        let _ = writeln!(text, "{params}var<immediate> p: Params;");
        for part in parts {
            if part == REDUCE {
                text.push('\n');
                text.push_str(if subgroups { REDUCE_SUBGROUP } else { REDUCE_MEMORY });
            }
            text.push('\n');
            text.push_str(part);
        }
        text
    }
}
/// A number that the text and its launcher share.
pub(crate) fn size(name: &'static str, size: usize) -> (&'static str, String) {
    (name, format!("{size}u"))
}

/// One activation of every kind.
#[cfg(test)]
fn activations() -> impl Iterator<Item = Activation> {
    let functions = [
        Function::Silu,
        Function::GeluTanh,
        Function::GeluErf,
        Function::Relu,
        Function::ReluSquared,
        Function::Identity,
    ];
    let (alpha, limit) = (1.0, 1.0);
    let clamped = [
        Activation::ClampedSilu { limit },
        Activation::ClampedSwish { alpha, limit },
        Activation::SiluThenClamp { limit },
        Activation::SoftcappedSilu { gate_cap: 1.0, up_cap: 1.0 },
    ];
    let plain = functions.into_iter().flat_map(|f| [Activation::Gated(f), Activation::Plain(f)]);
    clamped.into_iter().chain(plain)
}
