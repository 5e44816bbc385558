//! The activation alone.

use super::Check;
use super::gate_up::ACTIVATIONS;
use crate::cases::{Case, FLOATS, Operation, Scale, Stage, dtype_name};
use crate::data::{Data, Tensor};
use crate::operands::{Expected, Operands, Output, Prepared};
use crate::tolerance;
use fused_moe_core::config::Activation;
use fused_moe_core::operation::ActivationOperands;
use fused_moe_core::reference::activate;
use fused_moe_core::{Backend, DType, operation};

/// A case of activation.
#[derive(Clone, Debug)]
pub struct Activate {
    /// Rows, I.
    pub sizes: [usize; 2],
    /// Formats of gate and up, and of the output.
    pub dtypes: [DType; 2],
    /// Which one.
    pub activation: Activation,
    /// How the operands lie.
    pub form: Form,
    /// Whether there are large numbers, NaN and infinities among them.
    pub extreme: bool,
}

/// How the operands lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Two buffers.
    Separate,
    /// The result replaces the gate.
    SeparateInPlace,
    /// I gates, then I ups.
    Halves,
    /// The result replaces the gates.
    HalvesInPlace,
    /// In turn.
    Interleaved,
    /// Up alone.
    Plain,
    /// The result replaces up.
    PlainInPlace,
}

impl Activate {
    fn values(&self, name: &str) -> Tensor {
        let [rows, intermediate] = self.sizes;
        let data = Data::new("activation").of(name).of(&format!("{:?}", self.sizes));
        let normal = data.normal(self.dtypes[0], [rows, intermediate], 2.0);
        if !self.extreme {
            return normal;
        }
        let odd = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -0.0, 100.0, -100.0, 1e4, -1e4, -20.0];
        let values = normal.as_floats().iter().enumerate().map(|(i, &x)| {
            if data.below(i as u64, 3) == 0 { odd[data.of("odd").below(i as u64, odd.len())] } else { x }
        });
        Tensor::floats(self.dtypes[0], [rows, intermediate], values.collect::<Vec<_>>())
    }

    /// Up, finite where the function of the gate may be too small for f32.
    fn up(&self, gate: &[f64]) -> Tensor {
        let up = self.values("up");
        let tamed = gate.iter().zip(up.as_floats()).map(|(&g, &u)| if g < -8.0 && u.is_infinite() { 3.0 } else { u });
        let tamed: Vec<f64> = if self.activation.is_gated() { tamed.collect() } else { up.as_floats().to_vec() };
        Tensor::floats(self.dtypes[0], self.sizes, tamed)
    }
}

impl Check for Activate {
    fn prepare(&self) -> Prepared {
        let [rows, width] = self.sizes;
        let gate = self.values("gate");
        let up = self.up(gate.as_floats());
        let (g, u) = (gate.as_floats().to_vec(), up.as_floats().to_vec());
        let values: Vec<f64> = g.iter().zip(&u).map(|(&g, &u)| activate(self.activation, g, u)).collect();
        let errors: Vec<f64> =
            g.iter().zip(&u).map(|(&g, &u)| tolerance::activated(self.activation, [g, u], [0.0; 2])).collect();
        let joined = |interleaved: bool| {
            let place = |i: usize| {
                let (row, column) = (i / (2 * width), i % (2 * width));
                let (half, column) =
                    if interleaved { (column % 2, column / 2) } else { (column / width, column % width) };
                let at = row * width + column;
                if half == 0 { g[at] } else { u[at] }
            };
            let values: Vec<f64> = (0..2 * rows * width).map(place).collect();
            Tensor::floats(self.dtypes[0], [rows, 2 * width], values)
        };
        let out = self.dtypes[1];
        let expected = || [values.clone(), errors.clone()];
        let mut prepared = Prepared::default();
        match self.form {
            Form::Separate => prepared.input("gate", gate).input("up", up).output(Output::floats(
                "out",
                out,
                [rows, width],
                expected(),
            )),
            Form::SeparateInPlace => {
                prepared.input("up", up).output(Output::floats("gate", out, [rows, width], expected()).over(gate))
            }
            Form::Halves | Form::Interleaved => prepared
                .input("gate_up", joined(self.form == Form::Interleaved))
                .output(Output::floats("out", out, [rows, width], expected())),
            Form::HalvesInPlace => {
                let (values, errors) = (&values, &errors);
                let each = |row: usize| (row * width..(row + 1) * width).map(|i| (values[i], errors[i]));
                let ups = |row: usize| u[row * width..(row + 1) * width].iter().map(|&u| (u, 0.0));
                let (values, errors) = (0..rows).flat_map(|row| each(row).chain(ups(row))).unzip();
                let mut output =
                    Output::floats("gate_up", out, [rows, 2 * width], [values, errors]).over(joined(false));
                if let Expected::Floats { allowed, .. } = &mut output.expected {
                    let left_alone = |i: &usize| i % (2 * width) >= width;
                    (0..allowed.len()).filter(left_alone).for_each(|i| allowed[i] = 0.0);
                }
                prepared.output(output)
            }
            Form::Plain => prepared.input("up", up).output(Output::floats("out", out, [rows, width], expected())),
            Form::PlainInPlace => prepared.output(Output::floats("up", out, [rows, width], expected()).over(up)),
        };
        prepared
    }

    fn call<B: Backend>(&self, backend: &B, stream: &B::Stream, mut operands: Operands<'_, B>) -> Result<(), B::Error> {
        let operands = match self.form {
            Form::Separate => ActivationOperands::Separate {
                gate: operands.input("gate")?,
                up: operands.input("up")?,
                out: operands.output("out")?,
            },
            Form::SeparateInPlace => {
                ActivationOperands::SeparateInPlace { gate: operands.output("gate")?, up: operands.input("up")? }
            }
            Form::Halves => {
                ActivationOperands::Halves { gate_up: operands.input("gate_up")?, out: operands.output("out")? }
            }
            Form::HalvesInPlace => ActivationOperands::HalvesInPlace { gate_up: operands.output("gate_up")? },
            Form::Interleaved => {
                ActivationOperands::Interleaved { gate_up: operands.input("gate_up")?, out: operands.output("out")? }
            }
            Form::Plain => ActivationOperands::Plain { up: operands.input("up")?, out: operands.output("out")? },
            Form::PlainInPlace => ActivationOperands::PlainInPlace { up: operands.output("up")? },
        };
        backend.activation(stream, operation::Activate { activation: self.activation, operands })
    }
}

/// The cases of activation.
pub(crate) fn cases(scale: Scale) -> Vec<Case> {
    let mut cases = Vec::new();
    let gated = [Form::Separate, Form::SeparateInPlace, Form::Halves, Form::HalvesInPlace, Form::Interleaved];
    let plain = [Form::Plain, Form::PlainInPlace];
    let in_place = [Form::SeparateInPlace, Form::HalvesInPlace, Form::PlainInPlace];
    let mut sizes = vec![[0, 16], [1, 1], [1, 64], [3, 37], [17, 131]];
    if scale == Scale::Full {
        sizes.extend([[1000, 768], [3, 8192]]);
    }
    let (f32, f16, bf16) = (DType::F32, DType::F16, DType::BF16);
    let mixed = [[f32, bf16], [bf16, f32], [f16, f32], [bf16, f16]];
    for (name, activation) in ACTIVATIONS {
        for &form in if activation.is_gated() { &gated[..] } else { &plain[..] } {
            for dtypes in FLOATS.map(|dtype| [dtype; 2]).into_iter().chain(mixed) {
                if in_place.contains(&form) && dtypes[0] != dtypes[1] {
                    continue;
                }
                for &sizes in &sizes {
                    let [rows, width] = sizes;
                    for extreme in [false, true] {
                        let kind = if extreme { " extreme" } else { "" };
                        let name = format!("{name} {form:?}{kind} R={rows} I={width}");
                        let dtype = dtype_name(dtypes);
                        let operation = Operation::Activation(Activate { sizes, dtypes, activation, form, extreme });
                        let case =
                            Case { stage: Stage::Activation, name, dtype, placement: Default::default(), operation };
                        if width == 37 {
                            cases.push(case.clone().strided());
                        }
                        cases.push(case);
                    }
                }
            }
        }
    }
    cases
}
