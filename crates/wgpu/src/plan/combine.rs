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
    /// The sum over the slots alone, into scratch.
    Rows,
    /// What is added to the sums in scratch, and the norm.
    Rest,
}

/// How many operands a call of combine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CombineParts {
    /// Of the sum over the slots, at most 5.
    pub(crate) rows: usize,
    /// Of what is added to it, at most 3.
    pub(crate) beside: usize,
    /// Of the norm, at most 2; 0: there is none.
    pub(crate) norm: usize,
    /// Whether out is the residual.
    pub(crate) in_place: bool,
}

/// A launch of combine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CombinePlan {
    pub(crate) step: CombineStep,
    pub(crate) kernel: CombineKernel,
    pub(crate) why: &'static str,
}

impl CombinePlan {
    /// Workgroups of so many tokens.
    pub(crate) fn groups(&self, tokens: usize, hidden: usize) -> Groups<'static> {
        match self.kernel.norm {
            true if hidden == 0 => Groups::Line(0),
            true => Groups::Line(tokens as u64),
            false => pairs(tokens as u32, hidden),
        }
    }
}

/// One launch, or two where the operands are more than a kernel can have.
pub(crate) fn combine(
    problem: &CombineProblem,
    parts: &CombineParts,
    device: &DeviceNumbers,
) -> [Option<CombinePlan>; 2] {
    let &CombineParts { rows, beside, norm, in_place } = parts;
    let stash = problem.hidden.next_multiple_of(1024);
    let fits = 4 * stash + 1024 <= device.workgroup_bytes as usize;
    let stash = if fits { stash as u32 } else { 0 };
    let whole_rows = |step, why| {
        let kernel = CombineKernel { norm: true, in_place: in_place && step != CombineStep::Norm, stash };
        Some(CombinePlan { step, kernel, why })
    };
    let cut_rows = |step, why| {
        let kernel = CombineKernel { norm: false, in_place: in_place && step != CombineStep::Rows, stash: 0 };
        Some(CombinePlan { step, kernel, why })
    };
    let sum = cut_rows(CombineStep::Sum, "tokens and pieces of them in parallel");
    let (of_sum, of_norm) = (rows + beside + 1, rows + beside + norm + usize::from(in_place));
    match norm > 0 {
        false if of_sum <= BINDINGS => [sum, None],
        true if of_sum + norm <= BINDINGS => {
            [whole_rows(CombineStep::SumAndNorm, "a workgroup a token: its norm needs all of it"), None]
        }
        true if of_sum.max(of_norm) <= BINDINGS => {
            [whole_rows(CombineStep::Norm, "more operands than a kernel can have: the norm on its own"), sum]
        }
        normed => {
            let rest = "what the sums over the slots are added to";
            let rest = if normed { whole_rows(CombineStep::Rest, rest) } else { cut_rows(CombineStep::Rest, rest) };
            [cut_rows(CombineStep::Rows, "more operands than a kernel can have: the sums over the slots first"), rest]
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

/// One token's, of H, K; none where a norm needs all of the row, or the operands are more than a kernel can have: combine's,
/// down, the slots' experts, `bias` and out.
pub(crate) fn down_combine([hidden, top_k]: [usize; 2], parts: &CombineParts, bias: bool) -> Option<DownCombinePlan> {
    if parts.norm > 0 || parts.rows + parts.beside + usize::from(bias) + 3 > BINDINGS {
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

    fn parts(rows: usize, beside: usize, norm: usize, in_place: bool) -> CombineParts {
        CombineParts { rows, beside, norm, in_place }
    }

    fn steps(hidden: usize, parts: CombineParts, workgroup_bytes: u32) -> Vec<(CombineStep, CombineKernel, u64)> {
        let problem = CombineProblem { tokens: 3, top_k: 2, hidden, y: DType::BF16, out: DType::BF16 };
        let plans = combine(&problem, &parts, &DeviceNumbers { workgroup_bytes, ..device() });
        let groups = |groups| if let Groups::Line(n) = groups { n } else { 0 };
        plans.into_iter().flatten().map(|plan| (plan.step, plan.kernel, groups(plan.groups(3, hidden)))).collect()
    }

    #[test]
    fn the_norm_goes_first_where_it_needs_a_launch_of_its_own() {
        let kernel = |norm, in_place, stash| CombineKernel { norm, in_place, stash };
        let sum = (CombineStep::Sum, kernel(false, true, 0), 12);
        assert_eq!(steps(2000, parts(3, 2, 0, true), 16384), [sum]);
        assert_eq!(steps(2000, parts(3, 2, 2, true), 16384), [(CombineStep::SumAndNorm, kernel(true, true, 2048), 3)]);
        let apart =
            [(CombineStep::Norm, kernel(true, false, 2048), 3), (CombineStep::Sum, kernel(false, false, 0), 12)];
        assert_eq!(steps(2000, parts(3, 3, 2, false), 16384), apart);
        assert_eq!(steps(2000, parts(5, 0, 2, true), 16384).len(), 1);
        assert_eq!(steps(2000, parts(5, 1, 2, false), 16384), apart);
    }

    #[test]
    fn the_slots_go_first_where_that_is_not_enough() {
        let kernel = |norm, in_place, stash| CombineKernel { norm, in_place, stash };
        let rows = (CombineStep::Rows, kernel(false, false, 0), 12);
        let rest = |kernel, groups| [rows, (CombineStep::Rest, kernel, groups)];
        assert_eq!(steps(2000, parts(5, 3, 0, false), 16384), rest(kernel(false, false, 0), 12));
        assert_eq!(steps(2000, parts(5, 3, 2, false), 16384), rest(kernel(true, false, 2048), 3));
        assert_eq!(steps(2000, parts(5, 2, 2, true), 16384), rest(kernel(true, true, 2048), 3));
    }

    /// As the workspace of a layer takes for granted.
    #[test]
    fn the_slots_go_first_only_where_copies_and_a_shared_expert_meet() {
        for (rows, beside) in (2..=3).flat_map(|rows| (0..=3).map(move |beside| (rows, beside))).chain([(5, 0), (5, 1)])
        {
            for (norm, in_place) in (0..=2).flat_map(|norm| [(norm, false), (norm, true)]) {
                // a residual is out or beside
                let parts = parts(rows, beside - usize::from(in_place && beside > 0), norm, in_place);
                let steps = steps(64, parts, 16384);
                assert!(steps.iter().all(|step| step.0 != CombineStep::Rows), "{parts:?}");
            }
        }
    }

    #[test]
    fn no_launch_has_more_operands_than_a_kernel_can() {
        for (rows, beside, norm, in_place) in (1..=5)
            .flat_map(|r| (0..=3).flat_map(move |b| (0..=2).flat_map(move |n| [(r, b, n, false), (r, b, n, true)])))
        {
            for (step, ..) in steps(64, parts(rows, beside, norm, in_place), 16384) {
                let operands = match step {
                    CombineStep::Sum => rows + beside + 1,
                    CombineStep::SumAndNorm => rows + beside + norm + 1,
                    CombineStep::Norm => rows + beside + norm + usize::from(in_place),
                    CombineStep::Rows => rows + 1,
                    CombineStep::Rest => 1 + beside + norm + 1,
                };
                assert!(operands <= BINDINGS, "{rows} {beside} {norm} {in_place} {step:?}");
            }
        }
    }

    #[test]
    fn a_row_is_kept_where_it_fits() {
        let stash = |hidden, bytes| steps(hidden, parts(3, 2, 2, false), bytes)[0].1.stash;
        assert_eq!([stash(3072, 16384), stash(3073, 16384), stash(7168, 32768)], [3072, 0, 7168]);
    }

    #[test]
    fn one_tokens_slots_go_side_by_side_where_one_launch_can_do_it() {
        let all = parts(2, 3, 0, false);
        let plan = |hidden, top_k| down_combine([hidden, top_k], &all, false).map(|plan| (plan.slots, plan.groups));
        assert_eq!([plan(2048, 8), plan(2048, 9)], [Some((8, 512)); 2]);
        assert_eq!([plan(2048, 1), plan(2049, 1)], [Some((1, 64)), Some((1, 65))]);
        assert_eq!([plan(5, 3), plan(0, 8)], [Some((4, 1)), Some((8, 0))]);
        assert_eq!(down_combine([2048, 8], &parts(2, 0, 1, true), false), None);
        assert_eq!(down_combine([2048, 8], &all, true), None);
        assert!(down_combine([2048, 8], &parts(2, 2, 0, true), true).is_some());
    }

    #[test]
    fn nothing_is_launched_for_nothing() {
        assert!(steps(0, parts(5, 3, 2, false), 16384).iter().all(|step| step.2 == 0));
    }
}
