//! A step in bf16: instruction sets that form products of such numbers round what lies between operations, and agree with
//! those that do not as far as that may move a result.

use crate::step::numbers;
use fused_moe_core::config::*;
use fused_moe_core::operation::*;
use fused_moe_core::training::TrainingLayer;
use fused_moe_core::{Backend, DType, Routing, View};
use fused_moe_cpu::Cpu;
use fused_moe_cpu::arch::Isa;
use half::bf16;

const T: usize = 93;
const K: usize = 2;
/// One of them has no rows.
const E: usize = 5;
const S: usize = 24;

fn narrow(count: usize, seed: u32) -> Vec<bf16> {
    numbers(count, seed).into_iter().map(|x| bf16::from_f32(0.3 * x)).collect()
}

fn routing<'a>(experts: &'a [u32], factors: &'a [f32]) -> Routing<'a, Cpu> {
    Routing { experts: View::of(experts, [T, K]).unwrap(), weights: View::of(factors, [T, K]).unwrap() }
}

/// What a forward and a backward pass leave, by name: y and the gradients.
fn step(isa: Isa, [h, i]: [usize; 2], weight_on: WeightOn) -> Vec<(&'static str, Vec<f32>)> {
    let shared = SharedConfig { intermediate: S, activation: Activation::default(), gated: true, scale: 1.0 };
    let gate = GateConfig { norm: Some(GateNorm { eps: 1e-6, feeds_experts: true }), ..GateConfig::default() };
    let config = LayerConfig { shared: Some(shared), gate, weight_on, ..LayerConfig::new(h, i, E, K) };
    let cpu = Cpu::with_threads(2).unwrap().with_isa(isa).unwrap();
    let (stream, layer) = (cpu.stream().unwrap(), TrainingLayer::new(&config).unwrap());
    let mut workspace = layer.workspace(&cpu, T).unwrap();
    let shapes: [&[usize]; 8] = [&[E, 2 * i, h], &[E, 2 * i], &[E, h, i], &[E, h], &[h], &[2 * S, h], &[h, S], &[h]];
    let sizes = shapes.map(|shape| shape.iter().product::<usize>());
    let weights: Vec<Vec<bf16>> = sizes.iter().zip(1..).map(|(&size, seed)| narrow(size, seed)).collect();
    let mut gradients: Vec<Vec<bf16>> = sizes.iter().map(|&size| vec![bf16::NAN; size]).collect();
    let (x, d_y) = (narrow(T * h, 20), narrow(T * h, 21));
    let experts: Vec<u32> = (0..T * K).map(|slot| ((slot / K * 3 + slot % K) % (E - 1)) as u32).collect();
    let factors: Vec<f32> = numbers(T * K, 22).into_iter().map(f32::abs).collect();
    let (mut y, mut d_x, mut z) = (vec![bf16::NAN; T * h], vec![bf16::NAN; T * h], vec![bf16::NAN; T * K * 2 * i]);
    let mut shared_z = vec![bf16::NAN; T * 2 * S];
    let of = |n: usize| match *shapes[n] {
        [a] => View::of(&weights[n], [a]).unwrap(),
        [a, b] => View::of(&weights[n], [a, b]).unwrap(),
        [a, b, c] => View::of(&weights[n], [a, b, c]).unwrap(),
        _ => unreachable!("no weights have more dimensions"),
    };
    let shared =
        SharedParameters { gate_up: of(5), gate_up_bias: None, down: of(6), down_bias: None, gate: Some(of(7)) };
    let parameters = LayerParameters::<Cpu> {
        router: None,
        router_norm: Some(of(4)),
        gate_up_bias: Some(of(1)),
        down_bias: Some(of(3)),
        shared: Some(shared),
        ..LayerParameters::new(of(0), of(0), of(2))
    };
    let forward = ForwardSaving {
        x: View::of(&x, [T, h]).unwrap(),
        parameters: &parameters,
        source: Source::Routes(routing(&experts, &factors)),
        token_ids: None,
        residual: None,
        norm: None,
        pre_activation: View::of_mut(&mut z, [T * K, 2 * i]).unwrap(),
        shared_pre_activation: Some(View::of_mut(&mut shared_z, [T, 2 * S]).unwrap()),
        routes: None,
        y: View::of_mut(&mut y, [T, h]).unwrap(),
    };
    layer.forward(&cpu, &stream, forward, &mut workspace).unwrap();
    let mut to = gradients.iter_mut().zip(shapes).map(|(values, shape)| {
        let view = match *shape {
            [a] => View::of_mut(values, [a]),
            [a, b] => View::of_mut(values, [a, b]),
            [a, b, c] => View::of_mut(values, [a, b, c]),
            _ => unreachable!("no gradients have more dimensions"),
        };
        Some(Gradient::assign(view.unwrap()))
    });
    let mut to = || to.next().unwrap();
    let backward = LayerBackward {
        d_y: View::of(&d_y, [T, h]).unwrap(),
        d_logits: None,
        x: View::of(&x, [T, h]).unwrap(),
        parameters: &parameters,
        source: RoutesFrom::Routes,
        routing: routing(&experts, &factors),
        pre_activation: View::of(&z, [T * K, 2 * i]).unwrap(),
        shared_pre_activation: Some(View::of(&shared_z, [T, 2 * S]).unwrap()),
        gradients: LayerGradients {
            x: Some(Gradient::assign(View::of_mut(&mut d_x, [T, h]).unwrap())),
            gate_up: to(),
            gate_up_bias: to(),
            down: to(),
            down_bias: to(),
            router_norm: to(),
            shared: SharedGradients { gate_up: to(), down: to(), gate: to(), ..SharedGradients::default() },
            ..LayerGradients::default()
        },
    };
    layer.backward(&cpu, &stream, backward, &mut workspace).unwrap();
    let names =
        ["gate_up", "gate_up_bias", "down", "down_bias", "norm", "shared gate_up", "shared down", "shared gate"];
    let found = [("y", y), ("x", d_x)].into_iter().chain(names.into_iter().zip(gradients));
    found.map(|(name, values)| (name, values.into_iter().map(f32::from).collect())).collect()
}

#[test]
fn instruction_sets_agree_in_bf16() {
    for sizes in [[136, 72], [45, 27]] {
        for weight_on in [WeightOn::Output, WeightOn::Input] {
            let expected = step(Isa::Scalar, sizes, weight_on);
            for isa in Isa::available() {
                for ((name, expected), (_, found)) in expected.iter().zip(step(isa, sizes, weight_on)) {
                    let largest = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                    let off = expected.iter().zip(&found).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
                    // six intermediates, and both results are rounded once more
                    let allowed = 8.0 * DType::BF16.epsilon() as f32 * largest;
                    let case = format!("{isa} {name} {sizes:?} {weight_on:?}");
                    assert!(found.iter().all(|x| x.is_finite()), "{case}");
                    assert!(off <= allowed && largest > 0.0, "{case}: {off} of {largest}");
                }
            }
        }
    }
}
