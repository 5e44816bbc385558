//! The kernels of the gradients.

use super::{
    ACTIVATION, ActivationKind, Binding, COLUMNS, EIGHT, MATH, REDUCE, ROUTE, RULE, SCORE, WORDS, reads,
    reads_integers, size, writes,
};
use crate::grouped::{GROUPS, TILES};
use crate::launch::Params;
use crate::plan::backward as plan;
use crate::route::RuleKind;
use crate::{
    activation_backward, combine_backward, grouped_backward, losses, norm_backward as norm, route_backward as route,
};

/// A kernel and what it is specialised by, formats apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum BackwardKernel {
    Activation {
        activation: ActivationKind,
    },
    CombineRows,
    CombineWeights,
    CombineShared,
    /// Whether all rows are one expert's.
    GroupedRows {
        one: bool,
    },
    /// Whether x is gathered, or else d.
    GroupedMatrices {
        one: bool,
        gathers_x: bool,
    },
    GroupedBias {
        one: bool,
    },
    Norm,
    NormWeight,
    /// Threads a token, and experts a thread.
    Route {
        rule: RuleKind,
        threads: u32,
        keys: u32,
    },
    RouteScale,
    LoadBalance {
        score: &'static str,
        threads: u32,
        keys: u32,
    },
    ZLoss {
        threads: u32,
        keys: u32,
    },
    LossSum,
}

/// Where a gradient goes.
const GRADIENT: &str = include_str!("../include/gradient.wgsl");
/// What earlier launches made of it.
const PARTIAL: &str = include_str!("../include/partial.wgsl");
const COLUMN_SUMS: &str = include_str!("../include/column_sums.wgsl");
const SCORE_BACKWARD: &str = include_str!("../include/score_backward.wgsl");
const GROUPED_BACKWARD: &str = include_str!("../include/grouped_backward.wgsl");
const GROUPED_TILE: &str = include_str!("../include/grouped_tile.wgsl");
const CAPPED: &str = include_str!("../include/capped.wgsl");

const ACTIVATION_BACKWARD: &[Binding] = &[
    reads("gate"),
    reads("up"),
    reads("d_a"),
    reads_integers("row_slot"),
    reads("weights"),
    writes("d_gate"),
    writes("d_up"),
    writes("a"),
];
const COMBINE_WEIGHTS: &[Binding] = &[
    reads("y"),
    reads("d_a"),
    reads_integers("slot_row"),
    reads("bias"),
    reads_integers("experts"),
    reads("d_out"),
    writes("out"),
];
const GROUPED_ROWS: &[Binding] = &[
    reads("d"),
    reads("capped"),
    reads("matrix"),
    reads_integers("groups"),
    reads_integers("row_slot"),
    reads("weights"),
    reads("before"),
    writes("out"),
];
const GROUPED_MATRICES: &[Binding] = &[
    reads("d"),
    reads("capped"),
    reads("x"),
    reads_integers("groups"),
    reads_integers("row_slot"),
    reads("weights"),
    reads("before"),
    writes("out"),
];
const GROUPED_BIAS: &[Binding] = &[
    reads("d"),
    reads("capped"),
    reads_integers("groups"),
    reads_integers("row_slot"),
    reads("weights"),
    reads("before"),
    writes("out"),
];
const ROUTE_BACKWARD: &[Binding] =
    &[reads("logits"), reads_integers("experts"), reads("d_weights"), reads("scale"), writes("out"), writes("shares")];
const LOAD_BALANCE: &[Binding] =
    &[reads("logits"), reads_integers("experts"), reads_integers("sequences"), writes("out"), writes("shares")];

impl BackwardKernel {
    /// The name of its entry and of its file.
    pub(super) fn entry(self) -> &'static str {
        match self {
            Self::Activation { .. } => "activation_backward",
            Self::CombineRows => "combine_backward_rows",
            Self::CombineWeights => "combine_backward_weights",
            Self::CombineShared => "combine_backward_shared",
            Self::GroupedRows { .. } => "grouped_backward_rows",
            Self::GroupedMatrices { .. } => "grouped_backward_matrices",
            Self::GroupedBias { .. } => "grouped_backward_bias",
            Self::Norm => "norm_backward",
            Self::NormWeight => "norm_backward_weight",
            Self::Route { .. } => "route_backward",
            Self::RouteScale => "route_backward_scale",
            Self::LoadBalance { .. } => "load_balance_loss",
            Self::ZLoss { .. } => "z_loss",
            Self::LossSum => "loss_sum",
        }
    }

    /// The definition of its parameters, and their size in bytes.
    pub(super) fn params(self) -> (&'static str, u32) {
        fn of<P: Params>() -> (&'static str, u32) {
            (P::DEFINITION, size_of::<P>() as u32)
        }
        match self {
            Self::Activation { .. } => of::<activation_backward::ActivationBackwardParams>(),
            Self::CombineRows => of::<combine_backward::RowsParams>(),
            Self::CombineWeights => of::<combine_backward::WeightsParams>(),
            Self::CombineShared => of::<combine_backward::SharedParams>(),
            Self::GroupedRows { .. } | Self::GroupedMatrices { .. } | Self::GroupedBias { .. } => {
                of::<grouped_backward::GroupedBackwardParams>()
            }
            Self::Norm => of::<norm::NormBackwardParams>(),
            Self::NormWeight => of::<norm::WeightParams>(),
            Self::Route { .. } => of::<route::RouteBackwardParams>(),
            Self::RouteScale => of::<route::ScaleParams>(),
            Self::LoadBalance { .. } => of::<losses::LoadBalanceParams>(),
            Self::ZLoss { .. } => of::<losses::ZLossParams>(),
            Self::LossSum => of::<losses::LossSumParams>(),
        }
    }

    /// Its operands, in the order of their bindings.
    pub(super) fn bindings(self) -> &'static [Binding] {
        match self {
            Self::Activation { .. } => ACTIVATION_BACKWARD,
            Self::CombineRows => {
                const { &[reads("d_out"), reads("weights"), reads_integers("slot_row"), writes("out")] }
            }
            Self::CombineWeights => COMBINE_WEIGHTS,
            Self::CombineShared => const { &[reads("d_out"), reads("y"), reads("gate"), writes("d_y"), writes("out")] },
            Self::GroupedRows { .. } => GROUPED_ROWS,
            Self::GroupedMatrices { .. } => GROUPED_MATRICES,
            Self::GroupedBias { .. } => GROUPED_BIAS,
            Self::Norm => const { &[reads("x"), reads("d_n"), reads("weight"), writes("factors"), writes("out")] },
            Self::NormWeight => const { &[reads("x"), reads("d_n"), reads("factors"), reads("before"), writes("out")] },
            Self::Route { .. } => ROUTE_BACKWARD,
            Self::RouteScale => const { &[reads_integers("experts"), reads("shares"), reads("before"), writes("out")] },
            Self::LoadBalance { .. } => LOAD_BALANCE,
            Self::ZLoss { .. } => const { &[reads("logits"), writes("out"), writes("shares")] },
            Self::LossSum => const { &[reads("shares"), writes("out")] },
        }
    }

    /// Its own file, after the headers that it needs.
    pub(super) fn parts(self) -> Vec<&'static str> {
        let grouped = [GRADIENT, PARTIAL, GROUPS, GROUPED_BACKWARD].into_iter();
        let tiled = [EIGHT, COLUMNS, GROUPED_TILE, CAPPED];
        match self {
            Self::Activation { .. } => vec![MATH, ACTIVATION, include_str!("../activation_backward.wgsl")],
            Self::CombineRows => vec![include_str!("../combine_backward_rows.wgsl")],
            Self::CombineWeights => {
                vec![REDUCE, EIGHT, GRADIENT, include_str!("../combine_backward_weights.wgsl")]
            }
            Self::CombineShared => {
                vec![MATH, REDUCE, GRADIENT, include_str!("../combine_backward_shared.wgsl")]
            }
            Self::GroupedRows { .. } => {
                grouped.chain(tiled).chain([TILES, include_str!("../grouped_backward_rows.wgsl")]).collect()
            }
            Self::GroupedMatrices { .. } => {
                grouped.chain(tiled).chain([include_str!("../grouped_backward_matrices.wgsl")]).collect()
            }
            Self::GroupedBias { .. } => {
                grouped.chain([COLUMN_SUMS, include_str!("../grouped_backward_bias.wgsl")]).collect()
            }
            Self::Norm => vec![MATH, REDUCE, GRADIENT, include_str!("../norm_backward.wgsl")],
            Self::NormWeight => vec![GRADIENT, PARTIAL, COLUMN_SUMS, include_str!("../norm_backward_weight.wgsl")],
            Self::Route { .. } => {
                let through = [MATH, ROUTE, WORDS, SCORE, RULE, GRADIENT, SCORE_BACKWARD].into_iter();
                through.chain([include_str!("../route_backward.wgsl")]).collect()
            }
            Self::RouteScale => vec![GRADIENT, PARTIAL, include_str!("../route_backward_scale.wgsl")],
            Self::LoadBalance { .. } => {
                let through = [MATH, ROUTE, WORDS, SCORE, GRADIENT, SCORE_BACKWARD].into_iter();
                through.chain([include_str!("../load_balance_loss.wgsl")]).collect()
            }
            Self::ZLoss { .. } => {
                let through = [MATH, ROUTE, WORDS, SCORE, GRADIENT, SCORE_BACKWARD].into_iter();
                through.chain([include_str!("../z_loss.wgsl")]).collect()
            }
            Self::LossSum => vec![ROUTE, GRADIENT, include_str!("../loss_sum.wgsl")],
        }
    }

    /// Constants that its text reads: names and values.
    pub(super) fn constants(self) -> Vec<(&'static str, String)> {
        let find = |one| ("FIND", if one { "FIND_ONE" } else { "FIND_EXPERTS" }.to_owned());
        let sizes = |threads: u32, keys: u32| {
            let sizes = [("THREADS", threads), ("KEYS", keys), ("CAPACITY", (threads * keys).min(1024))];
            sizes.map(|(name, size)| (name, format!("{size}u")))
        };
        match self {
            Self::Activation { activation: ActivationKind { form, function } } => {
                vec![("FORM", form.into()), ("FUNCTION", function.into())]
            }
            Self::GroupedRows { one } => vec![find(one), size("TILE", plan::TILE)],
            Self::GroupedBias { one } => vec![find(one), size("COLUMNS", plan::COLUMNS)],
            Self::GroupedMatrices { one, gathers_x } => {
                vec![find(one), size("TILE", plan::TILE), ("GATHERS_X", gathers_x.to_string())]
            }
            Self::Route { rule, threads, keys } => rule.constants().into_iter().chain(sizes(threads, keys)).collect(),
            Self::LoadBalance { score, threads, keys } => {
                [("SCORE", score.to_owned())].into_iter().chain(sizes(threads, keys)).collect()
            }
            Self::ZLoss { threads, keys } => {
                [("SCORE", "SCORE_SOFTMAX".to_owned())].into_iter().chain(sizes(threads, keys)).collect()
            }
            Self::LossSum => sizes(256, 1).into(),
            Self::CombineWeights => vec![size("SLOTS", combine_backward::SLOTS)],
            Self::NormWeight => vec![size("COLUMNS", plan::COLUMNS)],
            Self::RouteScale => vec![size("THREADS", route::SCALES)],
            Self::CombineRows | Self::CombineShared | Self::Norm => vec![],
        }
    }

    /// Every kernel of every plan.
    #[cfg(test)]
    pub(super) fn all() -> Vec<Self> {
        let mut all = vec![Self::CombineRows, Self::CombineWeights, Self::CombineShared];
        all.extend([Self::Norm, Self::NormWeight, Self::RouteScale, Self::LossSum]);
        for one in [false, true] {
            all.extend([Self::GroupedRows { one }, Self::GroupedBias { one }]);
            all.extend([false, true].map(|gathers_x| Self::GroupedMatrices { one, gathers_x }));
        }
        let sizes = [(32, 1), (128, 4), (256, 16)];
        let rules = RuleKind::all().into_iter().zip(sizes.into_iter().cycle());
        all.extend(rules.map(|(rule, (threads, keys))| Self::Route { rule, threads, keys }));
        for (threads, keys) in sizes {
            let scores = ["SCORE_SOFTMAX", "SCORE_SIGMOID", "SCORE_SQRT_SOFTPLUS"];
            all.extend(scores.map(|score| Self::LoadBalance { score, threads, keys }));
            all.push(Self::ZLoss { threads, keys });
        }
        all.extend(super::activations().map(|activation| Self::Activation { activation: activation.into() }));
        all
    }
}
