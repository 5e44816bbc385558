//! Slots that overflow their expert's capacity.

use super::Check;
use crate::cases::{Case, Operation, Scale, Stage};
use crate::data::{Data, Spread, Tensor};
use crate::operands::{Expected, Operands, Output, Prepared};
use crate::tolerance;
use fused_moe_core::config::{Capacity, CapacityLimit, CapacityOrder};
use fused_moe_core::{Backend, DType, Permutation, operation, reference};

/// A case of drop_overflow.
#[derive(Clone, Debug)]
pub struct DropOverflow {
    /// T, K, E.
    pub sizes: [usize; 3],
    /// How the slots spread.
    pub spread: Spread,
    /// The rule.
    pub capacity: Capacity,
    /// Where sequences begin.
    pub sequences: Sequences,
    /// What makes tokens important, where their order follows it.
    pub importance: Importance,
    /// Whether some weights are not numbers.
    pub nan_weights: bool,
}

/// Where sequences begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sequences {
    /// All tokens are one.
    #[default]
    Absent,
    /// One, and it is given.
    One,
    /// Three of different lengths.
    Three,
    /// Some without tokens: the first, two in the middle, the last.
    Empty,
    /// The first begins after the first token, the last ends before the last one.
    Short,
    /// The last ones begin past the last token.
    Past,
    /// One a token.
    Many,
}

/// What makes tokens important.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Importance {
    /// Numbers from 0 to 1.
    Uniform,
    /// Few different numbers.
    Ties,
    /// NaN and infinities among numbers.
    NotFinite,
}

impl Sequences {
    /// `[N+1]`.
    pub(super) fn starts(self, tokens: usize) -> Option<Tensor> {
        let (third, half, last) = (tokens / 3, tokens / 2, tokens.saturating_sub(1));
        let starts = match self {
            Self::Absent => return None,
            Self::One => vec![0, tokens],
            Self::Three => vec![0, third, half, tokens],
            Self::Empty => vec![0, 0, third, third, third, half, tokens, tokens],
            Self::Short => vec![tokens.min(1), half.max(tokens.min(1)), last.max(tokens.min(1))],
            Self::Past => vec![0, half, tokens + 3, tokens + 9],
            Self::Many => (0..=tokens.max(1)).collect(),
        };
        Some(Tensor::ids([starts.len()], starts.into_iter().map(|start| start as u32).collect()))
    }
}

impl DropOverflow {
    fn importance(&self, data: Data) -> Option<Tensor> {
        let odd = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.5, 0.5];
        let value = |t: u64| match self.importance {
            Importance::Uniform => data.uniform(t),
            Importance::Ties => data.below(t, 3) as f64 / 4.0,
            Importance::NotFinite => odd[data.below(t, odd.len())],
        };
        let tokens = self.sizes[0];
        (self.capacity.order == CapacityOrder::Score)
            .then(|| Tensor::floats(DType::F32, [tokens], (0..tokens as u64).map(value)))
    }

    /// The weights that are left, untouched or divided by a sum of numbers above zero.
    fn weights(&self, left: Vec<f64>) -> Output {
        let [tokens, top_k, _] = self.sizes;
        let part = tolerance::sum(top_k, 1.0);
        let errors = left.iter().map(|weight| part * weight).collect();
        let mut output = Output::floats("weights", DType::F32, [tokens, top_k], [left, errors]);
        if let (None, Expected::Floats { allowed, .. }) = (self.capacity.renormalize, &mut output.expected) {
            allowed.fill(0.0);
        }
        output
    }
}

impl Check for DropOverflow {
    fn prepare(&self) -> Prepared {
        let [tokens, top_k, experts] = self.sizes;
        let data = Data::new("drop_overflow").of(&format!("{:?}", self.sizes));
        let ids = data.of("routes").routes(self.sizes, self.spread);
        let permutation = reference::permute(&reference::Permute { ids: ids.as_ids(), experts, local: 0..experts });
        let mut weights = data.of("weights").between(DType::F32, [tokens, top_k], 0.05, 0.9);
        if self.nan_weights {
            let values = weights.as_floats().to_vec();
            let values = values.iter().enumerate().map(|(slot, &w)| if slot % 5 == 2 { f64::NAN } else { w });
            weights = Tensor::floats(DType::F32, [tokens, top_k], values);
        }
        let mut prepared = Prepared::default();
        let slots = tokens * top_k;
        prepared.input("row_slot", Tensor::ids([slots], permutation.row_slot));
        prepared.input("slot_row", Tensor::ids([slots], permutation.slot_row));
        prepared.input("offsets", Tensor::ids([experts + 1], permutation.offsets));
        prepared.input_if("importance", self.importance(data.of("importance")));
        prepared.input_if("sequences", self.sequences.starts(tokens));
        let sequences = (self.sequences != Sequences::Absent).then(|| prepared.ids("sequences"));
        let (left, divided) = reference::drop_overflow(&reference::DropOverflow {
            capacity: self.capacity,
            ids: ids.as_ids(),
            weights: weights.as_floats(),
            slot_row: prepared.ids("slot_row"),
            importance: prepared.floats_if("importance"),
            sequences,
            experts,
            tokens,
            top_k,
        });
        prepared.output(self.weights(divided).over(weights));
        prepared.output(Output::ids("experts", [tokens, top_k], left).over(ids));
        prepared
    }

    fn call<B: Backend>(&self, backend: &B, stream: &B::Stream, mut operands: Operands<'_, B>) -> Result<(), B::Error> {
        let operands = operation::DropOverflow {
            capacity: self.capacity,
            permutation: Permutation {
                row_slot: operands.input("row_slot")?,
                slot_row: operands.input("slot_row")?,
                offsets: operands.input("offsets")?,
            },
            importance: operands.input_if("importance"),
            sequences: operands.input_if("sequences"),
            experts: operands.output("experts")?,
            weights: operands.output("weights")?,
        };
        backend.drop_overflow(stream, operands)
    }
}

fn case(drop: DropOverflow) -> Case {
    let [t, k, e] = drop.sizes;
    let Capacity { limit, order, renormalize } = drop.capacity;
    let limit = format!("{limit:?}").replace(&usize::MAX.to_string(), "max");
    let order = match order {
        CapacityOrder::Position => "Position".into(),
        CapacityOrder::Score => format!("{:?}", drop.importance),
    };
    let renormalize = renormalize.map_or(String::new(), |min| format!(" renormalised {min}"));
    let weights = if drop.nan_weights { " NaN weights" } else { "" };
    let sequences = drop.sequences;
    let name = format!("{limit} {order} {sequences:?} {:?}{renormalize}{weights} T={t} K={k} E={e}", drop.spread);
    let operation = Operation::DropOverflow(drop);
    Case { stage: Stage::DropOverflow, name, dtype: "u32".into(), placement: Default::default(), operation }
}

const SEQUENCES: [Sequences; 7] = [
    Sequences::Absent,
    Sequences::Three,
    Sequences::Empty,
    Sequences::Short,
    Sequences::Many,
    Sequences::Past,
    Sequences::One,
];
const SPREADS: [Spread; 5] = [Spread::Even, Spread::Skewed, Spread::Holes, Spread::One(1), Spread::Bad];
const ORDERS: [(CapacityOrder, Importance); 4] = [
    (CapacityOrder::Position, Importance::Uniform),
    (CapacityOrder::Score, Importance::Uniform),
    (CapacityOrder::Score, Importance::Ties),
    (CapacityOrder::Score, Importance::NotFinite),
];

/// The cases of drop_overflow.
pub(crate) fn cases(scale: Scale) -> Vec<Case> {
    let limits = [
        CapacityLimit::Slots(0),
        CapacityLimit::Slots(1),
        CapacityLimit::Slots(3),
        CapacityLimit::Slots(usize::MAX),
        CapacityLimit::Fraction(0.0),
        CapacityLimit::Fraction(0.1),
        CapacityLimit::Fraction(0.25),
        CapacityLimit::Fraction(3e38),
        CapacityLimit::EvenShare { factor: 0 },
        CapacityLimit::EvenShare { factor: 1 },
        CapacityLimit::EvenShare { factor: 2 },
        CapacityLimit::EvenShare { factor: usize::MAX },
    ];
    let renormalizes = [None, Some(0.0), Some(0.75)];
    let mut cases = Vec::new();
    let sizes = [[0, 2, 4], [1, 1, 1], [1, 3, 2], [5, 3, 12], [70, 1, 8], [64, 3, 60], [300, 2, 4096]];
    for sizes in sizes {
        // every limit in every order; of the rest, another part each time
        for (i, limit) in limits.into_iter().enumerate() {
            for (j, (order, importance)) in ORDERS.into_iter().enumerate().filter(|(j, _)| *j == 0 || *j == 1 + i % 3) {
                let (sequences, spread) = (SEQUENCES[(i + 3 * j) % 7], SPREADS[(i + 2 * j) % 5]);
                let capacity = Capacity { limit, order, renormalize: renormalizes[(i + j) % 3] };
                let drop = DropOverflow { sizes, spread, capacity, sequences, importance, nan_weights: false };
                cases.push(case(drop));
            }
        }
    }
    let limit = CapacityLimit::Slots(2);
    for sequences in SEQUENCES {
        let few = [Spread::Same(1), Spread::Nowhere].into_iter().filter(|_| sequences == Sequences::Three);
        for spread in [Spread::Skewed, Spread::Holes, Spread::One(1)].into_iter().chain(few) {
            for (j, (order, importance)) in ORDERS.into_iter().enumerate() {
                let renormalize = renormalizes[j % 3];
                let capacity = Capacity { limit, order, renormalize };
                let drop =
                    DropOverflow { sizes: [37, 2, 4], spread, capacity, sequences, importance, nan_weights: false };
                if importance == Importance::Uniform && spread == Spread::Skewed {
                    cases.push(case(drop.clone()).strided());
                    let capacity = Capacity { renormalize: None, ..capacity };
                    cases.push(case(DropOverflow { capacity, nan_weights: true, ..drop.clone() }));
                }
                cases.push(case(drop));
            }
        }
    }
    // what is above a whole number by a bit of f64 is the next one
    for (fraction, tokens, spread) in
        [(0.07, 100, Spread::One(1)), (0.15, 100, Spread::One(1)), (0.09, 300, Spread::Skewed)]
    {
        let capacity =
            Capacity { limit: CapacityLimit::Fraction(fraction), order: CapacityOrder::Position, renormalize: None };
        let (sequences, importance) = (Sequences::Absent, Importance::Uniform);
        let sizes = [tokens, 1, 4];
        cases.push(case(DropOverflow { sizes, spread, capacity, sequences, importance, nan_weights: false }));
    }
    let mut large =
        vec![([2000, 2, 16], Spread::Skewed), ([3001, 1, 3], Spread::Even), ([1500, 3, 513], Spread::One(7))];
    if scale == Scale::Full {
        large.extend([([9000, 2, 64], Spread::Skewed), ([16384, 1, 8], Spread::Holes)]);
    }
    for (sizes, spread) in large {
        for (j, (order, importance)) in ORDERS.into_iter().enumerate() {
            for (limit, sequences) in [
                (CapacityLimit::EvenShare { factor: 1 }, Sequences::Absent),
                (CapacityLimit::Fraction(0.1), Sequences::Three),
            ] {
                let capacity = Capacity { limit, order, renormalize: renormalizes[j % 3] };
                cases.push(case(DropOverflow { sizes, spread, capacity, sequences, importance, nan_weights: false }));
            }
        }
    }
    cases
}
