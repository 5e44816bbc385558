//! Rows to tokens.

use super::{Check, magnitudes, sums};
use crate::cases::{Case, FLOATS, Operation, Scale, Stage, dtype_name};
use crate::data::{Data, Spread, Tensor};
use crate::operands::{Operands, Output, Prepared};
use crate::tolerance;
use fused_moe_core::operation::{Copies, NextNorm, Residual, SlotRows};
use fused_moe_core::reference::{self, SharedGate};
use fused_moe_core::{Backend, DType, operation};
use std::ops::Range;

/// A case of combine.
#[derive(Clone, Debug)]
pub struct Combine {
    /// T, K, H.
    pub sizes: [usize; 3],
    /// Formats of y, of everything else that is read, of everything that is written.
    pub dtypes: [DType; 3],
    /// How the slots spread over 5 experts where the rows are grouped by expert; `None`: y is in slots.
    pub permuted: Option<Spread>,
    /// What there is besides.
    pub parts: Parts,
}

/// The optional parts of combine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Parts {
    /// Whether there are weights.
    pub weights: bool,
    /// Factor on the sum.
    pub routed_scale: f32,
    /// The shared expert's part.
    pub shared: SharedPart,
    /// What the result is added to.
    pub residual: ResidualPart,
    /// Whether the norm is asked for, and whether it has a weight.
    pub norm: Option<bool>,
    /// How many experts copy the token: those before the last one.
    pub copies: Option<usize>,
}

/// The shared expert's part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SharedPart {
    /// There is none.
    None,
    /// Added as it is.
    Plain,
    /// Times a factor.
    Factor,
    /// Times a sigmoid.
    Logit,
}

/// What a result is added to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResidualPart {
    /// Nothing.
    None,
    /// Another buffer.
    Of,
    /// What is there.
    InPlace,
}

impl Parts {
    /// The weighted sum alone.
    pub const NONE: Self = Self {
        weights: true,
        routed_scale: 1.0,
        shared: SharedPart::None,
        residual: ResidualPart::None,
        norm: None,
        copies: None,
    };
}

const EPS: f32 = 0.02;
const SHARED_SCALE: f32 = 0.75;

/// What RMSNorm makes of rows, and what it may be off by.
pub(super) fn norm_errors(out: &[f64], normed: &[f64], errors: &[f64], hidden: usize) -> Vec<f64> {
    let rows = out.chunks(hidden.max(1)).zip(normed.chunks(hidden.max(1))).zip(errors.chunks(hidden.max(1)));
    rows.flat_map(|((out, normed), errors)| tolerance::normed(out, normed, errors)).collect()
}

impl Combine {
    /// How many experts there are.
    fn experts(&self) -> usize {
        self.sizes[1].max(5)
    }

    /// Those that copy the token.
    fn copies(&self) -> Option<Range<usize>> {
        let last = self.experts() - 1;
        self.parts.copies.map(|count| last - count..last)
    }

    /// Adds what is read: not a number where a copy, or no copy, stands in its place. Returns the slots' rows if they are grouped.
    fn inputs(&self, prepared: &mut Prepared) -> Option<Vec<u32>> {
        let [tokens, top_k, hidden] = self.sizes;
        let [y, other, written] = self.dtypes;
        let data = Data::new("combine").of(&format!("{:?}", self.sizes));
        let rows = tokens * top_k;
        let experts = self.experts();
        let slot_row = self.permuted.map(|spread| {
            let local = match (self.copies(), spread) {
                // the first that copies has rows all the same
                (Some(copying), _) => 0..(copying.start + 1).min(experts),
                (None, Spread::Skewed) => 0..experts / 2,
                (None, _) => 0..experts,
            };
            super::experts::permutation(data, [tokens, top_k, experts], spread, local).slot_row
        });
        let mut values = data.of("y").normal(y, [rows, hidden], 1.0).as_floats().to_vec();
        if let Some(copying) = self.copies() {
            let ids = data.of("routes").routes([tokens, top_k, experts], self.permuted.unwrap_or(Spread::Bad));
            let copied = |slot: &usize| copying.contains(&(ids.as_ids()[*slot] as usize));
            for slot in (0..rows).filter(copied) {
                let row = slot_row.as_ref().map_or(slot, |slot_row| slot_row[slot] as usize);
                values.get_mut(row * hidden..(row + 1) * hidden).into_iter().for_each(|row| row.fill(f64::NAN));
            }
            let mut x = data.of("x").tokens(other, [tokens, hidden]).as_floats().to_vec();
            for token in (0..tokens).filter(|token| !(token * top_k..(token + 1) * top_k).any(|slot| copied(&slot))) {
                x[token * hidden..(token + 1) * hidden].fill(f64::NAN);
            }
            prepared.input("copies_x", Tensor::floats(other, [tokens, hidden], x)).input("experts", ids);
        }
        match &slot_row {
            Some(slot_row) => prepared
                .input("y", Tensor::floats(y, [rows, hidden], values))
                .input("slot_row", Tensor::ids([rows], slot_row.clone())),
            None => prepared.input("y", Tensor::floats(y, [tokens, top_k, hidden], values)),
        };
        if self.parts.weights {
            prepared.input("weights", data.of("weights").between(DType::F32, [tokens, top_k], 0.02, 1.0));
        }
        if self.parts.shared != SharedPart::None {
            prepared.input("shared", data.of("shared").normal(other, [tokens, hidden], 1.0));
        }
        match self.parts.shared {
            SharedPart::Factor => drop(prepared.input("factor", data.of("factor").normal(other, [tokens], 1.0))),
            SharedPart::Logit => drop(prepared.input("logit", data.of("logit").normal(other, [tokens], 2.0))),
            _ => {}
        }
        match self.parts.residual {
            ResidualPart::None => {}
            ResidualPart::Of => {
                prepared.input("residual", data.of("residual").tokens(other, [tokens, hidden]));
            }
            ResidualPart::InPlace => {
                prepared.host.push(("residual", data.of("residual").tokens(written, [tokens, hidden])));
            }
        }
        if self.parts.norm == Some(true) {
            prepared.input("norm_weight", data.of("norm_weight").between(other, [hidden], 0.5, 1.5));
        }
        slot_row
    }
}

impl Check for Combine {
    fn prepare(&self) -> Prepared {
        let [tokens, top_k, hidden] = self.sizes;
        let mut prepared = Prepared::default();
        let slot_row = self.inputs(&mut prepared);
        let slot_row = slot_row.as_deref();
        let gate = match self.parts.shared {
            SharedPart::Factor => SharedGate::Factor(prepared.floats("factor")),
            SharedPart::Logit => SharedGate::Logit(prepared.floats("logit")),
            _ => SharedGate::None,
        };
        let shared = prepared.floats_if("shared");
        let op = reference::Combine {
            y: prepared.floats("y"),
            slot_row,
            weights: prepared.floats_if("weights"),
            copies: self.copies().map(|Range { start: first, end }| reference::Copies {
                x: prepared.floats("copies_x"),
                ids: prepared.ids("experts"),
                first,
                end,
            }),
            routed_scale: f64::from(self.parts.routed_scale),
            shared: shared.map(|y| reference::Shared { y, gate, scale: f64::from(SHARED_SCALE) }),
            residual: prepared.floats_if("residual"),
            norm: self
                .parts
                .norm
                .map(|_| reference::Norm { weight: prepared.floats_if("norm_weight"), eps: f64::from(EPS) }),
            tokens,
            hidden,
            top_k,
        };
        let combined = reference::combine(&op);
        let (y, weights, residual) = (magnitudes(op.y), op.weights.map(magnitudes), op.residual.map(magnitudes));
        let shared = shared.map(magnitudes);
        let copied = op.copies.map(|copies| magnitudes(copies.x));
        let factor = magnitudes(prepared.floats("factor"));
        let gate = if self.parts.shared == SharedPart::Factor { SharedGate::Factor(&factor) } else { gate };
        let magnitude = reference::combine(&reference::Combine {
            y: &y,
            weights: weights.as_deref(),
            copies: op.copies.zip(copied.as_deref()).map(|(copies, x)| reference::Copies { x, ..copies }),
            routed_scale: op.routed_scale.abs(),
            shared: shared.as_deref().map(|y| reference::Shared { y, gate, scale: f64::from(SHARED_SCALE) }),
            residual: residual.as_deref(),
            norm: None,
            ..op
        });
        let errors = sums(top_k + 4, magnitude.out);
        let normed = combined.normed.map(|normed| {
            let errors = norm_errors(&combined.out, &normed, &errors, hidden);
            Output::floats("normed", self.dtypes[2], [tokens, hidden], [normed, errors])
        });
        let mut out = Output::floats("out", self.dtypes[2], [tokens, hidden], [combined.out, errors]);
        if self.parts.residual == ResidualPart::InPlace {
            out.initial = prepared.host.pop().map(|(_, residual)| residual);
        }
        prepared.output(out).outputs.extend(normed);
        prepared
    }

    fn call<B: Backend>(&self, backend: &B, stream: &B::Stream, mut operands: Operands<'_, B>) -> Result<(), B::Error> {
        let y = operands.input("y")?;
        let operands = operation::Combine {
            rows: match operands.input_if("slot_row") {
                Some(slot_row) => SlotRows::Permuted { y, slot_row },
                None => SlotRows::Slots(y),
            },
            weights: operands.input_if("weights"),
            copies: match self.copies() {
                Some(Range { start: first, end }) => {
                    Some(Copies { x: operands.input("copies_x")?, experts: operands.input("experts")?, first, end })
                }
                None => None,
            },
            routed_scale: self.parts.routed_scale,
            shared: operands.input_if("shared").map(|y| operation::Shared {
                y,
                factor: operands.input_if("factor"),
                logit: operands.input_if("logit"),
                scale: SHARED_SCALE,
            }),
            residual: match self.parts.residual {
                ResidualPart::None => None,
                ResidualPart::Of => Some(Residual::Of(operands.input("residual")?)),
                ResidualPart::InPlace => Some(Residual::InPlace),
            },
            norm: match operands.output_if("normed") {
                Some(out) => Some(NextNorm { weight: operands.input_if("norm_weight"), eps: EPS, out }),
                None => None,
            },
            out: operands.output("out")?,
        };
        backend.combine(stream, operands)
    }
}

/// The cases of combine.
pub(crate) fn cases(scale: Scale) -> Vec<Case> {
    let case = |name: &str, combine: Combine| {
        let [t, k, h] = combine.sizes;
        let rows = combine.permuted.map_or("slots".into(), |spread| format!("{spread:?}"));
        let name = format!("{name} {rows} T={t} K={k} H={h}").trim_start().to_string();
        let (dtype, placement) = (dtype_name(combine.dtypes), Default::default());
        Case { stage: Stage::Combine, name, dtype, placement, operation: Operation::Combine(combine) }
    };
    let mut sizes = vec![[0, 2, 16], [1, 1, 1], [1, 8, 64], [5, 3, 37], [33, 2, 131], [9, 22, 17]];
    if scale == Scale::Full {
        sizes.extend([[512, 8, 256], [3, 4, 7168], [2100, 8, 24]]);
    }
    let none = Parts::NONE;
    let norm = Parts { norm: Some(true), ..none };
    let everything = Parts { routed_scale: 1.5, shared: SharedPart::Logit, residual: ResidualPart::Of, ..norm };
    let parts = [
        ("", none),
        ("no weights", Parts { weights: false, ..none }),
        ("scaled", Parts { routed_scale: 2.5, ..none }),
        ("shared", Parts { shared: SharedPart::Plain, ..none }),
        ("shared factor", Parts { shared: SharedPart::Factor, routed_scale: -0.5, ..none }),
        ("shared logit", Parts { shared: SharedPart::Logit, ..none }),
        ("residual", Parts { residual: ResidualPart::Of, ..none }),
        ("in place", Parts { residual: ResidualPart::InPlace, ..none }),
        ("norm", norm),
        ("norm without weight", Parts { norm: Some(false), ..none }),
        ("in place norm", Parts { residual: ResidualPart::InPlace, ..norm }),
        ("everything", everything),
    ];
    let spreads = [None, Some(Spread::Even), Some(Spread::Holes), Some(Spread::Skewed), Some(Spread::Nowhere)];
    let (f32, f16, bf16) = (DType::F32, DType::F16, DType::BF16);
    let mixed = [[f32, bf16, bf16], [bf16, f32, f32], [f16, f16, f32], [f32, f16, bf16], [bf16, f16, f16]];
    let mut cases = Vec::new();
    for dtypes in FLOATS.map(|dtype| [dtype; 3]).into_iter().chain(mixed) {
        let same = dtypes[0] == dtypes[1] && dtypes[1] == dtypes[2];
        for (name, parts) in parts {
            for &sizes in &sizes {
                for permuted in spreads {
                    let few = same || sizes[0] == 5 || sizes[0] == 1;
                    let plain = matches!(permuted, None | Some(Spread::Holes));
                    if !few || !(plain || parts == none || sizes[0] == 5) {
                        continue;
                    }
                    let combine = Combine { sizes, dtypes, permuted, parts };
                    if sizes[0] == 5 && plain {
                        cases.push(case(name, combine.clone()).strided());
                    }
                    cases.push(case(name, combine));
                }
            }
        }
        for (name, parts) in [
            ("copies", Parts { copies: Some(2), ..none }),
            ("no copies", Parts { copies: Some(0), ..none }),
            ("copies no weights", Parts { copies: Some(3), weights: false, routed_scale: -1.5, ..none }),
            ("copies in place norm", Parts { copies: Some(2), residual: ResidualPart::InPlace, ..norm }),
            ("copies everything", Parts { copies: Some(2), ..everything }),
        ] {
            for &sizes in &sizes {
                for permuted in [None, Some(Spread::Even), Some(Spread::Holes), Some(Spread::Bad)] {
                    let all = parts.residual == ResidualPart::Of;
                    let wanted = match sizes[0] {
                        5 => same || all,
                        0 | 1 => dtypes[0] == f32 && same,
                        _ => same && all,
                    };
                    if wanted {
                        let combine = Combine { sizes, dtypes, permuted, parts };
                        if all && sizes[0] == 5 {
                            cases.push(case(name, combine.clone()).strided());
                        }
                        cases.push(case(name, combine));
                    }
                }
            }
        }
    }
    cases
}
