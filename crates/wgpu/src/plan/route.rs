//! Routing and permutation.

use crate::kernel::Kernel;
use fused_moe_core::problem::{ChoiceProblem, PermuteProblem};

/// A workgroup a token, and why it is of so many threads: for one token its time is that of what each thread does in turn,
/// and of its barriers, which cost more among more: one key a thread for up to 128 experts, two for 256.
pub(crate) fn route(problem: &ChoiceProblem) -> (Kernel, &'static str) {
    let why = if problem.experts > 512 {
        "very many experts: a workgroup of 256 a token"
    } else {
        "a workgroup a token, of up to 128 threads"
    };
    let (threads, keys) = threads_of_token(problem.experts);
    (Kernel::Route { rule: (&problem.rule).into(), threads, keys }, why)
}

/// Threads of a token, and experts of each of them.
pub(crate) fn threads_of_token(experts: usize) -> (u32, u32) {
    let threads = if experts > 512 { 256 } else { experts.next_power_of_two().clamp(32, 128) };
    (threads as u32, experts.div_ceil(threads).next_power_of_two() as u32)
}

/// One launch where there is one block, else three.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PermutePlan {
    pub(crate) blocks: usize,
    pub(crate) slots_per_block: usize,
    /// Threads an expert of the scan over blocks.
    pub(crate) parts: usize,
    pub(crate) why: &'static str,
}

/// Slots that one workgroup sorts as fast as three launches do.
const SLOTS_OF_ONE: usize = 2048;

pub(crate) fn permute(problem: &PermuteProblem) -> PermutePlan {
    let &PermuteProblem { slots, experts, .. } = problem;
    // the more blocks, the less each sorts, and the more counts the one workgroup of the scan reads: ten of them take as
    // long as a slot of each of 256 threads does to be sorted
    let at_most = (slots / experts).saturating_mul(10).isqrt().max(1);
    // a block leaves its counts where its slots are
    let slots_per_block = slots.div_ceil(at_most).max(experts).max(512);
    let blocks = slots / slots_per_block;
    if slots <= SLOTS_OF_ONE || blocks < 2 {
        let why = "few slots: one workgroup sorts them";
        return PermutePlan { blocks: 1, slots_per_block: slots, parts: 1, why };
    }
    let parts = (256 / experts).clamp(1, blocks);
    PermutePlan { blocks, slots_per_block, parts, why: "many slots: each block counts, one scans, each block sorts" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fused_moe_core::DType;
    use fused_moe_core::config::RoutingRule;

    #[test]
    fn route_has_room_for_every_key() {
        for experts in [1, 8, 32, 33, 60, 128, 129, 160, 256, 384, 512, 1024, 2048, 4095, 4096] {
            let (tokens, top_k, vocabulary, rule) = (1, 1, 0, RoutingRule::default());
            let problem = ChoiceProblem { tokens, experts, top_k, logits: DType::F32, vocabulary, rule };
            let (Kernel::Route { threads, keys, .. }, _) = route(&problem) else { panic!("{experts}") };
            assert!((threads * keys) as usize >= experts && (32..=256).contains(&threads) && keys <= 16, "{experts}");
            assert!(keys <= 4 || threads == 256, "{experts}");
        }
    }

    #[test]
    fn permute_keeps_counts_in_the_slots_of_a_block() {
        for experts in [1, 7, 128, 512, 4096] {
            for slots in [0, 1, 1000, 5000, 65536, 1 << 24, u32::MAX as usize - 2] {
                let plan = permute(&PermuteProblem { slots, experts, first: 0, end: experts });
                assert!(plan.blocks == 1 || plan.slots_per_block >= experts);
                assert!(plan.blocks * plan.slots_per_block <= slots);
                assert!(plan.blocks == 1 || plan.blocks * plan.blocks <= slots / experts * 10, "{plan:?}");
                assert!((1..=16).contains(&(plan.parts * experts).div_ceil(256)));
            }
        }
    }
}
