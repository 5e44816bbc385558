use crate::support::*;
use fused_moe_core::operation::{Accumulate, Combine, Copies, Factor, NextNorm, Residual, Shared, SlotRows, Zero};
use fused_moe_core::{Backend, DType, NO_ROW, reference};
use fused_moe_cpu::Cpu;

struct Case {
    y: Buffer,
    slot_row: Option<Buffer>,
    /// What is copied, and the experts of the slots, of which 3 and 4 copy.
    copies: Option<(Buffer, Buffer)>,
    weights: Option<Buffer>,
    routed_scale: f32,
    shared: Option<Buffer>,
    /// 0: none, 1: a factor, 2: a logit.
    shared_gate: usize,
    gates: Buffer,
    shared_scale: f32,
    residual: Option<Buffer>,
    in_place: bool,
    norm: Option<(Option<Buffer>, DType)>,
    out: DType,
    gap: usize,
    size: [usize; 3],
}

fn case(random: &mut Random, [t, k, h]: [usize; 3]) -> Case {
    let gap = random.pick(&[0, 3]);
    let out = random.pick(&FLOATS);
    let mut floats = |rows: usize, cols: usize| {
        let values = random.units(rows * cols, 2.0);
        Buffer::floats(random.pick(&FLOATS), [rows, cols], gap, &values)
    };
    let (y, shared, gates, residual, norm_weight) =
        (floats(t * k, h), floats(t, h), floats(t, 1), floats(t, h), floats(1, h));
    let weights = Buffer::floats(DType::F32, [t, k], gap, &random.units(t * k, 1.0));
    let mut rows: Vec<u32> = (0..(t * k) as u32).collect();
    for i in 0..rows.len() {
        rows.swap(i, random.below(t * k));
        if random.below(9) == 0 {
            rows[i] = NO_ROW;
        }
    }
    let slot_row = random.flip().then(|| Buffer::ids([t * k], 0, &rows));
    let copies = random.flip().then(|| {
        let x = Buffer::floats(random.pick(&FLOATS), [t, h], gap, &random.units(t * h, 2.0));
        let ids: Vec<u32> = (0..t * k).map(|_| random.pick(&[0, 2, 3, 4, 5, u32::MAX])).collect();
        (x, Buffer::ids([t, k], gap, &ids))
    });
    let in_place = random.flip();
    Case {
        y,
        slot_row,
        copies,
        weights: (t == 0 || random.below(4) > 0).then_some(weights),
        routed_scale: random.pick(&[1.0, 2.5]),
        shared: random.flip().then_some(shared),
        shared_gate: random.below(3),
        gates,
        shared_scale: random.pick(&[1.0, 0.5]),
        residual: random.flip().then_some(if in_place {
            Buffer::floats(out, [t, h], gap, &random.units(t * h, 2.0))
        } else {
            residual
        }),
        in_place,
        norm: random.flip().then(|| (random.flip().then_some(norm_weight), random.pick(&FLOATS))),
        out,
        gap,
        size: [t, k, h],
    }
}

impl Case {
    fn run(&self, cpu: &Cpu) -> Vec<Buffer> {
        let [t, _, h] = self.size;
        let fresh = Buffer::new(self.out, [t, h], self.gap);
        let mut out = self.residual.as_ref().filter(|_| self.in_place).cloned().unwrap_or(fresh);
        let mut normed = self.norm.as_ref().map(|(_, dtype)| Buffer::new(*dtype, [t, h], self.gap));
        let operands = Combine {
            rows: match &self.slot_row {
                Some(slot_row) => SlotRows::Permuted { y: self.y.view(), slot_row: slot_row.view() },
                None => SlotRows::Slots(self.y.view()),
            },
            weights: self.weights.as_ref().map(|b| b.view()),
            copies: self.copies.as_ref().map(|(x, experts)| Copies {
                x: x.view(),
                experts: experts.view(),
                first: 3,
                end: 5,
            }),
            routed_scale: self.routed_scale,
            shared: self.shared.as_ref().map(|y| Shared {
                y: y.view(),
                factor: (self.shared_gate == 1).then(|| self.gates.view()),
                logit: (self.shared_gate == 2).then(|| self.gates.view()),
                scale: self.shared_scale,
            }),
            residual: self.residual.as_ref().map(|residual| match self.in_place {
                true => Residual::InPlace,
                false => Residual::Of(residual.view()),
            }),
            norm: normed.as_mut().zip(self.norm.as_ref()).map(|(normed, (weight, _))| NextNorm {
                weight: weight.as_ref().map(|b| b.view()),
                eps: 1e-5,
                out: normed.view_mut(),
            }),
            out: out.view_mut(),
        };
        cpu.combine(&cpu.stream().unwrap(), operands).unwrap();
        [Some(out), normed].into_iter().flatten().collect()
    }

    fn check(&self) {
        let [tokens, top_k, hidden] = self.size;
        let values = |b: &Option<Buffer>| b.as_ref().map(|b| b.values());
        let (y, gates) = (self.y.values(), self.gates.values());
        let (weights, shared, residual) = (values(&self.weights), values(&self.shared), values(&self.residual));
        let norm_weight = self.norm.as_ref().and_then(|(weight, _)| values(weight));
        let slot_row = self.slot_row.as_ref().map(|b| b.numbers());
        let copies = self.copies.as_ref().map(|(x, ids)| (x.values(), ids.numbers()));
        let op = reference::Combine {
            y: &y,
            slot_row: slot_row.as_deref(),
            weights: weights.as_deref(),
            copies: copies.as_ref().map(|(x, ids)| reference::Copies { x, ids, first: 3, end: 5 }),
            routed_scale: f64::from(self.routed_scale),
            shared: shared.as_deref().map(|y| reference::Shared {
                y,
                gate: match self.shared_gate {
                    0 => reference::SharedGate::None,
                    1 => reference::SharedGate::Factor(&gates),
                    _ => reference::SharedGate::Logit(&gates),
                },
                scale: f64::from(self.shared_scale),
            }),
            residual: residual.as_deref(),
            norm: self.norm.as_ref().map(|_| reference::Norm { weight: norm_weight.as_deref(), eps: 1e-5f32.into() }),
            tokens,
            hidden,
            top_k,
        };
        let expected = reference::combine(&op);
        check(
            |cpu, _| self.run(cpu),
            |outputs| {
                close(&outputs[0], &expected.out, |_| 2e-6 * (top_k + 4) as f64);
                if let Some(normed) = &expected.normed {
                    close(&outputs[1], normed, |_| 6e-6 * (top_k + 4) as f64);
                }
            },
        );
    }
}

fn check(run: impl Fn(&Cpu, &fused_moe_cpu::CpuStream) -> Vec<Buffer>, verify: impl Fn(&[Buffer])) {
    crate::support::check(run, |outputs, _| verify(outputs));
}

#[test]
fn combine_agrees_with_the_reference() {
    let mut random = Random(31);
    let sizes = [[0, 2, 9], [1, 1, 1], [1, 8, 1025], [7, 3, 300], [64, 2, 257], [33, 8, 128], [5, 1, 7], [3, 0, 5]];
    for size in sizes {
        for _ in 0..12 {
            case(&mut random, size).check();
        }
    }
    for size in [[3, 2, 8192], [4, 2, 8193], [2, 4, 20_001]] {
        for _ in 0..4 {
            case(&mut random, size).check();
        }
    }
}

#[test]
fn a_token_alone_has_the_bits_that_it_has_in_a_batch() {
    let mut random = Random(32);
    let cpu = Cpu::with_threads(2).unwrap();
    let stream = cpu.stream().unwrap();
    let y = Buffer::floats(DType::BF16, [40, 3, 500], 0, &random.units(40 * 3 * 500, 1.0));
    let weights = Buffer::floats(DType::F32, [40, 3], 0, &random.units(120, 1.0));
    let run = |first: usize, tokens: usize| {
        let [mut out, mut normed] = [0; 2].map(|_| Buffer::new(DType::F32, [tokens, 500], 0));
        let rows = y.view().row_range(first * 3, tokens * 3).unwrap().reshape([tokens, 3, 500]).unwrap();
        let weights = weights.view().row_range(first, tokens).unwrap();
        let norm = Some(NextNorm { weight: None, eps: 1e-6, out: normed.view_mut() });
        cpu.combine(&stream, Combine { norm, ..Combine::new(SlotRows::Slots(rows), weights, out.view_mut()) }).unwrap();
        [out.values(), normed.values()]
    };
    let all = run(0, 40);
    for t in 0..40 {
        let alone = run(t, 1);
        for i in 0..2 {
            assert_eq!(alone[i], all[i][t * 500..][..500]);
        }
    }
}

#[test]
fn rows_that_are_none_contribute_nothing() {
    let cpu = Cpu::with_threads(1).unwrap();
    let y = Buffer::floats(DType::F32, [4, 2], 0, &[1.0, 2.0, f64::NAN, f64::INFINITY, 3.0, 4.0, 5.0, 6.0]);
    let slot_row = Buffer::ids([4], 0, &[0, NO_ROW, 4, 2]);
    let weights = Buffer::floats(DType::F32, [2, 2], 0, &[2.0, 0.0, 1.0, 1.0]);
    let mut out = Buffer::new(DType::F32, [2, 2], 0);
    let rows = SlotRows::Permuted { y: y.view(), slot_row: slot_row.view() };
    cpu.combine(&cpu.stream().unwrap(), Combine::new(rows, weights.view(), out.view_mut())).unwrap();
    assert_eq!(out.values(), [2.0, 4.0, 3.0, 4.0]);
}

#[test]
fn zero_and_accumulate() {
    let mut random = Random(33);
    for [t, h] in [[0, 4], [1, 1], [3, 1030], [200, 65], [5, 0]] {
        for dtype in FLOATS {
            let gap = random.pick(&[0, 3]);
            let acc = Buffer::floats(dtype, [t, h], gap, &random.units(t * h, 1.0));
            let y = Buffer::floats(random.pick(&FLOATS), [t, h], gap, &random.units(t * h, 1.0));
            let weights = Buffer::floats(DType::F32, [t, 1], gap, &random.units(t, 1.0));
            let value = 0.75;
            let run = |cpu: &Cpu, stream: &_| {
                let (mut by_value, mut by_row, mut zeros) = (acc.clone(), acc.clone(), acc.clone());
                for (acc, weight) in
                    [(&mut by_value, Factor::Value(value)), (&mut by_row, Factor::PerRow(weights.view()))]
                {
                    cpu.accumulate(stream, Accumulate { acc: acc.view_mut(), weight, y: y.view() }).unwrap();
                }
                cpu.zero(stream, Zero { out: zeros.view_mut() }).unwrap();
                vec![by_value, by_row, zeros]
            };
            let sum = |w: &dyn Fn(usize) -> f64| -> Vec<f64> {
                acc.values().iter().zip(y.values()).enumerate().map(|(i, (a, y))| a + w(i / h) * y).collect()
            };
            check(run, |outputs| {
                close(&outputs[0], &sum(&|_| f64::from(value)), |_| 1e-6);
                close(&outputs[1], &sum(&|t| weights.values()[t]), |_| 1e-6);
                assert!(outputs[2].values().iter().all(|&x| x == 0.0));
            });
        }
    }
}
