use crate::support::*;
use fused_moe_core::config::{Activation, Function};
use fused_moe_core::operation::{Activate, ActivationOperands};
use fused_moe_core::reference::{PreActivation, activation};
use fused_moe_core::{Backend, DType};
use fused_moe_cpu::Cpu;

const FUNCTIONS: [Function; 6] =
    [Function::Silu, Function::GeluTanh, Function::GeluErf, Function::Relu, Function::ReluSquared, Function::Identity];

fn activations() -> Vec<Activation> {
    let mut all = vec![
        Activation::ClampedSilu { limit: 1.5 },
        Activation::ClampedSwish { alpha: 1.702, limit: 1.25 },
        Activation::SiluThenClamp { limit: 1.0 },
        Activation::SoftcappedSilu { gate_cap: 1.0, up_cap: 2.0 },
    ];
    all.extend(FUNCTIONS.map(Activation::Gated));
    all.extend(FUNCTIONS.map(Activation::Plain));
    all
}

fn verify(found: &Buffer, expected: &[f64]) {
    close(found, expected, |i| 3e-6 * expected[i].abs() + 1e-7);
}

fn gated(random: &mut Random, activation: Activation, [r, n]: [usize; 2], gap: usize) {
    let [g, u] = [random.units(r * n, 4.0), random.units(r * n, 4.0)];
    let [a, b, out] = [0; 3].map(|_| random.pick(&FLOATS));
    let (gate, up) = (Buffer::floats(a, [r, n], gap, &g), Buffer::floats(b, [r, n], 0, &u));
    let pre = PreActivation::Separate { gate: &gate.values(), up: &up.values() };
    let expected = self::activation(activation, pre, r, n);
    let run = |cpu: &Cpu, stream: &_| {
        let (mut apart, mut in_place) = (Buffer::new(out, [r, n], gap), gate.clone());
        let operands = ActivationOperands::Separate { gate: gate.view(), up: up.view(), out: apart.view_mut() };
        cpu.activation(stream, Activate { activation, operands }).unwrap();
        let operands = ActivationOperands::SeparateInPlace { gate: in_place.view_mut(), up: up.view() };
        cpu.activation(stream, Activate { activation, operands }).unwrap();
        vec![apart, in_place]
    };
    check(run, |outputs, _| outputs.iter().for_each(|found| verify(found, &expected)));

    let both = Buffer::floats(a, [r, 2 * n], gap, &random.units(2 * r * n, 4.0));
    let values = both.values();
    let halves = self::activation(activation, PreActivation::Halves(&values), r, n);
    let pairs = self::activation(activation, PreActivation::Interleaved(&values), r, n);
    let run = |cpu: &Cpu, stream: &_| {
        let mut outputs = [0; 2].map(|_| Buffer::new(out, [r, n], gap));
        let mut in_place = both.clone();
        let [h, i] = &mut outputs;
        let operands = [
            ActivationOperands::Halves { gate_up: both.view(), out: h.view_mut() },
            ActivationOperands::Interleaved { gate_up: both.view(), out: i.view_mut() },
            ActivationOperands::HalvesInPlace { gate_up: in_place.view_mut() },
        ];
        for operands in operands {
            cpu.activation(stream, Activate { activation, operands }).unwrap();
        }
        [&outputs[..], &[in_place]].concat()
    };
    check(run, |outputs, _| {
        verify(&outputs[0], &halves);
        verify(&outputs[1], &pairs);
        let mut expected = values.clone();
        for row in 0..r {
            expected[2 * row * n..][..n].copy_from_slice(&halves[row * n..][..n]);
        }
        verify(&outputs[2], &expected);
    });
}

fn plain(random: &mut Random, activation: Activation, [r, n]: [usize; 2], gap: usize) {
    let [a, out] = [0; 2].map(|_| random.pick(&FLOATS));
    let up = Buffer::floats(a, [r, n], gap, &random.units(r * n, 4.0));
    let values = up.values();
    let expected = self::activation(activation, PreActivation::Separate { gate: &[], up: &values }, r, n);
    let run = |cpu: &Cpu, stream: &_| {
        let (mut apart, mut in_place) = (Buffer::new(out, [r, n], gap), up.clone());
        let operands = ActivationOperands::Plain { up: up.view(), out: apart.view_mut() };
        cpu.activation(stream, Activate { activation, operands }).unwrap();
        let operands = ActivationOperands::PlainInPlace { up: in_place.view_mut() };
        cpu.activation(stream, Activate { activation, operands }).unwrap();
        vec![apart, in_place]
    };
    check(run, |outputs, _| outputs.iter().for_each(|found| verify(found, &expected)));
}

#[test]
fn activation_agrees_with_the_reference() {
    let mut random = Random(21);
    for activation in activations() {
        for size in [[0, 5], [1, 1], [1, 1025], [3, 2049], [8, 0], [65, 300], [40, 17]] {
            let gap = random.pick(&[0, 3]);
            if activation.is_gated() {
                gated(&mut random, activation, size, gap);
            } else {
                plain(&mut random, activation, size, gap);
            }
        }
    }
}

#[test]
fn any_leading_dimensions() {
    let cpu = Cpu::with_threads(2).unwrap();
    let stream = cpu.stream().unwrap();
    let gate = Buffer::floats(DType::F32, [2, 2, 1], 0, &[1.0, -1.0, 2.0, 3.0]);
    let up = Buffer::floats(DType::F32, [4, 1], 2, &[5.0, 6.0, 7.0, 8.0]);
    let mut out = Buffer::new(DType::F32, [2, 2, 1], 1);
    let operands = ActivationOperands::Separate { gate: gate.view(), up: up.view(), out: out.view_mut() };
    cpu.activation(&stream, Activate { activation: Activation::Gated(Function::Relu), operands }).unwrap();
    assert_eq!(out.values(), [5.0, 0.0, 14.0, 24.0]);
}
