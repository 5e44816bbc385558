use crate::support::*;
use fused_moe_core::config::{Activation, Function};
use fused_moe_core::operation::{Down, GateUp, GateUpOutput, Matrices, RowSource};
use fused_moe_core::weights::{ExpertMatrices, ExpertWeights, GateUpOrder, Matrix, Orientation, StackLayout};
use fused_moe_core::{Backend, DType, Permutation};
use fused_moe_cpu::Cpu;

const SIZE: [usize; 3] = [3, 37, 71];

/// `[E, I, H]` of gate, of up, and `[E, H, I]` of down, with biases.
struct Numbers {
    gate: Vec<f64>,
    up: Vec<f64>,
    down: Vec<f64>,
    gate_bias: Vec<f64>,
    up_bias: Vec<f64>,
    down_bias: Vec<f64>,
}

fn numbers() -> Numbers {
    let ([e, i, h], mut random) = (SIZE, Random(3));
    let mut next = |n| random.units(n, 1.0);
    Numbers {
        gate: next(e * i * h),
        up: next(e * i * h),
        down: next(e * h * i),
        gate_bias: next(e * i),
        up_bias: next(e * i),
        down_bias: next(e * h),
    }
}

/// `[E, A, B]` to `[E, B, A]`.
fn transposed(x: &[f64], [a, b]: [usize; 2]) -> Vec<f64> {
    let plane = |plane: &[f64]| (0..a * b).map(|n| plane[n % a * b + n / a]).collect::<Vec<_>>();
    x.chunks(a * b).flat_map(plane).collect()
}

/// `[E, 2I, C]` of two `[E, I, C]`.
fn joined(gate: &[f64], up: &[f64], c: usize, order: GateUpOrder) -> Vec<f64> {
    let run = if order == GateUpOrder::Interleaved { c } else { SIZE[1] * c };
    gate.chunks(run).zip(up.chunks(run)).flat_map(|(g, u)| [g, u].concat()).collect()
}

/// What gate_up and down make of all experts' rows.
fn outputs(cpu: &Cpu, weights: &ExpertWeights<'_>) -> [Vec<f64>; 2] {
    let ([e, i, h], mut random) = (SIZE, Random(9));
    let x = Buffer::floats(DType::F32, [e, h], 0, &random.units(e * h, 1.0));
    let a = Buffer::floats(DType::F32, [e, i], 0, &random.units(e * i, 1.0));
    let ids: Vec<u32> = (0..=e as u32).collect();
    let (offsets, row_slot) = (Buffer::ids([e + 1], 0, &ids), Buffer::ids([e], 0, &ids[..e]));
    let (packed, stream) = (cpu.pack(weights).unwrap(), cpu.stream().unwrap());
    let (mut gate_up, mut down) = (Buffer::new(DType::F32, [e, i], 0), Buffer::new(DType::F32, [e, h], 0));
    let operands = GateUp {
        x: x.view(),
        rows: RowSource::Rows,
        permutation: Permutation { row_slot: row_slot.view(), slot_row: row_slot.view(), offsets: offsets.view() },
        input_weights: None,
        matrices: Matrices::Packed(&packed),
        bias: None,
        activation: Activation::Gated(Function::Silu),
        output: GateUpOutput::Activated,
        out: gate_up.view_mut(),
    };
    cpu.gate_up(&stream, operands).unwrap();
    let matrices = Matrices::Packed(&packed);
    let operands = Down { a: a.view(), offsets: offsets.view(), matrices, bias: None, out: down.view_mut() };
    cpu.down(&stream, operands).unwrap();
    [gate_up.values(), down.values()]
}

/// Rows `expert * rows ..` of a stack.
fn single(buffer: &Buffer, expert: usize, rows: usize) -> Matrix<'_> {
    Matrix::new(buffer.view().row_range(expert * rows, rows).unwrap(), Orientation::OutIn).unwrap()
}

/// A row, as a column.
fn column(buffer: &Buffer, expert: usize) -> Matrix<'_> {
    Matrix::new(buffer.view().row_range(expert, 1).unwrap(), Orientation::InOut).unwrap()
}

#[test]
fn every_layout_gives_the_same() {
    let ([e, i, h], n) = (SIZE, numbers());
    let cpu = Cpu::with_threads(2).unwrap();
    for dtype in FLOATS {
        for biased in [false, true] {
            let mut found = Vec::new();
            let bias = |values: &[f64], width| Buffer::floats(dtype, [e, width], 3, values);
            for order in [GateUpOrder::GateThenUp, GateUpOrder::Interleaved] {
                let both = joined(&n.gate, &n.up, h, order);
                let biases = [bias(&joined(&n.gate_bias, &n.up_bias, 1, order), 2 * i), bias(&n.down_bias, h)];
                for (turned, gap) in [(false, 0), (false, 5), (true, 0), (true, 5)] {
                    let of = |x: &[f64], [a, b]: [usize; 2]| match turned {
                        false => Buffer::floats(dtype, [e, a, b], gap, x),
                        true => Buffer::floats(dtype, [e, b, a], gap, &transposed(x, [a, b])),
                    };
                    let (gate_up, down) = (of(&both, [2 * i, h]), of(&n.down, [h, i]));
                    let orientation = if turned { Orientation::InOut } else { Orientation::OutIn };
                    let layout = StackLayout { order, gate_up: orientation, down: orientation };
                    let mut weights = ExpertWeights::stacked(gate_up.view(), down.view(), layout).unwrap();
                    if biased {
                        let [gate_up, down] = &biases;
                        weights = weights.with_biases(Some(gate_up.view()), Some(down.view()), order).unwrap();
                    }
                    found.push(outputs(&cpu, &weights));
                }
            }
            let stack = |x: &[f64], a, b| Buffer::floats(dtype, [e, a, b], 0, x);
            let (gate, up, down) = (stack(&n.gate, i, h), stack(&n.up, i, h), stack(&n.down, h, i));
            let biases = [bias(&n.gate_bias, i), bias(&n.up_bias, i), bias(&n.down_bias, h)];
            let expert = |index: usize| {
                let [gate_bias, up_bias, down_bias] = [0, 1, 2].map(|b| biased.then(|| column(&biases[b], index)));
                let (gate, up, down) = (single(&gate, index, i), single(&up, index, i), single(&down, index, h));
                ExpertMatrices { gate_bias, up_bias, down_bias, ..ExpertMatrices::new(Some(gate), up, down) }
            };
            found.push(outputs(&cpu, &ExpertWeights::per_expert((0..e).map(expert).collect())));
            if !biased {
                let layout = StackLayout::default();
                let apart = ExpertWeights::stacked_apart(Some(gate.view()), up.view(), down.view(), layout).unwrap();
                found.push(outputs(&cpu, &apart));
            }
            assert!(found.iter().all(|outputs| *outputs == found[0]), "{dtype}, {biased}");
        }
    }
}

#[test]
fn experts_that_do_not_fit_are_refused() {
    let cpu = Cpu::new().unwrap();
    let message = cpu.pack(&ExpertWeights::per_expert(Vec::new())).unwrap_err().to_string();
    assert!(message.starts_with("experts: E expected"), "{message}");
}
