//! The dense product, zeros, and a multiple added.

use super::{Check, magnitudes, sums};
use crate::cases::{Case, FLOATS, Operation, Scale, Stage, dtype_name};
use crate::data::Data;
use crate::operands::{Operands, Output, Prepared};
use crate::tolerance;
use fused_moe_core::{Backend, DType, operation, reference};

/// A case of linear.
#[derive(Clone, Debug)]
pub struct Linear {
    /// T, C, N.
    pub sizes: [usize; 3],
    /// Formats of x, of the weight and bias, of the output.
    pub dtypes: [DType; 3],
    /// Whether there is a bias.
    pub bias: bool,
}

impl Check for Linear {
    fn prepare(&self) -> Prepared {
        let [rows, inputs, outputs] = self.sizes;
        let data = Data::new("linear").of(&format!("{:?}", self.sizes));
        let mut prepared = Prepared::default();
        prepared.input("x", data.of("x").tokens(self.dtypes[0], [rows, inputs]));
        let weight = data.of("weight").normal(self.dtypes[1], [outputs, inputs], 1.0 / (inputs as f64).sqrt());
        prepared.input("weight", weight);
        prepared.input_if("bias", self.bias.then(|| data.of("bias").normal(self.dtypes[1], [outputs], 0.5)));
        let (x, weight, bias) = (prepared.floats("x"), prepared.floats("weight"), prepared.floats_if("bias"));
        let op = reference::Linear { x, weight, bias, rows, inputs, outputs };
        let y = reference::linear(&op);
        let (x, weight, bias) = (magnitudes(x), magnitudes(weight), bias.map(magnitudes));
        let op = reference::Linear { x: &x, weight: &weight, bias: bias.as_deref(), ..op };
        let errors = sums(inputs, reference::linear(&op));
        prepared.output(Output::floats("out", self.dtypes[2], [rows, outputs], [y, errors]));
        prepared
    }

    fn call<B: Backend>(&self, backend: &B, stream: &B::Stream, mut operands: Operands<'_, B>) -> Result<(), B::Error> {
        let operands = operation::Linear {
            x: operands.input("x")?,
            weight: operands.input("weight")?,
            bias: operands.input_if("bias"),
            out: operands.output("out")?,
        };
        backend.linear(stream, operands)
    }
}

/// A case of zero.
#[derive(Clone, Debug)]
pub struct Zero {
    /// T, H.
    pub sizes: [usize; 2],
    /// Format.
    pub dtype: DType,
}

impl Check for Zero {
    fn prepare(&self) -> Prepared {
        let zeros = || vec![0.0; self.sizes[0] * self.sizes[1]];
        let mut prepared = Prepared::default();
        prepared.output(match self.dtype {
            DType::U32 => Output::ids("out", self.sizes, vec![0; self.sizes[0] * self.sizes[1]]),
            dtype => Output::floats("out", dtype, self.sizes, [zeros(), zeros()]),
        });
        prepared
    }

    fn call<B: Backend>(&self, backend: &B, stream: &B::Stream, mut operands: Operands<'_, B>) -> Result<(), B::Error> {
        let out = operands.output("out")?;
        backend.zero(stream, operation::Zero { out })
    }
}

/// A case of accumulate.
#[derive(Clone, Debug)]
pub struct Accumulate {
    /// T, H.
    pub sizes: [usize; 2],
    /// Formats of the sum and of what is added.
    pub dtypes: [DType; 2],
    /// What has a factor of its own.
    pub factors: Factors,
}

/// What has a factor of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Factors {
    /// Nothing: there is one.
    Value,
    /// Each row.
    PerRow,
    /// Each column.
    PerColumn,
}

const FACTOR: f32 = -0.625;

impl Check for Accumulate {
    fn prepare(&self) -> Prepared {
        let [rows, hidden] = self.sizes;
        let data = Data::new("accumulate").of(&format!("{:?}", self.sizes));
        let acc = data.of("acc").tokens(self.dtypes[0], [rows, hidden]);
        let mut prepared = Prepared::default();
        prepared.input("y", data.of("y").normal(self.dtypes[1], [rows, hidden], 1.0));
        let count = match self.factors {
            Factors::Value => None,
            Factors::PerRow => Some(rows),
            Factors::PerColumn => Some(hidden),
        };
        prepared.input_if("weight", count.map(|count| data.of("weight").normal(DType::F32, [count], 0.5)));
        let (y, mut sum) = (prepared.floats("y"), acc.as_floats().to_vec());
        let mut magnitude = magnitudes(&sum);
        for i in 0..rows * hidden {
            let place = if self.factors == Factors::PerRow { i / hidden } else { i % hidden };
            let weight = prepared.floats_if("weight").map_or(f64::from(FACTOR), |weights| weights[place]);
            reference::accumulate(&mut sum[i..=i], weight, &y[i..=i]);
            reference::accumulate(&mut magnitude[i..=i], weight.abs(), &magnitudes(&y[i..=i]));
        }
        let errors = magnitude.iter().map(|&m| tolerance::sum(2, m)).collect();
        prepared.output(Output::floats("acc", self.dtypes[0], [rows, hidden], [sum, errors]).over(acc));
        prepared
    }

    fn call<B: Backend>(&self, backend: &B, stream: &B::Stream, mut operands: Operands<'_, B>) -> Result<(), B::Error> {
        let operands = operation::Accumulate {
            acc: operands.output("acc")?,
            weight: match operands.input_if("weight") {
                Some(weights) if self.factors == Factors::PerColumn => operation::Factor::PerColumn(weights),
                Some(weights) => operation::Factor::PerRow(weights),
                None => operation::Factor::Value(FACTOR),
            },
            y: operands.input("y")?,
        };
        backend.accumulate(stream, operands)
    }
}

/// The cases of linear, zero and accumulate.
pub(crate) fn cases(scale: Scale) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut push = |stage, name: String, dtype: String, operation, strided: bool| {
        let case = Case { stage, name, dtype, placement: Default::default(), operation };
        if strided {
            cases.push(case.clone().strided());
        }
        cases.push(case);
    };
    let mut sizes = vec![
        [0, 8, 4],
        [1, 1, 1],
        [1, 64, 32],
        [3, 37, 19],
        [17, 131, 1],
        [33, 65, 67],
        [70, 128, 64],
        [1030, 72, 130],
    ];
    if scale == Scale::Full {
        sizes.extend([[1, 4096, 512], [300, 512, 384], [129, 1031, 257]]);
    }
    let (f32, f16, bf16) = (DType::F32, DType::F16, DType::BF16);
    let mixed = [[f32, bf16, f32], [bf16, bf16, f32], [bf16, f32, bf16], [f16, f32, f32], [f16, bf16, f16]];
    for dtypes in FLOATS.map(|dtype| [dtype; 3]).into_iter().chain(mixed) {
        for &sizes in &sizes {
            for bias in [false, true] {
                let [t, c, n] = sizes;
                let name = format!("{} T={t} C={c} N={n}", if bias { "bias" } else { "" }).trim_start().to_string();
                let operation = Operation::Linear(Linear { sizes, dtypes, bias });
                push(Stage::Linear, name, dtype_name(dtypes), operation, t == 3 || t == 33);
            }
        }
    }
    for sizes in [[0, 8], [1, 1], [5, 37], [64, 1024], [3, 0]] {
        let [t, h] = sizes;
        for dtype in FLOATS.into_iter().chain([DType::U32]) {
            let operation = Operation::Zero(Zero { sizes, dtype });
            push(Stage::Zero, format!("T={t} H={h}"), dtype.to_string(), operation, t == 5);
        }
        for dtypes in
            FLOATS.map(|dtype| [dtype; 2]).into_iter().chain([[f32, bf16], [bf16, f32], [f16, f32], [f32, f16]])
        {
            for (kind, factors) in
                [("value", Factors::Value), ("per row", Factors::PerRow), ("per column", Factors::PerColumn)]
            {
                let name = format!("{kind} T={t} H={h}");
                let operation = Operation::Accumulate(Accumulate { sizes, dtypes, factors });
                push(Stage::Accumulate, name, dtype_name(dtypes), operation, t == 5);
            }
        }
    }
    cases
}
