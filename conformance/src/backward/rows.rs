//! The gradients that go row by row: activation, combine, norm.

use super::{BackwardCase, BackwardOperation, CheckBackward, MODES, gradient, output};
use crate::cases::{FLOATS, Stage, dtype_name};
use crate::data::{Data, Spread, Tensor};
use crate::operands::{Operands, Output, Prepared};
use crate::stage::experts::permutation;
use crate::stage::gate_up::ACTIVATIONS;
use crate::stage::magnitudes;
use crate::tolerance;
use fused_moe_core::config::{self, Activation as Act};
use fused_moe_core::operation::{
    ActivationBackward, ActivationBackwardOperands, CombineBackward, DownBias, GradientMode, NormBackward, RowWeights,
    RowsGradient, SharedBackward, SlotRows, WeightsFrom, WeightsGradient,
};
use fused_moe_core::reference::{self, activate, activate_backward};
use fused_moe_core::{BackendBackward, DType, NO_ROW};

/// A case of activation_backward.
#[derive(Clone, Debug)]
pub struct Activation {
    /// Rows, I.
    pub sizes: [usize; 2],
    /// Formats of gate, up and d_a, and of the gradients.
    pub dtypes: [DType; 2],
    /// Which one.
    pub activation: Act,
    /// How gate and up lie.
    pub form: Form,
    /// Whether there are large numbers and NaN among them.
    pub extreme: bool,
    /// What rows are multiplied by; the activation is asked for once more where there is something.
    pub factors: Factors,
}

/// What rows are multiplied by. With a factor they are slots in another order, some of which do not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Factors {
    /// Nothing.
    None,
    /// A constant.
    Scale,
    /// That, and weights.
    Weights,
}

/// How gate and up lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Two buffers.
    Separate,
    /// I gates, then I ups.
    Halves,
    /// In turn.
    Interleaved,
    /// Up alone.
    Plain,
}

const ROW_SCALE: f32 = 1.25;

impl Activation {
    fn values(&self, name: &str) -> Vec<f64> {
        let data = Data::new("activation_backward").of(name).of(&format!("{:?}", self.sizes));
        let normal = data.normal(self.dtypes[0], self.sizes, 2.0);
        let odd = [f64::NAN, 0.0, -0.0, 100.0, -100.0, 1e4, -1e4, -20.0];
        let value = |(i, &x): (usize, &f64)| {
            let swapped = self.extreme && data.below(i as u64, 3) == 0;
            if swapped { odd[data.of("odd").below(i as u64, odd.len())] } else { x }
        };
        normal.as_floats().iter().enumerate().map(value).collect()
    }

    /// The two derivatives and what each may be off by.
    fn derivatives(&self, g: f64, u: f64) -> [[f64; 2]; 2] {
        let unit = DType::F32.epsilon();
        let [by_gate, by_up] = activate_backward(self.activation, g, u);
        let mut moved = [0.0f64; 2];
        for (dg, du) in [(-1.0, -1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, 1.0)] {
            let at = activate_backward(self.activation, g + 4.0 * unit * dg * g.abs(), u + 4.0 * unit * du * u.abs());
            moved = [moved[0].max((at[0] - by_gate).abs()), moved[1].max((at[1] - by_up).abs())];
        }
        let squared = |x: f64| match self.activation {
            Act::Gated(config::Function::ReluSquared) | Act::Plain(config::Function::ReluSquared) => 1.0 + x.abs(),
            _ => 1.0,
        };
        let terms = match self.activation {
            Act::Plain(_) => [0.0, 2.0 * squared(u)],
            _ => [2.0 * squared(g) * (u.abs() + 1.0), 2.0 * squared(g) * g.abs()],
        };
        [[by_gate, moved[0] + 16.0 * unit * terms[0]], [by_up, moved[1] + 16.0 * unit * terms[1]]]
    }
}

impl CheckBackward for Activation {
    fn prepare(&self) -> Prepared {
        let [rows, width] = self.sizes;
        let tensor = |values: Vec<f64>| Tensor::floats(self.dtypes[0], self.sizes, values);
        let (gate, up) = (tensor(self.values("gate")), tensor(self.values("up")));
        let data = Data::new("activation_backward").of(&format!("{:?}", self.sizes));
        let d_a = data.of("d_a").normal(self.dtypes[0], self.sizes, 0.7);
        let weighted = self.factors == Factors::Weights;
        let weights = weighted.then(|| data.of("weights").between(DType::F32, [rows], 0.1, 1.0));
        // the rows in reverse
        let slot = |row: usize| match row % 5 {
            1 => NO_ROW,
            3 => (rows + row) as u32,
            _ => (rows - 1 - row) as u32,
        };
        let row_slot: Vec<u32> = (0..rows).map(slot).collect();
        let weight = |row: usize| match row_slot[row] as usize {
            _ if self.factors == Factors::None => 1.0,
            slot if slot >= rows => 0.0,
            slot => f64::from(ROW_SCALE) * weights.as_ref().map_or(1.0, |weights| weights.as_floats()[slot]),
        };
        let (mut d, mut errors, mut a, mut a_errors) = ([vec![], vec![]], [vec![], vec![]], vec![], vec![]);
        for i in 0..rows * width {
            let (g, u) = (gate.as_floats()[i], up.as_floats()[i]);
            let g = if self.activation.is_gated() { g } else { 0.0 };
            let factor = weight(i / width) * d_a.as_floats()[i];
            for (n, [slope, error]) in self.derivatives(g, u).into_iter().enumerate() {
                d[n].push(factor * slope);
                errors[n].push(factor.abs() * error + tolerance::sum(2, (factor * slope).abs()));
            }
            a.push(activate(self.activation, g, u));
            a_errors.push(tolerance::activated(self.activation, [g, u], [0.0; 2]));
        }
        let mut prepared = Prepared::default();
        prepared.input("d_a", d_a);
        if self.factors != Factors::None {
            prepared.input_if("weights", weights).input("row_slot", Tensor::ids([rows], row_slot));
            prepared.output(Output::floats("a", self.dtypes[1], self.sizes, [a, a_errors]));
        }
        let joined = |[gate, up]: [&[f64]; 2]| -> Vec<f64> {
            let place = |i: usize| {
                let (row, column) = (i / (2 * width), i % (2 * width));
                let (half, column) = match self.form {
                    Form::Interleaved => (column % 2, column / 2),
                    _ => (column / width, column % width),
                };
                [gate, up][half][row * width + column]
            };
            (0..2 * rows * width).map(place).collect()
        };
        let out = self.dtypes[1];
        let [[d_gate, d_up], [gate_errors, up_errors]] = [d, errors];
        match self.form {
            Form::Separate => {
                prepared.input("gate", gate).input("up", up);
                prepared.output(Output::floats("d_gate", out, self.sizes, [d_gate, gate_errors]));
                prepared.output(Output::floats("d_up", out, self.sizes, [d_up, up_errors]));
            }
            Form::Plain => {
                prepared.input("up", up);
                prepared.output(Output::floats("d_up", out, self.sizes, [d_up, up_errors]));
            }
            Form::Halves | Form::Interleaved => {
                let both = joined([gate.as_floats(), up.as_floats()]);
                prepared.input("gate_up", Tensor::floats(self.dtypes[0], [rows, 2 * width], both));
                let expected = [joined([&d_gate, &d_up]), joined([&gate_errors, &up_errors])];
                prepared.output(Output::floats("d_gate_up", out, [rows, 2 * width], expected));
            }
        }
        prepared
    }

    fn call<B: BackendBackward>(
        &self,
        backend: &B,
        stream: &B::Stream,
        mut operands: Operands<'_, B>,
    ) -> Result<(), B::Error> {
        use ActivationBackwardOperands as To;
        let to = match self.form {
            Form::Separate => To::Separate {
                gate: operands.input("gate")?,
                up: operands.input("up")?,
                d_gate: operands.output("d_gate")?,
                d_up: operands.output("d_up")?,
            },
            Form::Halves => {
                To::Halves { gate_up: operands.input("gate_up")?, d_gate_up: operands.output("d_gate_up")? }
            }
            Form::Interleaved => {
                To::Interleaved { gate_up: operands.input("gate_up")?, d_gate_up: operands.output("d_gate_up")? }
            }
            Form::Plain => To::Plain { up: operands.input("up")?, d_up: operands.output("d_up")? },
        };
        let row_slot = operands.input_if("row_slot");
        let weights = operands.input_if("weights");
        let row_weights = row_slot.is_some().then_some(RowWeights { weights, row_slot, scale: ROW_SCALE });
        let (activation, d_a, a) = (self.activation, operands.input("d_a")?, operands.output_if("a"));
        backend.activation_backward(stream, ActivationBackward { activation, operands: to, d_a, row_weights, a })
    }
}

/// A case of combine_backward.
#[derive(Clone, Debug)]
pub struct Combine {
    /// T, K, H, I, E.
    pub sizes: [usize; 5],
    /// Formats of d_out, of the rows, of the gradients of rows.
    pub dtypes: [DType; 3],
    /// How the slots spread.
    pub spread: Spread,
    /// Whether rows are grouped by expert.
    pub permuted: bool,
    /// Whether the weights' gradient comes from the intermediate, with a bias of down.
    pub intermediate: bool,
    /// The shared expert's gate: none, a factor, a logit.
    pub gate: Option<&'static str>,
    /// How the weights' gradient is stored.
    pub mode: GradientMode,
}

const ROUTED: f32 = 1.75;
const SHARED: f32 = 0.6;

impl CheckBackward for Combine {
    fn prepare(&self) -> Prepared {
        let [tokens, top_k, hidden, intermediate, experts] = self.sizes;
        let (rows, [from, y_type, to]) = (tokens * top_k, self.dtypes);
        let data = Data::new("combine_backward").of(&format!("{:?}", self.sizes));
        let permutation = permutation(data, [tokens, top_k, experts], self.spread, 0..experts);
        let slot_row = self.permuted.then_some(&permutation.slot_row[..]);
        let d_out = data.of("d_out").normal(from, [tokens, hidden], 0.7);
        let weights = data.of("weights").between(DType::F32, [tokens, top_k], 0.05, 1.0);
        let y = data.of("y").normal(y_type, [rows, hidden], 1.0);
        let y_shared = data.of("y_shared").normal(y_type, [tokens, hidden], 1.0);
        let gates = data.of("gates").normal(DType::F32, [tokens], 1.5);
        let gate = |values| match self.gate {
            Some("factor") => reference::SharedGate::Factor(values),
            Some(_) => reference::SharedGate::Logit(values),
            None => reference::SharedGate::None,
        };
        let op = |d_out, y, weights, y_shared, gates| {
            let shared = Some(reference::Shared { y: y_shared, gate: gate(gates), scale: SHARED.into() });
            let (weights, routed_scale) = (Some(weights), f64::from(ROUTED));
            let op =
                reference::CombineBackward { d_out, y, slot_row, weights, routed_scale, shared, tokens, hidden, top_k };
            reference::combine_backward(&op)
        };
        let (o, w, s, g) = (d_out.as_floats(), weights.as_floats(), y_shared.as_floats(), gates.as_floats());
        let found = op(o, y.as_floats(), w, s, g);
        // a factor of a negative sign would cancel in the magnitudes; a logit must keep its own
        let g_magnitudes = if self.gate == Some("factor") { magnitudes(g) } else { g.to_vec() };
        let m = op(&magnitudes(o), &magnitudes(y.as_floats()), w, &magnitudes(s), &g_magnitudes);
        let sums = |n: usize, m: &[f64]| -> Vec<f64> { m.iter().map(|&m| tolerance::sum(n, m)).collect() };
        let mut prepared = Prepared::default();
        let (mut d_w, mut m_w, mut terms) = (found.weights.clone(), m.weights.clone(), hidden);
        if self.intermediate {
            let a = data.of("a").normal(y_type, [rows, intermediate], 0.8);
            let d_a = data.of("d_a").normal(y_type, [rows, intermediate], 0.8);
            let bias = data.of("bias").normal(y_type, [experts, hidden], 0.4);
            let ids = data.of("routes").routes([tokens, top_k, experts], self.spread);
            let of = |a: &[f64], d_a: &[f64], bias: &[f64], d_out: &[f64]| {
                let experts = ids.as_ids();
                let bias = Some(reference::DownBias { bias, experts, d_out, top_k, hidden });
                let (slot_row, routed_scale) = (&permutation.slot_row[..], f64::from(ROUTED));
                let op = reference::WeightsBackward { a, d_a, slot_row, bias, routed_scale, intermediate };
                reference::weights_backward(&op)
            };
            d_w = of(a.as_floats(), d_a.as_floats(), bias.as_floats(), o);
            let m = [&a, &d_a, &bias, &d_out].map(|tensor| magnitudes(tensor.as_floats()));
            (m_w, terms) = (of(&m[0], &m[1], &m[2], &m[3]), hidden + intermediate);
            prepared.input("a", a).input("d_a", d_a).input("bias", bias).input("ids", ids);
        }
        let f32 = DType::F32;
        prepared.output(output("d_weights", (f32, self.mode), [tokens, top_k], [d_w, sums(terms, &m_w)]));
        let errors = sums(2, &m.y);
        let rows_of_slots = permutation.slot_row.iter().filter(|row| **row != NO_ROW).count();
        let written = if self.permuted { rows_of_slots } else { rows };
        prepared.output(Output::floats("d_y", to, [rows, hidden], [found.y, errors]).only(written));
        prepared.output(Output::floats("d_y_shared", to, [tokens, hidden], [found.shared_y, sums(8, &m.shared_y)]));
        if self.gate.is_some() {
            let errors = sums(hidden + 16, &m.shared_gate);
            prepared.output(output("d_gate", (f32, self.mode), [tokens], [found.shared_gate, errors]));
            prepared.input("gates", gates);
        }
        prepared.input("d_out", d_out).input("weights", weights).input("y", y).input("y_shared", y_shared);
        prepared.input("slot_row", Tensor::ids([rows], permutation.slot_row));
        prepared
    }

    fn call<B: BackendBackward>(
        &self,
        backend: &B,
        stream: &B::Stream,
        mut operands: Operands<'_, B>,
    ) -> Result<(), B::Error> {
        let (y, slot_row) = (operands.input("y")?, operands.input("slot_row")?);
        let d_y = operands.output("d_y")?;
        let d_rows = if self.permuted { RowsGradient::Permuted { d_y, slot_row } } else { RowsGradient::Slots(d_y) };
        let from = if self.intermediate {
            let bias = Some(DownBias { bias: operands.input("bias")?, experts: operands.input("ids")? });
            WeightsFrom::Intermediate { a: operands.input("a")?, d_a: operands.input("d_a")?, slot_row, bias }
        } else if self.permuted {
            WeightsFrom::Rows(SlotRows::Permuted { y, slot_row })
        } else {
            WeightsFrom::Rows(SlotRows::Slots(y))
        };
        let out = gradient(&mut operands, "d_weights", self.mode);
        let gates = operands.input_if("gates");
        let shared = SharedBackward {
            y: Some(operands.input("y_shared")?),
            factor: gates.filter(|_| self.gate == Some("factor")),
            logit: gates.filter(|_| self.gate == Some("logit")),
            scale: SHARED,
            d_y: operands.output_if("d_y_shared"),
            d_gate: gradient(&mut operands, "d_gate", self.mode),
        };
        let operands = CombineBackward {
            d_out: operands.input("d_out")?,
            top_k: self.sizes[1],
            weights: Some(operands.input("weights")?),
            routed_scale: ROUTED,
            d_rows: Some(d_rows),
            d_weights: out.map(|out| WeightsGradient { from, out }),
            shared: Some(shared),
        };
        backend.combine_backward(stream, operands)
    }
}

/// A case of norm_backward.
#[derive(Clone, Debug)]
pub struct Norm {
    /// T, H.
    pub sizes: [usize; 2],
    /// Formats of x and d_n, of the gradients.
    pub dtypes: [DType; 2],
    /// Whether there is a weight.
    pub weight: bool,
    /// How the gradients are stored.
    pub mode: GradientMode,
}

impl CheckBackward for Norm {
    fn prepare(&self) -> Prepared {
        let [tokens, hidden] = self.sizes;
        let data = Data::new("norm_backward").of(&format!("{:?}", self.sizes));
        let x = data.of("x").tokens(self.dtypes[0], self.sizes);
        let d_n = data.of("d_n").normal(self.dtypes[0], self.sizes, 0.7);
        let weight = self.weight.then(|| data.of("weight").between(self.dtypes[0], [hidden], 0.5, 1.5));
        let of = |x: &[f64], d_n: &[f64]| {
            let (weight, eps) = (weight.as_ref().map(Tensor::as_floats), f64::from(1e-5f32));
            reference::rms_norm_backward(&reference::NormBackward { x, weight, eps, d_n, hidden })
        };
        let found = of(x.as_floats(), d_n.as_floats());
        // d_x is a difference of two terms: one of them alone, and the other by its sign turned
        let m = of(&magnitudes(x.as_floats()), &magnitudes(d_n.as_floats()));
        let mut errors = Vec::with_capacity(found.x.len());
        for (t, row) in x.as_floats().chunks_exact(hidden.max(1)).enumerate() {
            let length = (row.iter().map(|x| x * x).sum::<f64>() / hidden as f64 + 1e-5).sqrt();
            let w = |h: usize| weight.as_ref().map_or(1.0, |w| w.as_floats()[h]);
            let d = |h: usize| d_n.as_floats()[t * hidden + h].abs() * w(h) / length;
            let along = (0..hidden).map(|h| d(h) * row[h].abs()).sum::<f64>() / (hidden as f64 * length * length);
            errors.extend((0..hidden).map(|h| tolerance::sum(2 * hidden, d(h) + row[h].abs() * along)));
        }
        let to = (self.dtypes[1], self.mode);
        let mut prepared = Prepared::default();
        let terms = tokens + hidden;
        let weight_errors = m.weight.iter().map(|&m| tolerance::sum(terms, m)).collect();
        prepared.output(output("d_x", to, self.sizes, [found.x, errors]));
        prepared.output(output("d_weight", to, [hidden], [found.weight, weight_errors]));
        prepared.input("x", x).input("d_n", d_n).input_if("weight", weight);
        prepared
    }

    fn call<B: BackendBackward>(
        &self,
        backend: &B,
        stream: &B::Stream,
        mut operands: Operands<'_, B>,
    ) -> Result<(), B::Error> {
        let d_x = gradient(&mut operands, "d_x", self.mode);
        let d_weight = gradient(&mut operands, "d_weight", self.mode);
        let (x, d_n, weight) = (operands.input("x")?, operands.input("d_n")?, operands.input_if("weight"));
        backend.norm_backward(stream, NormBackward { x, weight, eps: 1e-5, d_n, d_x, d_weight })
    }
}

/// The cases of activation_backward, combine_backward and norm_backward.
pub(super) fn cases() -> Vec<BackwardCase> {
    let mut cases = Vec::new();
    let mut push = |stage, name: String, dtype: String, operation| {
        cases.push(BackwardCase { stage, name, dtype, placement: Default::default(), operation });
    };
    for (named, activation) in ACTIVATIONS {
        let gated = [Form::Separate, Form::Halves, Form::Interleaved];
        let forms: &[Form] = if activation.is_gated() { &gated } else { &[Form::Plain] };
        let (f32, bf16) = (DType::F32, DType::BF16);
        for &form in forms {
            for dtypes in FLOATS.map(|dtype| [dtype; 2]).into_iter().chain([[f32, bf16], [bf16, f32]]) {
                for sizes in [[0, 16], [1, 1], [3, 37], [17, 131], [2, 1500]] {
                    for (kind, extreme, factors) in [
                        ("", false, Factors::None),
                        (" extreme", true, Factors::None),
                        (" scaled", false, Factors::Scale),
                        (" weighted", false, Factors::Weights),
                    ] {
                        let name = format!("{named} {form:?}{kind} R={} I={}", sizes[0], sizes[1]);
                        let case = Activation { sizes, dtypes, activation, form, extreme, factors };
                        let operation = BackwardOperation::Activation(case);
                        push(Stage::ActivationBackward, name, dtype_name(dtypes), operation);
                    }
                }
            }
        }
    }
    let (f32, bf16) = (DType::F32, DType::BF16);
    for dtypes in FLOATS.map(|dtype| [dtype; 3]).into_iter().chain([[bf16, f32, f32], [f32, f32, bf16]]) {
        for (sizes, spread) in [
            ([0, 2, 16, 8, 4], Spread::Even),
            ([1, 1, 1, 1, 1], Spread::Even),
            ([7, 3, 45, 26, 9], Spread::Holes),
            ([16, 3, 40, 20, 6], Spread::Bad),
            ([5, 2, 2500, 1300, 6], Spread::Even),
        ] {
            for (named, mode) in MODES {
                for (permuted, intermediate, gate) in
                    [(false, false, None), (true, false, Some("factor")), (true, true, Some("logit"))]
                {
                    // a slot of no expert has no row: rows that are slots take every one
                    let from = if intermediate { "intermediate" } else { "rows" };
                    let name = format!("{named}{from} {gate:?} {spread:?} {sizes:?}");
                    let combine = Combine { sizes, dtypes, spread, permuted, intermediate, gate, mode };
                    push(Stage::CombineBackward, name, dtype_name(dtypes), BackwardOperation::Combine(combine));
                }
            }
        }
    }
    for dtypes in FLOATS.map(|dtype| [dtype; 2]).into_iter().chain([[bf16, f32]]) {
        for sizes in [[0, 16], [1, 1], [3, 37], [300, 65], [5, 2500]] {
            for (named, mode) in MODES {
                for weight in [false, true] {
                    let name = format!("{named}{} {sizes:?}", if weight { "weight" } else { "plain" });
                    let norm = Norm { sizes, dtypes, weight, mode };
                    push(Stage::NormBackward, name, dtype_name(dtypes), BackwardOperation::Norm(norm));
                }
            }
        }
    }
    let strided =
        |case: &BackwardCase| ["R=3 I=37", "[7, 3, 45, 26, 9]", "[3, 37]"].iter().any(|s| case.name.ends_with(s));
    let more: Vec<BackwardCase> =
        cases.iter().filter(|case| strided(case)).cloned().map(BackwardCase::strided).collect();
    cases.extend(more);
    cases
}
