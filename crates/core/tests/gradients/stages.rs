use crate::{central, dot, numbers};
use fused_moe_core::config::{GateConfig, GateNorm};
use fused_moe_core::reference::*;
use fused_moe_core::reference::{down as second, gate_up as first};
use fused_moe_core::{NO_EXPERT, NO_ROW};

#[test]
fn norm() {
    let (x, weight, c) = (numbers(1, 15), numbers(2, 5), numbers(3, 15));
    for weight in [None, Some(&weight[..])] {
        let d = rms_norm_backward(&NormBackward { x: &x, weight, eps: 1e-3, d_n: &c, hidden: 5 });
        central("x", &d.x, &x, |x| dot(&rms_norm(x, weight, 1e-3, 5), &c));
        let ones = weight.map_or(vec![1.0; 5], <[f64]>::to_vec);
        central("weight", &d.weight, &ones, |weight| dot(&rms_norm(&x, Some(weight), 1e-3, 5), &c));
    }
}

#[test]
fn dense() {
    let (x, weight, bias, c) = (numbers(1, 12), numbers(2, 20), numbers(3, 5), numbers(4, 15));
    let of = |x: &[f64], weight: &[f64], bias: &[f64]| {
        dot(&linear(&Linear { x, weight, bias: Some(bias), rows: 3, inputs: 4, outputs: 5 }), &c)
    };
    let op = LinearBackward { x: &x, weight: &weight, d_y: &c, rows: 3, inputs: 4, outputs: 5 };
    let d = linear_backward(&op);
    central("x", &d.x, &x, |x| of(x, &weight, &bias));
    central("weight", &d.weight, &weight, |weight| of(&x, weight, &bias));
    central("bias", &d.bias, &bias, |bias| of(&x, &weight, bias));
}

#[test]
fn gate_with_every_part() {
    let (tokens, hidden, experts) = (3, 5, 4);
    let (x, router) = (numbers(1, tokens * hidden), numbers(2, experts * hidden));
    let (bias, weight) = (numbers(3, experts), numbers(4, hidden));
    let (c, c_n) = (numbers(5, tokens * experts), numbers(6, tokens * hidden));
    let norm = Some(GateNorm { eps: 1e-3, feeds_experts: true });
    for (norm, softcap, scale) in [(None, None, 1.0), (norm, None, 1.5), (None, Some(2.0), 0.5), (norm, Some(0.7), 1.0)]
    {
        let config = GateConfig { norm, softcap, scale };
        for (bias, norm_weight, more) in [(Some(&bias[..]), Some(&weight[..]), true), (None, None, false)] {
            let op = Gate { x: &x, router: &router, bias, norm_weight, config, tokens, hidden, experts };
            let loss = |op: &Gate<'_>| {
                let gated = gate(op);
                dot(&gated.logits, &c) + if more { dot(&gated.normed, &c_n) } else { 0.0 }
            };
            let d_normed = more.then_some(&c_n[..]);
            let Gate { x, router, .. } = op;
            let d = gate_backward(&GateBackward {
                d_logits: &c,
                d_normed,
                x,
                router,
                bias,
                norm_weight,
                config,
                tokens,
                hidden,
                experts,
            });
            central("x", &d.x, x, |x| loss(&Gate { x, ..op }));
            central("router", &d.router, router, |router| loss(&Gate { router, ..op }));
            let zeros = bias.map_or(vec![0.0; experts], <[f64]>::to_vec);
            central("bias", &d.bias, &zeros, |bias| loss(&Gate { bias: Some(bias), ..op }));
            if norm.is_some() {
                let ones = norm_weight.map_or(vec![1.0; hidden], <[f64]>::to_vec);
                central("norm weight", &d.norm_weight, &ones, |w| loss(&Gate { norm_weight: Some(w), ..op }));
            } else {
                assert!(d.norm_weight.is_empty());
            }
        }
    }
}

/// T = 3, K = 2, E = 4: expert 1 without rows, one slot that goes nowhere.
fn routes() -> (Vec<u32>, Permutation) {
    let ids = vec![2, 0, NO_EXPERT, 2, 0, 3];
    let permutation = permute(&Permute { ids: &ids, experts: 4, local: 0..4 });
    (ids, permutation)
}

#[test]
fn combine_from_slots_and_from_rows() {
    let (tokens, hidden, top_k) = (3, 4, 2);
    let (_, permutation) = routes();
    let (y, weights, c) = (numbers(1, 24), numbers(2, 6), numbers(3, 12));
    let (y_shared, gates) = (numbers(4, 12), numbers(5, 3));
    let parts = [SharedGate::None, SharedGate::Factor(&gates), SharedGate::Logit(&gates)];
    for slot_row in [None, Some(&permutation.slot_row[..])] {
        for weights in [None, Some(&weights[..])] {
            for gate in parts {
                let shared = Some(Shared { y: &y_shared, gate, scale: 0.7 });
                let routed_scale = 2.5;
                let op = Combine {
                    y: &y,
                    slot_row,
                    weights,
                    copies: None,
                    routed_scale,
                    shared,
                    residual: None,
                    norm: None,
                    tokens,
                    hidden,
                    top_k,
                };
                let loss = |op: &Combine<'_>| dot(&combine(op).out, &c);
                let d = combine_backward(&CombineBackward {
                    d_out: &c,
                    y: &y,
                    slot_row,
                    weights,
                    routed_scale,
                    shared,
                    tokens,
                    hidden,
                    top_k,
                });
                central("y", &d.y, &y, |y| loss(&Combine { y, ..op }));
                let ones = weights.map_or(vec![1.0; 6], <[f64]>::to_vec);
                central("weights", &d.weights, &ones, |w| loss(&Combine { weights: Some(w), ..op }));
                central("shared y", &d.shared_y, &y_shared, |y| {
                    loss(&Combine { shared: Some(Shared { y, gate, scale: 0.7 }), ..op })
                });
                let with = |gate: SharedGate<'_>| {
                    loss(&Combine { shared: Some(Shared { y: &y_shared, gate, scale: 0.7 }), ..op })
                };
                match gate {
                    SharedGate::None => assert!(d.shared_gate.is_empty()),
                    SharedGate::Factor(at) => central("s", &d.shared_gate, at, |s| with(SharedGate::Factor(s))),
                    SharedGate::Logit(at) => central("s", &d.shared_gate, at, |s| with(SharedGate::Logit(s))),
                }
            }
        }
    }
}

#[test]
fn second_matrix() {
    let (rows, hidden, intermediate) = (6, 4, 3);
    let (_, Permutation { offsets, .. }) = routes();
    let (a, matrices, bias, c) = (numbers(1, 18), numbers(2, 48), numbers(3, 16), numbers(4, 24));
    let of = |a: &[f64], down: &[f64], bias: &[f64]| {
        let op = Down { a, offsets: &offsets, down, bias: Some(bias), rows, hidden, intermediate };
        dot(&second(&op), &c)
    };
    let op = DownBackward { d_y: &c, a: &a, offsets: &offsets, down: &matrices, rows, hidden, intermediate };
    let d = down_backward(&op);
    central("a", &d.a, &a, |a| of(a, &matrices, &bias));
    central("down", &d.down, &matrices, |down| of(&a, down, &bias));
    central("bias", &d.bias, &bias, |bias| of(&a, &matrices, bias));
    assert_eq!((&d.down[12..24], &d.bias[4..8]), (&[0.0; 12][..], &[0.0; 4][..]));
    assert_eq!(d.a[15..], [0.0; 3]);
}

#[test]
fn first_matrix() {
    let (rows, hidden, outputs, top_k) = (6, 4, 3, 2);
    let (_, Permutation { offsets, row_slot, .. }) = routes();
    let (weights, matrices, bias, c) = (numbers(1, 6), numbers(2, 48), numbers(3, 12), numbers(4, 18));
    for gather in [None, Some(Gather { row_slot: &row_slot, top_k })] {
        let x = numbers(5, if gather.is_some() { 12 } else { 24 });
        for input_weights in [None, Some(&weights[..])] {
            let (gate_up, bias) = (&matrices[..], Some(&bias[..]));
            let op = GateUp { x: &x, gather, input_weights, offsets: &offsets, gate_up, bias, rows, hidden, outputs };
            let loss = |op: &GateUp<'_>| dot(&first(op), &c);
            let d = gate_up_backward(&GateUpBackward {
                d_z: &c,
                x: &x,
                gather,
                input_weights,
                offsets: &offsets,
                gate_up,
                rows,
                hidden,
                outputs,
            });
            central("x", &d.x, &x, |x| loss(&GateUp { x, ..op }));
            let ones = input_weights.map_or(vec![1.0; 6], <[f64]>::to_vec);
            central("weights", &d.input_weights, &ones, |w| loss(&GateUp { input_weights: Some(w), ..op }));
            central("gate_up", &d.gate_up, gate_up, |gate_up| loss(&GateUp { gate_up, ..op }));
            central("bias", &d.bias, op.bias.unwrap_or_default(), |b| loss(&GateUp { bias: Some(b), ..op }));
            assert_eq!(d.gate_up[12..24], [0.0; 12]);
        }
    }
}

#[test]
fn weights_with_and_without_the_results() {
    let (tokens, hidden, intermediate, top_k) = (3, 4, 3, 2);
    let (ids, Permutation { offsets, slot_row, .. }) = routes();
    let (rows, routed_scale) = (tokens * top_k, 1.5);
    assert_eq!(slot_row[2], NO_ROW);
    let (a, matrices, bias, d_out) = (numbers(1, 18), numbers(2, 48), numbers(3, 16), numbers(4, 12));
    for bias in [None, Some(&bias[..])] {
        let down = &matrices[..];
        let y = second(&Down { a: &a, offsets: &offsets, down, bias, rows, hidden, intermediate });
        let kept = CombineBackward {
            d_out: &d_out,
            y: &y,
            slot_row: Some(&slot_row),
            weights: None,
            routed_scale: 1.0,
            shared: None,
            tokens,
            hidden,
            top_k,
        };
        let d_y = combine_backward(&kept).y;
        let op = DownBackward { d_y: &d_y, a: &a, offsets: &offsets, down, rows, hidden, intermediate };
        let d_a = down_backward(&op).a;
        let bias = bias.map(|bias| DownBias { bias, experts: &ids, d_out: &d_out, top_k, hidden });
        let slot_row = &slot_row;
        let found = weights_backward(&WeightsBackward { a: &a, d_a: &d_a, slot_row, bias, routed_scale, intermediate });
        let expected = combine_backward(&CombineBackward { routed_scale, ..kept }).weights;
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() < 1e-14);
        }
    }
}
