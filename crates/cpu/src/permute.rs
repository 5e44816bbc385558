//! Slots grouped by expert.

use crate::arch::SharedSlice;
use crate::error::Result;
use crate::plan::{FEW_EXPERTS as FEW, PERMUTE_THREADS as THREADS, PermutePlan, RowsPlan};
use crate::rows::{Part, share_rows};
use crate::{Cpu, CpuStream};
use fused_moe_core::operation::{Permute, TileSchedule};
use fused_moe_core::problem::{MAX_EXPERTS, PermuteProblem};
use fused_moe_core::{NO_EXPERT, NO_ROW, Rows, Status};
use std::ops::Range;

/// What the counting and the placing have in common.
struct Slots<'a> {
    stream: &'a CpuStream,
    problem: PermuteProblem,
    experts: Rows<'a, u32>,
    row_slot: SharedSlice<'a, u32>,
    slot_row: SharedSlice<'a, u32>,
}

/// A counting sort by as many threads as it is worth, each with some successive tokens. All of it is integers in a given
/// order, so the number of threads does not show.
///
/// ```text
/// each thread p:  counts[p][e] = how many of its slots go to e
/// offsets = sums over e, then p, in order;  counts[p][e] = the first row of p's slots for e
/// each thread p:  its slots, in order: row = counts[p][e]++;  row_slot[row] = slot;  slot_row[slot] = row
/// ```
pub(crate) fn permute(cpu: &Cpu, stream: &CpuStream, operands: Permute<'_, Cpu>) -> Result<()> {
    let problem = operands.problem()?;
    let experts = operands.experts.typed()?;
    let row_slot = SharedSlice::new(operands.row_slot.typed_mut()?.into_data());
    let slot_row = SharedSlice::new(operands.slot_row.typed_mut()?.into_data());
    let mut offsets = Part::new(operands.offsets)?;
    let slots = Slots { stream, problem, experts, row_slot, slot_row };
    let PermutePlan { few_experts, threads, .. } = PermutePlan::new(problem.slots, problem.experts, &cpu.device());
    match (few_experts, threads) {
        (true, 1) => slots.run::<FEW>(cpu, &mut [[0; FEW]], offsets.row(0)),
        (true, _) => slots.run::<FEW>(cpu, &mut [[0; FEW]; THREADS][..threads], offsets.row(0)),
        (false, 1) => slots.run::<MAX_EXPERTS>(cpu, &mut [[0; MAX_EXPERTS]], offsets.row(0)),
        (false, _) => slots.run::<MAX_EXPERTS>(cpu, &mut [[0; MAX_EXPERTS]; THREADS][..threads], offsets.row(0)),
    }
    Ok(())
}

impl Slots<'_> {
    fn run<const N: usize>(&self, cpu: &Cpu, counts: &mut [[u32; N]], offsets: &mut [u32]) {
        let threads = counts.len();
        let tokens = if self.problem.slots == 0 { 0 } else { self.experts.rows() };
        let share = tokens.div_ceil(threads);
        let part = |p: usize| (p * share).min(tokens)..((p + 1) * share).min(tokens);
        share_rows(&cpu.pool, &mut *counts, threads, RowsPlan::single(), |range, counts| {
            range.zip(counts).for_each(|(p, counts)| self.count(part(p), counts));
        });
        let mut row = 0;
        for (e, offset) in offsets.iter_mut().enumerate() {
            *offset = row;
            for counts in counts.iter_mut() {
                if let Some(count) = counts.get_mut(e).filter(|_| e < self.problem.experts) {
                    (*count, row) = (row, row + *count);
                }
            }
        }
        share_rows(&cpu.pool, &mut *counts, threads, RowsPlan::single(), |range, counts| {
            range.zip(counts).for_each(|(p, next)| self.place(part(p), next));
        });
        for rest in row as usize..self.problem.slots {
            self.row_slot.store(rest, NO_ROW);
        }
    }

    fn is_local(&self, id: u32) -> bool {
        (self.problem.first..self.problem.end).contains(&(id as usize))
    }

    fn count<const N: usize>(&self, tokens: Range<usize>, counts: &mut [u32; N]) {
        let mut bad = false;
        for t in tokens {
            for &id in self.experts.row(t) {
                match counts.get_mut(id as usize).filter(|_| self.is_local(id)) {
                    Some(count) => *count += 1,
                    None => bad |= id as usize >= self.problem.experts && id != NO_EXPERT,
                }
            }
        }
        if bad {
            self.stream.raise(Status::EXPERT_OUT_OF_RANGE);
        }
    }

    fn place<const N: usize>(&self, tokens: Range<usize>, next: &mut [u32; N]) {
        let mut slot = tokens.start * self.experts.cols();
        for t in tokens {
            for &id in self.experts.row(t) {
                match next.get_mut(id as usize).filter(|_| self.is_local(id)) {
                    Some(row) => {
                        self.row_slot.store(*row as usize, slot as u32);
                        self.slot_row.store(slot, *row);
                        *row += 1;
                    }
                    None => self.slot_row.store(slot, NO_ROW),
                }
                slot += 1;
            }
        }
    }
}

pub(crate) fn tile_schedule(operands: TileSchedule<'_, Cpu>) -> Result<()> {
    operands.problem()?;
    let offsets = operands.offsets.typed::<u32>()?.row(0);
    let tile_rows = u32::try_from(operands.tile_rows).unwrap_or(u32::MAX);
    let room = operands.tiles.rows();
    let (mut tiles, mut count) = (Part::new(operands.tiles)?, Part::new(operands.count)?);
    let mut written = 0;
    for (expert, pair) in offsets.windows(2).enumerate() {
        let (mut first, end) = (pair[0], pair[1]);
        while first < end && written < room {
            let rows = tile_rows.min(end - first);
            tiles.row(written).copy_from_slice(&[expert as u32, first, rows]);
            written += 1;
            first += rows;
        }
    }
    count.row(0).fill(written as u32);
    Ok(())
}
