//! The gradients of the experts' matrices.

use super::{BackwardCase, BackwardOperation, CheckBackward, MODES, gradient, output};
use crate::cases::{FLOATS, Scale, Stage, dtype_name};
use crate::data::{Data, Spread, Tensor};
use crate::operands::{Operands, Output, Prepared};
use crate::stage::experts::{grouped_sizes, permutation};
use crate::stage::magnitudes;
use crate::tolerance;
use fused_moe_core::operation::{self, GradientMode, RowSource, RowWeights};
use fused_moe_core::reference::{self, DownGradients};
use fused_moe_core::{BackendBackward, DType, NO_ROW, Permutation};

/// A case of down_backward or gate_up_backward: with C columns of what comes in and N of what went in, the one is the
/// other.
#[derive(Clone, Debug)]
pub struct Grouped {
    /// Which of the two.
    pub stage: Stage,
    /// T, K, C, N, E.
    pub sizes: [usize; 5],
    /// How the slots spread.
    pub spread: Spread,
    /// Formats of the rows, of the matrices, of the gradients.
    pub dtypes: [DType; 3],
    /// Whether the gathered operand holds rows.
    pub rows: bool,
    /// Whether it is weighted.
    pub weights: bool,
    /// How the matrices' gradients are stored.
    pub mode: GradientMode,
    /// Which gradients are asked for: rows, matrices, bias.
    pub wanted: [bool; 3],
}

const SCALE: f32 = 1.5;

impl Grouped {
    fn is_down(&self) -> bool {
        self.stage == Stage::DownBackward
    }

    /// Rows of the gathered operand, as they come and as each row reads them.
    fn gathered(&self, tensor: &Tensor, permutation: &reference::Permutation, weights: Option<&Tensor>) -> Vec<f64> {
        let (width, top_k) = (tensor.shape().cols(), self.sizes[1]);
        let scale = if self.is_down() && weights.is_some() { f64::from(SCALE) } else { 1.0 };
        let mut rows = Vec::new();
        for (row, &slot) in permutation.row_slot.iter().enumerate() {
            if slot == NO_ROW {
                rows.extend(vec![0.0; width]);
                continue;
            }
            let (slot, source) = if self.rows { (row, row) } else { (slot as usize, slot as usize / top_k) };
            let weight = scale * weights.map_or(1.0, |weights| weights.as_floats()[slot]);
            rows.extend(tensor.as_floats()[source * width..(source + 1) * width].iter().map(|x| weight * x));
        }
        rows
    }
}

/// Rows that no expert has are not numbers, where `rows` are what it holds.
fn unread(tensor: Tensor, rows: bool, written: usize) -> Tensor {
    if !rows {
        return tensor;
    }
    let first = written * tensor.shape().cols();
    let values = tensor.as_floats().iter().enumerate().map(|(i, &v)| if i < first { v } else { f64::NAN });
    Tensor::floats(tensor.dtype(), tensor.shape(), values)
}

impl CheckBackward for Grouped {
    fn prepare(&self) -> Prepared {
        let [tokens, top_k, outputs, inputs, experts] = self.sizes;
        let data = Data::new("grouped_backward").of(&format!("{:?}", self.sizes));
        let permutation = permutation(data, [tokens, top_k, experts], self.spread, 0..experts);
        let (rows, written) = (tokens * top_k, permutation.offsets[experts] as usize);
        let source = if self.rows { rows } else { tokens };
        let d_rows = if self.is_down() { source } else { rows };
        let x_rows = if self.is_down() { rows } else { source };
        let (down, given) = (self.is_down(), self.rows);
        let d = unread(data.of("d").normal(self.dtypes[0], [d_rows, outputs], 0.5), !down || given, written);
        let x = unread(data.of("x").normal(self.dtypes[0], [x_rows, inputs], 0.7), down || given, written);
        let deviation = 1.3 / (inputs as f64).sqrt();
        let matrices = data.of("matrices").normal(self.dtypes[1], [experts, outputs, inputs], deviation);
        let weights = self.weights.then(|| data.of("weights").between(DType::F32, [tokens, top_k], 0.05, 1.0));
        let (d_of_rows, x_of_rows) = if self.is_down() {
            (self.gathered(&d, &permutation, weights.as_ref()), x.as_floats().to_vec())
        } else {
            (d.as_floats().to_vec(), self.gathered(&x, &permutation, weights.as_ref()))
        };
        let backward = |d_y: &[f64], a: &[f64], down: &[f64]| {
            let (offsets, hidden, intermediate) = (&permutation.offsets[..], outputs, inputs);
            reference::down_backward(&reference::DownBackward { d_y, a, offsets, down, rows, hidden, intermediate })
        };
        let found = backward(&d_of_rows, &x_of_rows, matrices.as_floats());
        let DownGradients { a, down, bias } =
            backward(&magnitudes(&d_of_rows), &magnitudes(&x_of_rows), &magnitudes(matrices.as_floats()));
        let most = permutation.counts().into_iter().max().unwrap_or(0) as usize;
        let sums = |n: usize, magnitudes: Vec<f64>| -> Vec<f64> {
            magnitudes.into_iter().map(|m| tolerance::sum(n, m)).collect()
        };
        let mut prepared = Prepared::default();
        prepared.input("d", d).input("x", x).input("matrices", matrices).input_if("weights", weights);
        prepared.input("row_slot", Tensor::ids([rows], permutation.row_slot));
        prepared.input("slot_row", Tensor::ids([rows], permutation.slot_row));
        prepared.input("offsets", Tensor::ids([experts + 1], permutation.offsets));
        let to = (self.dtypes[2], self.mode);
        let [want_rows, want_matrices, want_bias] = self.wanted;
        if want_rows {
            let errors = sums(outputs, a);
            prepared.output(Output::floats("d_rows", self.dtypes[2], [rows, inputs], [found.a, errors]).only(written));
        }
        if want_matrices {
            let shape = [experts, outputs, inputs];
            prepared.output(output("d_matrices", to, shape, [found.down, sums(most, down)]));
        }
        if want_bias {
            prepared.output(output("d_bias", to, [experts, outputs], [found.bias, sums(most, bias)]));
        }
        prepared
    }

    fn call<B: BackendBackward>(
        &self,
        backend: &B,
        stream: &B::Stream,
        mut operands: Operands<'_, B>,
    ) -> Result<(), B::Error> {
        let permutation = Permutation {
            row_slot: operands.input("row_slot")?,
            slot_row: operands.input("slot_row")?,
            offsets: operands.input("offsets")?,
        };
        let rows = if self.rows { RowSource::Rows } else { RowSource::Tokens { top_k: self.sizes[1] } };
        let (d, x, matrices) = (operands.input("d")?, operands.input("x")?, operands.input("matrices")?);
        let weights = operands.input_if("weights");
        let d_rows = operands.output_if("d_rows");
        let d_matrices = gradient(&mut operands, "d_matrices", self.mode);
        let d_bias = gradient(&mut operands, "d_bias", self.mode);
        let x = d_matrices.is_some().then_some(x);
        if self.is_down() {
            let row_weights =
                weights.map(|weights| RowWeights { weights: Some(weights), row_slot: None, scale: SCALE });
            let (d_out, a, d_a, d_down) = (d, x, d_rows, d_matrices);
            let operands =
                operation::DownBackward { d_out, rows, permutation, row_weights, a, matrices, d_a, d_down, d_bias };
            return backend.down_backward(stream, operands);
        }
        let (d_z, input_weights, d_gate_up) = (d, weights, d_matrices);
        let operands =
            operation::GateUpBackward { d_z, x, rows, permutation, input_weights, matrices, d_rows, d_gate_up, d_bias };
        backend.gate_up_backward(stream, operands)
    }
}

/// The cases of down_backward and gate_up_backward.
pub(super) fn cases(scale: Scale) -> Vec<BackwardCase> {
    let case = |name: &str, grouped: Grouped| {
        let [t, k, c, n, e] = grouped.sizes;
        let name = format!("{name} {:?} T={t} K={k} C={c} N={n} E={e}", grouped.spread).trim_start().to_string();
        let (dtype, placement) = (dtype_name(grouped.dtypes), Default::default());
        BackwardCase { stage: grouped.stage, name, dtype, placement, operation: BackwardOperation::Grouped(grouped) }
    };
    let mut sizes = grouped_sizes();
    sizes.extend([([150, 2, 200, 131, 2], Spread::Even), ([140, 1, 97, 260, 1], Spread::Even)]);
    // whole pieces of 16 bytes in every format, some rows and many an expert
    sizes.extend([([150, 2, 136, 72, 3], Spread::Even), ([210, 1, 72, 200, 1], Spread::Even)]);
    // more products of a sum than matrix units have on their way at once, and tiles enough to be of every width
    sizes.extend([([300, 2, 520, 136, 3], Spread::Even), ([450, 2, 24, 2000, 3], Spread::Skewed)]);
    sizes.push(([1350, 2, 24, 560, 3], Spread::Holes));
    // tiles in bands, in several columns of them; in pairs, with rows enough of an expert and an even number of tiles
    sizes.extend([([70, 2, 392, 2200, 3], Spread::Even), ([70, 2, 2200, 392, 3], Spread::Even)]);
    sizes.extend([([1600, 1, 200, 400, 2], Spread::Even), ([1600, 2, 24, 2200, 4], Spread::Skewed)]);
    // tiles beside each other, and more experts than a device has blocks
    sizes.extend([([150, 2, 264, 392, 2], Spread::Even), ([600, 4, 24, 16, 500], Spread::Skewed)]);
    if scale == Scale::Full {
        sizes.extend([([450, 2, 200, 2000, 3], Spread::Even), ([800, 1, 392, 2200, 1], Spread::Even)]);
        sizes.push(([800, 1, 2200, 392, 1], Spread::Even));
        sizes.extend([([200, 4, 256, 192, 16], Spread::Skewed), ([513, 1, 131, 97, 3], Spread::One(1))]);
    }
    let mut cases = Vec::new();
    for stage in [Stage::DownBackward, Stage::GateUpBackward] {
        for dtype in FLOATS {
            for &(sizes, spread) in &sizes {
                let plain = Grouped {
                    stage,
                    sizes,
                    spread,
                    dtypes: [dtype; 3],
                    rows: false,
                    weights: false,
                    mode: GradientMode::Assign,
                    wanted: [true; 3],
                };
                cases.push(case("", plain.clone()));
                if sizes[0] > 30 {
                    let mode = GradientMode::Accumulate;
                    cases.push(case("accumulate", Grouped { mode, ..plain }));
                }
            }
            let (sizes, spread) = ([16, 3, 45, 26, 9], Spread::Holes);
            for (named, mode) in MODES {
                for rows in [false, true] {
                    for weights in [false, true] {
                        let from = if rows { "rows" } else { "tokens" };
                        let name = format!("{named}{from}{}", if weights { " weighted" } else { "" });
                        let wanted = [true; 3];
                        let all = Grouped { stage, sizes, spread, dtypes: [dtype; 3], rows, weights, mode, wanted };
                        cases.push(case(&name, all.clone()));
                        cases.push(case(&name, all).strided());
                    }
                }
            }
        }
        let (f32, f16, bf16) = (DType::F32, DType::F16, DType::BF16);
        for (dtype, to) in [(f16, f16), (bf16, bf16), (f16, f32), (bf16, f32)] {
            for (rows, weights, named) in
                [(false, true, "weighted"), (true, false, "rows"), (true, true, "rows weighted")]
            {
                let (sizes, spread, mode) = ([150, 2, 136, 72, 3], Spread::Even, GradientMode::Assign);
                let (dtypes, wanted) = ([dtype, dtype, to], [true; 3]);
                cases.push(case(named, Grouped { stage, sizes, spread, dtypes, rows, weights, mode, wanted }));
            }
        }
        for dtypes in [[f32, bf16, f32], [bf16, bf16, f32], [bf16, f32, bf16], [f16, f16, f32]] {
            for (name, wanted) in [
                ("rows alone", [true, false, false]),
                ("matrices alone", [false, true, false]),
                ("bias alone", [false, false, true]),
            ] {
                let (sizes, spread, mode) = ([11, 2, 70, 35, 5], Spread::Even, GradientMode::Assign);
                let one = Grouped { stage, sizes, spread, dtypes, rows: false, weights: true, mode, wanted };
                cases.push(case(name, one));
            }
        }
    }
    cases
}
