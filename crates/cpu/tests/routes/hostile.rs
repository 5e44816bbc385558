//! Sizes that no memory stands behind, and outputs that lie where their format cannot.

use fused_moe_core::config::*;
use fused_moe_core::operation::*;
use fused_moe_core::weights::{ExpertMatrices, ExpertWeights, LayerWeights, Matrix, Orientation, RouterMlpWeights};
use fused_moe_core::{Backend, DType, Layer, Options, Permutation, View};
use fused_moe_cpu::Cpu;

#[test]
fn combine_of_no_tokens_and_any_number_of_slots() {
    let cpu = Cpu::new().unwrap();
    let (none, mut out): ([f32; 0], [f32; 0]) = ([], []);
    let rows = SlotRows::Slots(View::of(&none, [0, 4]).unwrap());
    let weights = View::of(&none, [0, usize::MAX]).unwrap();
    // Whether so many slots are an error is the contract's business.
    let _ = cpu.combine(&cpu.stream().unwrap(), Combine::new(rows, weights, View::of_mut(&mut out, [0, 4]).unwrap()));
}

#[test]
fn zero_of_any_stride_and_of_nothing() {
    let cpu = Cpu::new().unwrap();
    let stream = cpu.stream().unwrap();
    let mut bytes = [1u8; 16];
    let out = View::new(&mut bytes[..], DType::F32, 0, [1, 4]).unwrap().with_row_stride(usize::MAX).unwrap();
    cpu.zero(&stream, Zero { out }).unwrap();
    assert_eq!(bytes, [0; 16]);
    let out = View::new(&mut bytes[..0], DType::F32, 0, [0, usize::MAX]).unwrap();
    cpu.zero(&stream, Zero { out }).unwrap();
}

/// A float of four bytes at an odd address.
fn odd(bytes: &mut [u8]) -> &mut [u8] {
    let start = 1 + bytes.as_ptr().align_offset(4);
    &mut bytes[start..]
}

#[test]
fn misaligned_outputs_are_found_before_anything_is_written() {
    let cpu = Cpu::new().unwrap();
    let stream = cpu.stream().unwrap();
    let (x, mut bytes) = ([1.0f32; 4], [7u8; 32]);
    let (x, router) = (View::of(&x, [2, 2]).unwrap(), View::of(&x, [2, 2]).unwrap());
    let norm = Some(GateNorm { eps: 1e-5, feeds_experts: false });

    let mut logits = [7.0f32; 4];
    let mut gate = Gate::new(x, router, View::of_mut(&mut logits, [2, 2]).unwrap());
    gate.config.norm = norm;
    gate.normed = Some(View::new(odd(&mut bytes), DType::F32, 0, [2, 2]).unwrap());
    assert!(cpu.gate(&stream, gate).is_err());
    assert_eq!(logits, [7.0; 4]);

    let mut experts = [7u32; 2];
    let weights = View::new(odd(&mut bytes), DType::F32, 0, [2, 1]).unwrap();
    let choice = Choice::new(RoutingRule::default(), View::of_mut(&mut experts, [2, 1]).unwrap(), weights);
    let gate = Gate::new(x, router, View::of_mut(&mut logits, [2, 2]).unwrap());
    assert!(cpu.gate_route(&stream, GateRoute { gate, choice }).is_err());
    assert_eq!((logits, experts), ([7.0; 4], [7; 2]));

    let (mut ids, rows, offsets) = ([0u32; 2], [0u32, 1], [0u32, 2]);
    let [row_slot, slot_row] = [View::of(&rows, [2]).unwrap(); 2];
    let operands = DropOverflow {
        capacity: Capacity { limit: CapacityLimit::Slots(0), order: CapacityOrder::Position, renormalize: None },
        permutation: Permutation { row_slot, slot_row, offsets: View::of(&offsets, [2]).unwrap() },
        importance: None,
        sequences: None,
        experts: View::of_mut(&mut ids, [2, 1]).unwrap(),
        weights: View::new(odd(&mut bytes), DType::F32, 0, [2, 1]).unwrap(),
    };
    assert!(cpu.drop_overflow(&stream, operands).is_err());
    assert_eq!(ids, [0; 2]);

    let matrices: Vec<_> = (0..2)
        .map(|_| {
            let matrix = || Matrix::new(x, Orientation::OutIn).unwrap();
            ExpertMatrices::new(Some(matrix()), matrix(), matrix())
        })
        .collect();
    let router_mlp = Some(RouterMlp { width: 2, eps: 1e-5, function: Function::Relu });
    let config = LayerConfig { router_mlp, ..LayerConfig::new(2, 2, 2, 1) };
    let (down, fc1, fc2) = (router, router, router);
    let (down_bias, state_scale, norm, fc1_bias, fc2_bias) = (None, None, None, None, None);
    let weights = LayerWeights {
        router_mlp: Some(RouterMlpWeights { down, down_bias, state_scale, norm, fc1, fc1_bias, fc2, fc2_bias }),
        ..LayerWeights::new(router, ExpertWeights::per_expert(matrices))
    };
    let layer = cpu.prepare(&config, &weights, &Options::default()).unwrap();
    let mut workspace = layer.workspace(2).unwrap();
    for which in 0..6 {
        let (mut y, mut normed, mut counts) = ([7.0f32; 4], [7.0f32; 4], [7u32; 2]);
        let (mut experts, mut weights, mut state) = ([7u32; 2], [7.0f32; 2], [7.0f32; 4]);
        let odd = odd(&mut bytes);
        let mut call = Forward {
            norm: Some(NextNorm { weight: None, eps: 1e-5, out: View::of_mut(&mut normed, [2, 2]).unwrap() }),
            routes: Some(RoutesOut {
                experts: View::of_mut(&mut experts, [2, 1]).unwrap(),
                weights: View::of_mut(&mut weights, [2, 1]).unwrap(),
            }),
            counts: Some(View::of_mut(&mut counts, [2]).unwrap()),
            router_state: RouterState { previous: None, next: Some(View::of_mut(&mut state, [2, 2]).unwrap()) },
            ..Forward::new(x, View::of_mut(&mut y, [2, 2]).unwrap())
        };
        match which {
            0 => call.y = View::new(odd, DType::F32, 0, [2, 2]).unwrap(),
            1 => call.norm.as_mut().unwrap().out = View::new(odd, DType::F32, 0, [2, 2]).unwrap(),
            2 => call.routes.as_mut().unwrap().experts = View::new(odd, DType::U32, 0, [2, 1]).unwrap(),
            3 => call.routes.as_mut().unwrap().weights = View::new(odd, DType::F32, 0, [2, 1]).unwrap(),
            4 => call.router_state.next = Some(View::new(odd, DType::F32, 0, [2, 2]).unwrap()),
            _ => call.counts = Some(View::new(odd, DType::U32, 0, [2]).unwrap()),
        }
        assert!(layer.run(&stream, call, &mut workspace).is_err());
        assert_eq!((y, normed, counts, experts, weights), ([7.0; 4], [7.0; 4], [7; 2], [7; 2], [7.0; 2]), "{which}");
        assert_eq!(state, [7.0; 4], "{which}");
    }
    assert_eq!(bytes, [7; 32]);
}
