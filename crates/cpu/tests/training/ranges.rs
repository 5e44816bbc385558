//! Devices that hold a range of the experts each.

use crate::step::numbers;
use fused_moe_core::config::Activation;
use fused_moe_core::operation::*;
use fused_moe_core::{Backend, BackendBackward, Permutation, View};
use fused_moe_cpu::{Cpu, CpuStream};
use std::ops::Range;

const T: usize = 50;
const K: usize = 3;
const E: usize = 7;
const H: usize = 24;
const I: usize = 10;
const N: usize = 2 * I;

/// What a device makes of the gradient of y.
struct Parts {
    x: Vec<f32>,
    weights: Vec<f32>,
    gate_up: Vec<f32>,
    down: Vec<f32>,
}

/// Slots by expert, of the experts of a device.
struct Slots {
    row_slot: Vec<u32>,
    slot_row: Vec<u32>,
    offsets: Vec<u32>,
}

impl Slots {
    fn new(cpu: &Cpu, stream: &CpuStream, experts: &[u32], local: Range<usize>) -> Self {
        let (mut row_slot, mut slot_row, mut offsets) = (vec![0u32; T * K], vec![0u32; T * K], vec![0u32; E + 1]);
        let operands = Permute::<Cpu> {
            experts: View::of(experts, [T, K]).unwrap(),
            experts_total: E,
            local: local.clone(),
            row_slot: View::of_mut(&mut row_slot, [T * K]).unwrap(),
            slot_row: View::of_mut(&mut slot_row, [T * K]).unwrap(),
            offsets: View::of_mut(&mut offsets, [E + 1]).unwrap(),
        };
        cpu.permute(stream, operands).unwrap();
        Self { row_slot, slot_row, offsets: offsets[local.start..=local.end].to_vec() }
    }

    fn permutation(&self) -> Permutation<'_, Cpu> {
        Permutation {
            row_slot: View::of(&self.row_slot, [T * K]).unwrap(),
            slot_row: View::of(&self.slot_row, [T * K]).unwrap(),
            offsets: View::of(&self.offsets, [self.offsets.len()]).unwrap(),
        }
    }
}

/// Through down, of nothing yet.
fn through_down<'a>(slots: &'a Slots, d_y: &'a [f32], down: &'a [f32]) -> DownBackward<'a, Cpu> {
    DownBackward {
        d_out: View::of(d_y, [T, H]).unwrap(),
        rows: RowSource::Tokens { top_k: K },
        permutation: slots.permutation(),
        row_weights: None,
        a: None,
        matrices: View::of(down, [slots.offsets.len() - 1, H, I]).unwrap(),
        d_a: None,
        d_down: None,
        d_bias: None,
    }
}

/// The backward pass of a device that holds some of the experts: their matrices alone.
fn backward(cpu: &Cpu, stream: &CpuStream, local: Range<usize>) -> Parts {
    let (x, d_y) = (numbers(T * H, 1), numbers(T * H, 2));
    let experts: Vec<u32> = (0..T * K).map(|slot| ((slot * 5 + slot / K * 3) % E) as u32).collect();
    let factors: Vec<f32> = numbers(T * K, 3).iter().map(|w| w.abs()).collect();
    let count = local.len();
    let gate_up = &numbers(E * N * H, 4)[local.start * N * H..local.end * N * H];
    let down = &numbers(E * H * I, 5)[local.start * H * I..local.end * H * I];
    let rows = RowSource::Tokens { top_k: K };

    let slots = Slots::new(cpu, stream, &experts, local);
    let (mut z, mut d_a, mut d_z) = (vec![0.0; T * K * N], vec![0.0; T * K * I], vec![0.0; T * K * N]);
    let (mut a, mut d_rows) = (vec![0.0; T * K * I], vec![0.0; T * K * H]);
    let mut parts = Parts {
        x: vec![0.0; T * H],
        weights: vec![0.0; T * K],
        gate_up: vec![0.0; count * N * H],
        down: vec![0.0; count * H * I],
    };
    let operands = GateUp::<Cpu> {
        x: View::of(&x, [T, H]).unwrap(),
        rows,
        permutation: slots.permutation(),
        input_weights: None,
        matrices: Matrices::Stack(View::of(gate_up, [count, N, H]).unwrap()),
        bias: None,
        activation: Activation::default(),
        output: GateUpOutput::PreActivation,
        out: View::of_mut(&mut z, [T * K, N]).unwrap(),
    };
    cpu.gate_up(stream, operands).unwrap();
    let to = Some(View::of_mut(&mut d_a, [T * K, I]).unwrap());
    cpu.down_backward(stream, DownBackward { d_a: to, ..through_down(&slots, &d_y, down) }).unwrap();
    let operands = ActivationBackward::<Cpu> {
        activation: Activation::default(),
        operands: ActivationBackwardOperands::Halves {
            gate_up: View::of(&z, [T * K, N]).unwrap(),
            d_gate_up: View::of_mut(&mut d_z, [T * K, N]).unwrap(),
        },
        d_a: View::of(&d_a, [T * K, I]).unwrap(),
        row_weights: Some(RowWeights {
            weights: Some(View::of(&factors, [T, K]).unwrap()),
            row_slot: Some(slots.permutation().row_slot),
            scale: 1.0,
        }),
        a: Some(View::of_mut(&mut a, [T * K, I]).unwrap()),
    };
    cpu.activation_backward(stream, operands).unwrap();
    let from = WeightsFrom::Intermediate {
        a: View::of(&a, [T * K, I]).unwrap(),
        d_a: View::of(&d_a, [T * K, I]).unwrap(),
        slot_row: slots.permutation().slot_row,
        bias: None,
    };
    let out = Gradient::assign(View::of_mut(&mut parts.weights, [T, K]).unwrap());
    let d_weights = Some(WeightsGradient { from, out });
    cpu.combine_backward(
        stream,
        CombineBackward { d_weights, ..CombineBackward::new(View::of(&d_y, [T, H]).unwrap(), K) },
    )
    .unwrap();
    let operands = DownBackward {
        row_weights: Some(RowWeights {
            weights: Some(View::of(&factors, [T, K]).unwrap()),
            row_slot: None,
            scale: 1.0,
        }),
        a: Some(View::of(&a, [T * K, I]).unwrap()),
        d_down: Some(Gradient::assign(View::of_mut(&mut parts.down, [count, H, I]).unwrap())),
        ..through_down(&slots, &d_y, down)
    };
    cpu.down_backward(stream, operands).unwrap();
    let operands = GateUpBackward::<Cpu> {
        d_z: View::of(&d_z, [T * K, N]).unwrap(),
        x: Some(View::of(&x, [T, H]).unwrap()),
        rows,
        permutation: slots.permutation(),
        input_weights: None,
        matrices: View::of(gate_up, [count, N, H]).unwrap(),
        d_rows: Some(View::of_mut(&mut d_rows, [T * K, H]).unwrap()),
        d_gate_up: Some(Gradient::assign(View::of_mut(&mut parts.gate_up, [count, N, H]).unwrap())),
        d_bias: None,
    };
    cpu.gate_up_backward(stream, operands).unwrap();
    let operands = Combine::<Cpu> {
        rows: SlotRows::Permuted { y: View::of(&d_rows, [T * K, H]).unwrap(), slot_row: slots.permutation().slot_row },
        weights: None,
        copies: None,
        routed_scale: 1.0,
        shared: None,
        residual: None,
        norm: None,
        out: View::of_mut(&mut parts.x, [T, H]).unwrap(),
    };
    cpu.combine(stream, operands).unwrap();
    parts
}

#[test]
fn parts_add_up_and_each_device_has_the_gradients_of_its_own_experts() {
    let cpu = Cpu::with_threads(2).unwrap();
    let stream = cpu.stream().unwrap();
    let whole = backward(&cpu, &stream, 0..E);
    let (mut x, mut weights, mut gate_up, mut down) = (vec![0.0; T * H], vec![0.0; T * K], vec![], vec![]);
    for local in [0..2, 2..3, 3..E] {
        let part = backward(&cpu, &stream, local);
        x.iter_mut().zip(part.x).for_each(|(sum, part)| *sum += part);
        weights.iter_mut().zip(part.weights).for_each(|(sum, part)| *sum += part);
        gate_up.extend(part.gate_up);
        down.extend(part.down);
    }
    assert!(gate_up == whole.gate_up && down == whole.down, "a matrix has the gradient that it has where all are");
    assert_eq!(weights, whole.weights, "a slot is where its expert is, and nowhere else");
    let largest = whole.x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let off = x.iter().zip(&whole.x).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(largest > 0.1 && off < 1e-6 * largest, "{off} of {largest}");
}
