use crate::support::*;
use fused_moe_core::config::{Capacity, CapacityLimit, CapacityOrder};
use fused_moe_core::operation::{DropOverflow, Permute};
use fused_moe_core::{Backend, DType, NO_EXPERT, Permutation, View, reference};
use fused_moe_cpu::{Cpu, CpuStream};

struct Case {
    capacity: Capacity,
    ids: Vec<u32>,
    weights: Buffer,
    importance: Buffer,
    sequences: Option<Vec<u32>>,
    /// T, K, E.
    size: [usize; 3],
    gap: usize,
}

fn case(random: &mut Random, [t, k, e]: [usize; 3]) -> Case {
    let limit = match random.below(4) {
        0 => CapacityLimit::Slots(random.pick(&[0, 1, 2, 5, t, usize::MAX])),
        1 => CapacityLimit::Fraction(random.pick(&[0.0, 0.1, 0.3, 0.5, 2.0])),
        2 => CapacityLimit::EvenShare { factor: random.pick(&[0, 1, 2, usize::MAX]) },
        _ => CapacityLimit::Slots(1 + random.below(t * k / e + 1)),
    };
    let capacity = Capacity {
        limit,
        order: random.pick(&[CapacityOrder::Position, CapacityOrder::Score]),
        renormalize: random.pick(&[None, Some(0.0), Some(0.25)]),
    };
    let favourite = random.below(e);
    let id = |random: &mut Random| match random.below(12) {
        0 => NO_EXPERT,
        1..=5 => favourite as u32,
        _ => random.below(e) as u32,
    };
    let sequences = random.flip().then(|| {
        // The first tokens and the last may lie outside what is said of them; some sequences have no tokens.
        let mut ends: Vec<u32> = (0..2 + random.below(5)).map(|_| random.below(t + 3) as u32).collect();
        ends.sort();
        ends
    });
    let gap = random.pick(&[0, 3]);
    let importance: Vec<f64> = (0..t)
        .map(|_| match random.below(8) {
            0 => random.pick(&[f64::NAN, f64::NEG_INFINITY, f64::INFINITY, 0.0, -0.0, 1.0]),
            _ => (8.0 * random.unit()).round() / 8.0,
        })
        .collect();
    Case {
        capacity,
        ids: (0..t * k).map(|_| id(random)).collect(),
        weights: Buffer::floats(DType::F32, [t, k], gap, &random.units(t * k, 1.0)),
        importance: match random.flip() {
            true => Buffer::floats(DType::F32, [t], 0, &importance),
            false => Buffer::floats(DType::F32, [t, 1], gap, &importance),
        },
        sequences,
        size: [t, k, e],
        gap,
    }
}

impl Case {
    fn by_score(&self) -> bool {
        self.capacity.order == CapacityOrder::Score
    }

    fn run(&self, cpu: &Cpu, stream: &CpuStream) -> Vec<Buffer> {
        let [t, k, e] = self.size;
        let (mut experts, mut weights) = (Buffer::ids([t, k], self.gap, &self.ids), self.weights.clone());
        let mut rows = [[t * k], [t * k], [e + 1]].map(|shape| Buffer::new(DType::U32, shape, 0));
        let [row_slot, slot_row, offsets] = &mut rows;
        let operands = Permute {
            experts: experts.view(),
            experts_total: e,
            local: 0..e,
            row_slot: row_slot.view_mut(),
            slot_row: slot_row.view_mut(),
            offsets: offsets.view_mut(),
        };
        cpu.permute(stream, operands).unwrap();
        let [row_slot, slot_row, offsets] = &rows;
        let sequences = self.sequences.as_ref().map(|ends| View::of(ends, [ends.len()]).unwrap());
        let operands = DropOverflow {
            capacity: self.capacity,
            permutation: Permutation { row_slot: row_slot.view(), slot_row: slot_row.view(), offsets: offsets.view() },
            importance: self.by_score().then(|| self.importance.view()),
            sequences,
            experts: experts.view_mut(),
            weights: weights.view_mut(),
        };
        cpu.drop_overflow(stream, operands).unwrap();
        vec![experts, weights]
    }

    fn check(&self) {
        let [tokens, top_k, experts] = self.size;
        let permute = reference::Permute { ids: &self.ids, experts, local: 0..experts };
        let (weights, importance) = (self.weights.values(), self.importance.values());
        let (ids, expected) = reference::drop_overflow(&reference::DropOverflow {
            capacity: self.capacity,
            ids: &self.ids,
            weights: &weights,
            slot_row: &reference::permute(&permute).slot_row,
            importance: self.by_score().then_some(&importance),
            sequences: self.sequences.as_deref(),
            experts,
            tokens,
            top_k,
        });
        check(
            |cpu, stream| self.run(cpu, stream),
            |outputs, status| {
                assert!(status.is_ok());
                assert_eq!(outputs[0].numbers(), ids, "{:?}, {:?}", self.capacity, self.sequences);
                close(&outputs[1], &expected, |i| 1e-6 * expected[i].abs());
            },
        );
    }
}

#[test]
fn drop_overflow_agrees_with_the_reference() {
    let mut random = Random(51);
    for [t, k, e] in [[0, 2, 3], [1, 1, 1], [5, 3, 4], [40, 2, 3], [33, 8, 20], [130, 1, 2], [3, 300, 5], [50, 4, 600]]
    {
        for _ in 0..30 {
            case(&mut random, [t, k, e]).check();
        }
    }
    for _ in 0..3 {
        case(&mut random, [700, 2, 3]).check();
    }
}

/// As many tokens as it may be, all on one expert: work that grew with their square would not come to an end.
#[test]
fn one_expert_takes_all_of_many_tokens() {
    let t = 400_000;
    let order: Vec<f64> = (0..t).map(|i| ((i * 7919) % t) as f64).collect();
    let base = Case {
        capacity: Capacity { limit: CapacityLimit::Slots(t / 3), order: CapacityOrder::Score, renormalize: Some(1e-9) },
        ids: [[0, 1]; 1].repeat(t).concat(),
        weights: Buffer::floats(DType::F32, [t, 2], 0, &vec![0.5; 2 * t]),
        importance: Buffer::floats(DType::F32, [t], 0, &order),
        sequences: None,
        size: [t, 2, 2],
        gap: 0,
    };
    let cpu = Cpu::with_threads(2).unwrap();
    let stream = cpu.stream().unwrap();
    let by_score = base.run(&cpu, &stream)[0].numbers();
    let first = (t - t / 3) as f64;
    assert!((0..t).all(|i| (by_score[2 * i] == 0) == (order[i] >= first) && (by_score[2 * i + 1] == 1) == (order[i] >= first)));
    let by_position = Case { capacity: Capacity { order: CapacityOrder::Position, ..base.capacity }, ..base };
    let left = by_position.run(&cpu, &stream)[0].numbers();
    assert!((0..t).all(|i| (left[2 * i] == 0) == (i < t / 3)));
}

/// Numbers that are no permutation, and sequences in no order: some slots are dropped, nothing else happens.
#[test]
fn rows_that_are_none() {
    let cpu = Cpu::with_threads(2).unwrap();
    let stream = cpu.stream().unwrap();
    for (order, sequences) in [(CapacityOrder::Position, [9, 1, 7, 0]), (CapacityOrder::Score, [0, u32::MAX, 0, 3])] {
        let (mut experts, mut weights) =
            (Buffer::ids([3, 2], 3, &[0, 1, 1, 0, 0, 1]), Buffer::floats(DType::F32, [3, 2], 3, &[1.0; 6]));
        let rows = [u32::MAX, 5, 5, 0, 9, u32::MAX - 1];
        let offsets = [4, 1, 6, u32::MAX, 2];
        let operands = DropOverflow {
            capacity: Capacity { limit: CapacityLimit::Slots(0), order, renormalize: Some(0.5) },
            permutation: Permutation {
                row_slot: View::of(&rows, [6]).unwrap(),
                slot_row: View::of(&rows, [6]).unwrap(),
                offsets: View::of(&offsets, [5]).unwrap(),
            },
            importance: (order == CapacityOrder::Score).then(|| View::of(&[1.0f32, f32::NAN, 0.0], [3]).unwrap()),
            sequences: Some(View::of(&sequences, [4]).unwrap()),
            experts: experts.view_mut(),
            weights: weights.view_mut(),
        };
        cpu.drop_overflow(&stream, operands).unwrap();
        assert!(experts.numbers().iter().all(|&id| id < 2 || id == NO_EXPERT));
        assert_eq!(weights.values().len(), 6);
    }
}
