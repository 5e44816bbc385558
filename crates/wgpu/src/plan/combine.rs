use super::pairs;
use crate::device::{BINDINGS, DeviceNumbers};
use crate::kernel::CombineKernel;
use crate::launch::Groups;
use fused_moe_core::problem::CombineProblem;

/// What a launch of combine writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CombineStep {
    Sum,
    SumAndNorm,
    /// The norm alone, while out still holds what the sum is added to.
    Norm,
}

/// A launch of combine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CombinePlan {
    pub(crate) step: CombineStep,
    pub(crate) kernel: CombineKernel,
    pub(crate) groups: Groups<'static>,
    pub(crate) why: &'static str,
}

/// One launch, or two where `operands` are more than a kernel can have.
pub(crate) fn combine(
    problem: &CombineProblem,
    (norm, in_place, operands): (bool, bool, usize),
    device: &DeviceNumbers,
) -> [Option<CombinePlan>; 2] {
    let &CombineProblem { tokens, hidden, .. } = problem;
    let stash = hidden.next_multiple_of(1024);
    let fits = 4 * stash + 1024 <= device.workgroup_bytes as usize;
    let stash = if fits { stash as u32 } else { 0 };
    let rows = |step, why| {
        let kernel = CombineKernel { norm: true, in_place: in_place && step != CombineStep::Norm, stash };
        let groups = if hidden == 0 { 0 } else { tokens as u64 };
        Some(CombinePlan { step, kernel, groups: Groups::Line(groups), why })
    };
    let sum = CombinePlan {
        step: CombineStep::Sum,
        kernel: CombineKernel { norm: false, in_place, stash: 0 },
        groups: pairs(tokens as u32, hidden),
        why: "tokens and pieces of them in parallel",
    };
    match (norm, operands > BINDINGS) {
        (false, _) => [Some(sum), None],
        (true, false) => [rows(CombineStep::SumAndNorm, "a workgroup a token: its norm needs all of it"), None],
        (true, true) => {
            [rows(CombineStep::Norm, "more operands than a kernel can have: the norm on its own"), Some(sum)]
        }
    }
}

/// A launch of down and combine together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DownCombinePlan {
    /// Slots that go side by side.
    pub(crate) slots: u32,
    pub(crate) groups: u64,
    pub(crate) why: &'static str,
}

/// One token's, of H, K; none where a norm needs all of the row, or `operands` are more than a kernel can have.
pub(crate) fn down_combine([hidden, top_k]: [usize; 2], norm: bool, operands: usize) -> Option<DownCombinePlan> {
    if norm || operands > BINDINGS {
        return None;
    }
    let slots = top_k.next_power_of_two().clamp(1, 8);
    let groups = hidden.div_ceil(4 * 8 / slots) as u64;
    let why = "one token: each expert's part of an output is added up where it is formed, which saves a launch";
    Some(DownCombinePlan { slots: slots as u32, groups, why })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::device;
    use fused_moe_core::DType;

    fn steps(
        hidden: usize,
        parts: (bool, bool, usize),
        workgroup_bytes: u32,
    ) -> Vec<(CombineStep, CombineKernel, u64)> {
        let problem = CombineProblem { tokens: 3, top_k: 2, hidden, y: DType::BF16, out: DType::BF16 };
        let plans = combine(&problem, parts, &DeviceNumbers { workgroup_bytes, ..device() });
        let groups = |groups| if let Groups::Line(n) = groups { n } else { 0 };
        plans.into_iter().flatten().map(|plan| (plan.step, plan.kernel, groups(plan.groups))).collect()
    }

    #[test]
    fn the_norm_goes_first_where_it_needs_a_launch_of_its_own() {
        let kernel = |norm, in_place, stash| CombineKernel { norm, in_place, stash };
        assert_eq!(steps(2000, (false, true, 7), 16384), [(CombineStep::Sum, kernel(false, true, 0), 12)]);
        assert_eq!(steps(2000, (true, true, 8), 16384), [(CombineStep::SumAndNorm, kernel(true, true, 2048), 3)]);
        let both = [(CombineStep::Norm, kernel(true, false, 2048), 3), (CombineStep::Sum, kernel(false, true, 0), 12)];
        assert_eq!(steps(2000, (true, true, 9), 16384), both);
    }

    #[test]
    fn a_row_is_kept_where_it_fits() {
        let stash = |hidden, bytes| steps(hidden, (true, false, 8), bytes)[0].1.stash;
        assert_eq!([stash(3072, 16384), stash(3073, 16384), stash(7168, 32768)], [3072, 0, 7168]);
    }

    #[test]
    fn one_tokens_slots_go_side_by_side_where_one_launch_can_do_it() {
        let plan = |hidden, top_k| down_combine([hidden, top_k], false, 8).map(|plan| (plan.slots, plan.groups));
        assert_eq!([plan(2048, 8), plan(2048, 9)], [Some((8, 512)); 2]);
        assert_eq!([plan(2048, 1), plan(2049, 1)], [Some((1, 64)), Some((1, 65))]);
        assert_eq!([plan(5, 3), plan(0, 8)], [Some((4, 1)), Some((8, 0))]);
        assert_eq!([down_combine([2048, 8], true, 5), down_combine([2048, 8], false, 9)], [None; 2]);
    }

    #[test]
    fn nothing_is_launched_for_nothing() {
        assert!(steps(0, (true, false, 9), 16384).iter().all(|step| step.2 == 0));
    }
}
