//! Every kernel, what it is specialised by, and the text it is compiled from.

use crate::launch::Params;
#[cfg(test)]
use crate::launch::Tensor;
use crate::grouped::GroupedKernel;
use crate::{accumulate, activation, combine, copy, gate, linear, permute, route};
use fused_moe_core::DType;
use fused_moe_core::config::{Activation, Function};

/// A kernel and what it is specialised by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kernel {
    Gate { x: DType, router: DType, vector: u8, tokens: u8, norm: bool },
    GateTiled { x: DType, router: DType, vector: u8, norm: bool },
    GateRoute { x: DType, router: DType, vector: u8, norm: bool },
    Route { logits: DType, threads: u16 },
    GatherWeights { scores: DType },
    Permute { warps: u8 },
    PermuteCount { warps: u8 },
    PermuteScan { parts: u16 },
    PermuteScatter { warps: u8 },
    TileSchedule,
    Activation { activation: ActivationKind, gate: DType, up: DType, out: DType },
    Combine { y: DType, out: DType, vector: u8, norm: bool, stash: bool },
    Linear { x: DType, weight: DType, vector: u8, tokens: u8 },
    LinearTiled { x: DType, weight: DType, vector: u8 },
    Zero,
    Accumulate,
    Copy,
    Counts,
    Grouped(GroupedKernel),
}

/// Threads a token of the fused gate and route.
pub(crate) const GATE_ROUTE_THREADS: u32 = 512;

/// An activation without its numbers, as the device's headers name it.
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
            Activation::Plain(function) => ("FORM_PLAIN", function),
            _ => ("FORM_UNKNOWN", Function::Identity),
        };
        let function = match function {
            Function::Silu => "FUNCTION_SILU",
            Function::GeluTanh => "FUNCTION_GELU_TANH",
            Function::GeluErf => "FUNCTION_GELU_ERF",
            Function::Relu => "FUNCTION_RELU",
            Function::ReluSquared => "FUNCTION_RELU_SQUARED",
            Function::Identity => "FUNCTION_IDENTITY",
            _ => "FUNCTION_UNKNOWN",
        };
        Self { form, function }
    }
}

const TYPES: &str = include_str!("include/types.cuh");
const REDUCE: &str = include_str!("include/reduce.cuh");
const DOT: &str = include_str!("include/dot.cuh");
const TILES: &str = include_str!("include/tile.cuh");
const GATE: &str = include_str!("include/gate.cuh");
const ROUTE: &str = include_str!("include/route.cuh");
const PERMUTE: &str = include_str!("include/permute.cuh");
const ACTIVATION: &str = include_str!("include/activation.cuh");

impl Kernel {
    /// The name of its entry and of its file.
    pub(crate) fn entry(self) -> &'static str {
        match self {
            Self::Gate { .. } => "gate",
            Self::GateTiled { .. } => "gate_tiled",
            Self::GateRoute { .. } => "gate_route",
            Self::Route { .. } => "route",
            Self::GatherWeights { .. } => "gather_weights",
            Self::Permute { .. } => "permute",
            Self::PermuteCount { .. } => "permute_count",
            Self::PermuteScan { .. } => "permute_scan",
            Self::PermuteScatter { .. } => "permute_scatter",
            Self::TileSchedule => "tile_schedule",
            Self::Activation { .. } => "activation",
            Self::Combine { .. } => "combine",
            Self::Linear { .. } => "linear",
            Self::LinearTiled { .. } => "linear_tiled",
            Self::Zero => "zero",
            Self::Accumulate => "accumulate",
            Self::Copy => "copy",
            Self::Counts => "counts",
            Self::Grouped(kernel) => kernel.entry(),
        }
    }

    /// The definition of its parameter.
    pub(crate) fn params(self) -> &'static str {
        match self {
            Self::Gate { .. } | Self::GateTiled { .. } => gate::GateParams::DEFINITION,
            Self::GateRoute { .. } => gate::GateRouteParams::DEFINITION,
            Self::Route { .. } => route::RouteParams::DEFINITION,
            Self::GatherWeights { .. } => route::GatherWeightsParams::DEFINITION,
            Self::Permute { .. } | Self::PermuteCount { .. } | Self::PermuteScan { .. } | Self::PermuteScatter { .. } => {
                permute::PermuteParams::DEFINITION
            }
            Self::TileSchedule => permute::TileScheduleParams::DEFINITION,
            Self::Activation { .. } => activation::ActivationParams::DEFINITION,
            Self::Combine { .. } => combine::CombineParams::DEFINITION,
            Self::Linear { .. } | Self::LinearTiled { .. } => linear::LinearParams::DEFINITION,
            Self::Zero => accumulate::ZeroParams::DEFINITION,
            Self::Accumulate => accumulate::AccumulateParams::DEFINITION,
            Self::Copy => copy::CopyParams::DEFINITION,
            Self::Counts => copy::CountsParams::DEFINITION,
            Self::Grouped(_) => crate::grouped::GroupedParams::DEFINITION,
        }
    }

    /// Headers, definitions and the kernel's own file, in order.
    fn parts(self) -> Vec<&'static str> {
        let (choice, gate) = (route::ChoiceParams::DEFINITION, gate::GateParams::DEFINITION);
        let permute = permute::PermuteParams::DEFINITION;
        let own = self.params();
        match self {
            Self::Gate { .. } => vec![REDUCE, DOT, own, GATE, include_str!("gate.cu")],
            Self::GateTiled { .. } => vec![TILES, own, GATE, include_str!("gate_tiled.cu")],
            Self::GateRoute { .. } => {
                vec![REDUCE, DOT, gate, GATE, choice, ROUTE, own, include_str!("gate_route.cu")]
            }
            Self::Route { .. } => vec![REDUCE, choice, ROUTE, own, include_str!("route.cu")],
            Self::GatherWeights { .. } => vec![REDUCE, own, include_str!("gather_weights.cu")],
            Self::Permute { .. } => vec![own, PERMUTE, include_str!("permute.cu")],
            Self::PermuteCount { .. } => vec![own, PERMUTE, include_str!("permute_count.cu")],
            Self::PermuteScan { .. } => vec![own, PERMUTE, include_str!("permute_scan.cu")],
            Self::PermuteScatter { .. } => vec![own, PERMUTE, include_str!("permute_scatter.cu")],
            Self::TileSchedule => vec![permute, PERMUTE, own, include_str!("tile_schedule.cu")],
            Self::Activation { .. } => vec![ACTIVATION, own, include_str!("activation.cu")],
            Self::Combine { .. } => vec![REDUCE, own, include_str!("combine.cu")],
            Self::Linear { .. } => vec![REDUCE, DOT, own, include_str!("linear.cu")],
            Self::LinearTiled { .. } => vec![TILES, own, include_str!("linear_tiled.cu")],
            Self::Zero => vec![own, include_str!("zero.cu")],
            Self::Accumulate => vec![own, include_str!("accumulate.cu")],
            Self::Copy => vec![own, include_str!("copy.cu")],
            Self::Counts => vec![own, include_str!("counts.cu")],
            Self::Grouped(kernel) => [vec![REDUCE, ACTIVATION, own], kernel.parts()].concat(),
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
        matches!(self, Self::Route { .. } | Self::GateRoute { .. } | Self::Permute { .. } | Self::Grouped(_))
    }

    /// What the text is specialised by.
    pub(crate) fn defines(self) -> Vec<(&'static str, String)> {
        let number = |n: u32| n.to_string();
        match self {
            Self::Gate { x, router, vector, tokens, norm } => vec![
                ("X_T", x.to_string()),
                ("ROUTER_T", router.to_string()),
                ("VEC", number(vector.into())),
                ("TOKENS", number(tokens.into())),
                ("NORM", norm.to_string()),
            ],
            Self::GateTiled { x, router, vector, norm } => vec![
                ("X_T", x.to_string()),
                ("ROUTER_T", router.to_string()),
                ("VEC", number(vector.into())),
                ("NORM", norm.to_string()),
            ],
            Self::GateRoute { x, router, vector, norm } => vec![
                ("X_T", x.to_string()),
                ("ROUTER_T", router.to_string()),
                ("VEC", number(vector.into())),
                ("NORM", norm.to_string()),
                ("THREADS", number(GATE_ROUTE_THREADS)),
            ],
            Self::Route { logits, threads } => {
                vec![("LOGITS_T", logits.to_string()), ("THREADS", number(threads.into()))]
            }
            Self::GatherWeights { scores } => vec![("SCORES_T", scores.to_string())],
            Self::Permute { warps } | Self::PermuteCount { warps } | Self::PermuteScatter { warps } => {
                vec![("WARPS", number(warps.into()))]
            }
            Self::PermuteScan { parts } => vec![("WARPS", number(32)), ("PARTS", number(parts.into()))],
            Self::TileSchedule => vec![("WARPS", number(32))],
            Self::Activation { activation, gate, up, out } => vec![
                ("FORM", activation.form.to_string()),
                ("FUNCTION", activation.function.to_string()),
                ("GATE_T", gate.to_string()),
                ("UP_T", up.to_string()),
                ("OUT_T", out.to_string()),
            ],
            Self::Combine { y, out, vector, norm, stash } => vec![
                ("Y_T", y.to_string()),
                ("OUT_T", out.to_string()),
                ("VEC", number(vector.into())),
                ("NORM", norm.to_string()),
                ("STASH", stash.to_string()),
            ],
            Self::Linear { x, weight, vector, tokens } => vec![
                ("X_T", x.to_string()),
                ("WEIGHT_T", weight.to_string()),
                ("VEC", number(vector.into())),
                ("TOKENS", number(tokens.into())),
            ],
            Self::LinearTiled { x, weight, vector } => vec![
                ("X_T", x.to_string()),
                ("WEIGHT_T", weight.to_string()),
                ("VEC", number(vector.into())),
            ],
            Self::Grouped(kernel) => kernel.defines(),
            Self::Zero | Self::Accumulate | Self::Copy | Self::Counts => vec![],
        }
    }

    /// Every kernel of every plan, formats and variants combined as far as they meet in one text.
    pub(crate) fn all() -> Vec<Self> {
        let floats = [DType::F32, DType::F16, DType::BF16];
        let mut all = vec![Self::TileSchedule, Self::Zero, Self::Accumulate, Self::Copy, Self::Counts];
        all.extend(crate::plan::grouped::all().into_iter().map(Self::Grouped));
        for x in floats {
            for threads in [32, 256] {
                all.push(Self::Route { logits: x, threads });
            }
            all.push(Self::GatherWeights { scores: x });
            for w in floats {
                for vector in [1, crate::plan::dot_vector(x, w)] {
                    for norm in [false, true] {
                        for tokens in crate::plan::TOKENS {
                            all.push(Self::Gate { x, router: w, vector, tokens, norm });
                        }
                        all.push(Self::GateRoute { x, router: w, vector, norm });
                    }
                    for tokens in crate::plan::TOKENS {
                        all.push(Self::Linear { x, weight: w, vector, tokens });
                    }
                }
                for vector in [1, 4] {
                    for norm in [false, true] {
                        all.push(Self::GateTiled { x, router: w, vector, norm });
                    }
                    all.push(Self::LinearTiled { x, weight: w, vector });
                    for (norm, stash) in [(false, false), (true, false), (true, true)] {
                        all.push(Self::Combine { y: x, out: w, vector, norm, stash });
                    }
                }
                for out in floats {
                    let activation = Activation::default().into();
                    all.push(Self::Activation { activation, gate: x, up: w, out });
                }
            }
        }
        let limit = 1.0;
        let mut activations = vec![
            Activation::ClampedSilu { limit },
            Activation::ClampedSwish { alpha: 1.0, limit },
            Activation::SiluThenClamp { limit },
        ];
        for function in [
            Function::Silu,
            Function::GeluTanh,
            Function::GeluErf,
            Function::Relu,
            Function::ReluSquared,
            Function::Identity,
        ] {
            activations.extend([Activation::Gated(function), Activation::Plain(function)]);
        }
        for activation in activations {
            let (activation, f32) = (activation.into(), DType::F32);
            all.push(Self::Activation { activation, gate: f32, up: f32, out: f32 });
        }
        for experts in [1, 128, 160, 256, 384, 512, 768, 1024, 2048, 4096] {
            let (warps, parts) = (crate::plan::permute_warps(experts), crate::plan::scan_parts(experts));
            all.extend([Self::Permute { warps }, Self::PermuteCount { warps }, Self::PermuteScatter { warps }]);
            all.push(Self::PermuteScan { parts });
        }
        let mut seen = std::collections::HashSet::new();
        all.retain(|&kernel| seen.insert(kernel));
        all
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
