use crate::support::*;
use fused_moe_core::operation::{Permute, TileSchedule};
use fused_moe_core::reference::{self, Permutation};
use fused_moe_core::{Backend, DType, NO_EXPERT, NO_ROW, Status};
use fused_moe_cpu::Cpu;
use proptest::prelude::*;
use std::ops::Range;

fn check_permute(ids: &[u32], [t, k]: [usize; 2], experts: usize, local: Range<usize>, gap: usize) -> Permutation {
    let expected = reference::permute(&reference::Permute { ids, experts, local: local.clone() });
    let input = Buffer::ids([t, k], gap, ids);
    let run = |cpu: &Cpu, stream: &_| {
        let mut outputs = [[t * k], [t * k], [experts + 1]].map(|shape| Buffer::new(DType::U32, shape, gap));
        let [row_slot, slot_row, offsets] = &mut outputs;
        let operands = Permute {
            experts: input.view(),
            experts_total: experts,
            local: local.clone(),
            row_slot: row_slot.view_mut(),
            slot_row: slot_row.view_mut(),
            offsets: offsets.view_mut(),
        };
        cpu.permute(stream, operands).unwrap();
        outputs.into()
    };
    check(run, |outputs, status| {
        assert!(outputs[0].numbers() == expected.row_slot);
        assert!(outputs[1].numbers() == expected.slot_row);
        assert!(outputs[2].numbers() == expected.offsets);
        assert_eq!(status, expected.status);
    });
    expected
}

#[test]
fn permute_agrees_with_the_reference() {
    let mut random = Random(11);
    for experts in [1, 3, 8, 12, 24, 60, 128, 160, 256, 512, 513, 4096] {
        for (t, k) in [(0, 2), (1, 1), (1, 8), (5, 3), (257, 4), (1000, 1)] {
            let ids: Vec<u32> = (0..t * k)
                .map(|_| match random.below(40) {
                    0 => NO_EXPERT,
                    1 if t == 257 => experts as u32 + random.below(9) as u32,
                    _ => random.below(experts) as u32,
                })
                .collect();
            let (a, b) = (random.below(experts + 1), random.below(experts + 1));
            let local = if random.flip() { 0..experts } else { a.min(b)..a.max(b) };
            let gap = random.pick(&[0, 2]);
            check_permute(&ids, [t, k], experts, local, gap);
        }
    }
}

#[test]
fn permute_of_many_slots() {
    let mut random = Random(12);
    for (experts, k) in [(8, 2), (256, 8), (600, 5)] {
        let t = 70_000 / k;
        let mut ids: Vec<u32> = (0..t * k).map(|_| (random.below(experts) * random.below(3) / 2) as u32).collect();
        check_permute(&ids, [t, k], experts, 0..experts, 1);
        ids.fill(experts as u32 / 2);
        let all_on_one = check_permute(&ids, [t, k], experts, 0..experts, 0);
        assert!(all_on_one.status.is_ok());
    }
}

#[test]
fn permute_of_nothing() {
    let rows = check_permute(&[], [0, 4], 3, 0..3, 0);
    assert_eq!(rows.offsets, [0; 4]);
    check_permute(&[], [5, 0], 3, 0..3, 0);
    check_permute(&[], [usize::MAX, 0], 3, 0..3, 0);
    assert_eq!(check_permute(&[3, 7, NO_EXPERT - 1], [1, 3], 3, 1..1, 0).status, Status::EXPERT_OUT_OF_RANGE);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn permutations_are_inverse_and_ordered(
        ids in prop::collection::vec(0u32..20, 0..200),
        experts in 1usize..20,
        first in 0usize..20,
        width in 0usize..20,
    ) {
        let first = first.min(experts);
        let local = first..(first + width).min(experts);
        let permutation = check_permute(&ids, [ids.len(), 1], experts, local.clone(), 0);
        for (slot, &row) in permutation.slot_row.iter().enumerate() {
            prop_assert_eq!(row != NO_ROW, local.contains(&(ids[slot] as usize)));
            prop_assert!(row == NO_ROW || permutation.row_slot[row as usize] as usize == slot);
        }
        let rows = &permutation.row_slot[..permutation.offsets[experts] as usize];
        let ordered = rows.windows(2).all(|pair| {
            let key = |slot: u32| (ids[slot as usize], slot);
            key(pair[0]) < key(pair[1])
        });
        prop_assert!(ordered);
    }
}

#[test]
fn tile_schedule_agrees_with_the_reference() {
    let mut random = Random(13);
    for experts in [1, 3, 8, 60, 256] {
        for tile_rows in [1, 2, 16, 64, usize::MAX] {
            let mut offsets = vec![0];
            for _ in 0..experts {
                offsets.push(offsets[offsets.len() - 1] + random.pick(&[0, 0, 1, 3, 16, 65]));
            }
            let expected = reference::tile_schedule(&offsets, u32::try_from(tile_rows).unwrap_or(u32::MAX));
            for room in [expected.len(), expected.len() + 3, expected.len() / 2, 0] {
                let input = Buffer::ids([experts + 1], 0, &offsets);
                let before = vec![77; 3 * room];
                let run = |cpu: &Cpu, stream: &_| {
                    let (mut tiles, mut count) = (Buffer::ids([room, 3], 1, &before), Buffer::new(DType::U32, [1], 0));
                    let operands = TileSchedule {
                        offsets: input.view(),
                        tile_rows,
                        tiles: tiles.view_mut(),
                        count: count.view_mut(),
                    };
                    cpu.tile_schedule(stream, operands).unwrap();
                    vec![tiles, count]
                };
                let tiles = expected.iter().flat_map(|tile| [tile.expert, tile.first_row, tile.rows]);
                let full: Vec<u32> = tiles.chain(std::iter::repeat(77)).take(3 * room).collect();
                check(run, |outputs, _| {
                    assert_eq!(outputs[0].numbers(), full);
                    assert_eq!(outputs[1].numbers(), [expected.len().min(room) as u32]);
                });
            }
        }
    }
}

#[test]
fn tile_schedule_of_offsets_that_are_none() {
    let cpu = Cpu::with_threads(1).unwrap();
    let stream = cpu.stream().unwrap();
    let input = Buffer::ids([4], 0, &[5, u32::MAX, 3, u32::MAX - 1]);
    let (mut tiles, mut count) = (Buffer::new(DType::U32, [9, 3], 0), Buffer::new(DType::U32, [1], 0));
    let (offsets, tile_rows) = (input.view(), 1 << 31);
    let operands = TileSchedule { offsets, tile_rows, tiles: tiles.view_mut(), count: count.view_mut() };
    cpu.tile_schedule(&stream, operands).unwrap();
    assert_eq!(count.numbers(), [4]);
}
