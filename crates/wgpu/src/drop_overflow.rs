use crate::error::Result;
use crate::kernel::Kernel;
use crate::launch::{Groups, Operand, Tensor, launch, params, tensor};
use crate::{Wgpu, WgpuStream};
use fused_moe_core::config::CapacityLimit;
use fused_moe_core::operation::DropOverflow;

params! {
    /// `limit_by` says which of the numbers limit: 0 is `limit` slots, 1 a fraction of the tokens, 2 `limit` even shares.
    /// The fraction is a number of four words, the first of them whole and the last of the weight 2^-96.
    DropOverflowParams {
        row_slot: Tensor, slot_row: Tensor, offsets: Tensor, importance: Tensor, sequences: Tensor, experts: Tensor,
        weights: Tensor, tokens: u32, top_k: u32, slots: u32, experts_total: u32, sequence_count: u32, limit_by: u32,
        limit: u32, fraction0: u32, fraction1: u32, fraction2: u32, fraction3: u32, renormalize: u32, least: f32,
    }
}

pub(crate) fn drop_overflow(wgpu: &Wgpu, stream: &WgpuStream, operands: DropOverflow<'_, Wgpu>) -> Result<()> {
    const NAME: &str = "drop_overflow";
    let (problem, device) = (operands.problem()?, wgpu.device());
    let DropOverflow { capacity, permutation, importance, sequences, experts, weights } = &operands;
    let importance = importance.as_ref().map(|view| Operand::column(device, NAME, view)).transpose()?;
    let sequences = Operand::maybe(device, NAME, sequences.as_ref())?;
    let row_slot = Operand::of(device, NAME, &permutation.row_slot)?;
    let slot_row = Operand::of(device, NAME, &permutation.slot_row)?;
    let offsets = Operand::of(device, NAME, &permutation.offsets)?;
    let (experts, weights) = (Operand::of(device, NAME, experts)?, Operand::of(device, NAME, weights)?);
    let saturated = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let (limit_by, limit, fraction) = match capacity.limit {
        CapacityLimit::Slots(slots) => (0, saturated(slots), 0.0),
        CapacityLimit::Fraction(fraction) => (1, 0, fraction),
        CapacityLimit::EvenShare { factor } => (2, saturated(factor), 0.0),
    };
    let [fraction0, fraction1, fraction2, fraction3] = words(fraction);
    let params = DropOverflowParams {
        row_slot: row_slot.tensor,
        slot_row: slot_row.tensor,
        offsets: offsets.tensor,
        importance: tensor(&importance),
        sequences: tensor(&sequences),
        experts: experts.tensor,
        weights: weights.tensor,
        tokens: problem.tokens as u32,
        top_k: problem.top_k as u32,
        slots: (problem.tokens * problem.top_k) as u32,
        experts_total: problem.experts as u32,
        sequence_count: saturated(problem.sequences),
        limit_by,
        limit,
        fraction0,
        fraction1,
        fraction2,
        fraction3,
        renormalize: capacity.renormalize.is_some().into(),
        least: capacity.renormalize.unwrap_or(0.0),
    };
    let bound = [Some(row_slot), Some(slot_row), Some(offsets), importance, sequences, Some(experts), Some(weights)];
    launch(wgpu, stream, Kernel::DropOverflow, &bound, (Groups::Line(problem.tokens as u64), &params))
}

/// A number not below zero as the kernel takes it. One whose last bits are below 2^-96 is far below 2^-32, so that of any
/// tokens it makes one slot: not zero is all that counts.
fn words(mut x: f64) -> [u32; 4] {
    let positive = x > 0.0;
    let mut words = [0; 4];
    for word in &mut words {
        *word = x as u32;
        // exact; what a word cannot hold is more than there can be slots
        x = (x - x.floor()) * 4_294_967_296.0;
    }
    if positive && words == [0; 4] {
        words[3] = 1;
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fractions_in_words() {
        assert_eq!(words(0.0), [0; 4]);
        assert_eq!(words(2.75), [2, 3 << 30, 0, 0]);
        assert_eq!(words(f64::from_bits(1)), [0, 0, 0, 1]);
        assert_eq!(words(3e38), [u32::MAX, 0, 0, 0]);
        let value =
            |words: [u32; 4]| words.iter().rev().fold(0.0, |sum, &word| sum / 4_294_967_296.0 + f64::from(word));
        for x in [0.1, 0.07, 1.0 / 3.0, 1e-12, 7.3] {
            assert_eq!(value(words(x)), x);
        }
    }
}
