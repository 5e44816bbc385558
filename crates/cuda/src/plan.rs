//! How an operation is carried out: a pure function of its problem and the device's numbers.

pub(crate) mod grouped;

use crate::device::DeviceNumbers;
use crate::kernel::{GATE_ROUTE_THREADS, Kernel, TOKENS};
use crate::launch::Grid;
use fused_moe_core::DType;
use fused_moe_core::problem::{ChoiceProblem, CombineProblem, GateProblem, LinearProblem, PermuteProblem};

/// A kernel, its grid, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) kernel: Kernel,
    pub(crate) grid: Grid,
    pub(crate) why: &'static str,
}

/// Tokens up to which a warp a column reads the weights fast enough.
const FEW_TOKENS: usize = 48;

/// The most that one load brings is 16 bytes of the narrower format.
pub(crate) const fn dot_vector(x: DType, weight: DType) -> u8 {
    if x.size() == 2 && weight.size() == 2 { 8 } else { 4 }
}

const TILE: usize = 64;
const FEW: &str = "few tokens: a warp a column streams the weights once";
const MANY: &str = "many tokens: 64 x 64 tiles share what they read";

/// `aligned` says whether groups of so many elements of x, router and norm weight may be read at once.
pub(crate) fn gate(problem: &GateProblem, aligned: impl Fn(u64) -> bool, device: &DeviceNumbers) -> Plan {
    let GateProblem { tokens, experts, x, router, .. } = *problem;
    if tokens <= FEW_TOKENS {
        let kernel = Kernel::Gate { x, router, vector: vector(dot_vector(x, router), aligned) };
        let grid = warp_a_column(experts, tokens, device);
        return Plan { kernel, grid, why: FEW };
    }
    let kernel = Kernel::GateTiled { x, router, vector: vector(4, aligned) };
    Plan { kernel, grid: Grid::plane(tokens.div_ceil(TILE), experts.div_ceil(TILE), 256), why: MANY }
}

/// The largest router that one block reads as fast as a second launch takes.
const ROUTER_OF_A_BLOCK: usize = 128 * 1024;

/// Whether a block has a token's router product and its choice, and how; otherwise the two go one after the other, with the
/// same bits.
pub(crate) fn gate_route(problem: &(GateProblem, ChoiceProblem), aligned: impl Fn(u64) -> bool) -> Option<Plan> {
    let (GateProblem { tokens, hidden, experts, x, router }, choice) = problem;
    let fits = hidden.saturating_mul(*experts).saturating_mul(router.size()) <= ROUTER_OF_A_BLOCK;
    (*tokens <= FEW_TOKENS && fits && warp_routes(choice)).then(|| Plan {
        kernel: Kernel::GateRoute { x: *x, router: *router, vector: vector(dot_vector(*x, *router), aligned) },
        grid: Grid::line(*tokens, GATE_ROUTE_THREADS).with_shared(route_shared(choice)),
        why: "few tokens and a small router: a block a token, logits and choice in one launch",
    })
}

/// Whether a warp is enough for a token's choice.
fn warp_routes(problem: &ChoiceProblem) -> bool {
    problem.experts <= 512 && route_shared(problem) <= 8 * 1024
}

pub(crate) fn route(problem: &ChoiceProblem) -> Plan {
    let &ChoiceProblem { tokens, logits, .. } = problem;
    let shared = route_shared(problem);
    if warp_routes(problem) {
        let grid = Grid::line(tokens.div_ceil(4), 128).with_shared(4 * shared);
        return Plan { kernel: Kernel::Route { logits, threads: 32 }, grid, why: "a warp holds the keys of a token" };
    }
    let grid = Grid::line(tokens, 256).with_shared(shared);
    Plan { kernel: Kernel::Route { logits, threads: 256 }, grid, why: "many experts: a block a token" }
}

/// Bytes of one token's keys and groups.
fn route_shared(problem: &ChoiceProblem) -> usize {
    use fused_moe_core::config::Selection;
    let groups = match problem.rule.selection {
        Selection::TopK { groups: Some(groups), .. } => groups.count,
        _ => 0,
    };
    (problem.experts + groups.div_ceil(2)) * 8
}

/// A block's warps count apart, as many as have room for their counts in shared memory.
const fn permute_warps(experts: usize) -> u32 {
    let mut warps = 32;
    while warps > 1 && warps as usize * experts > 11 * 1024 {
        warps /= 2;
    }
    warps
}

/// Threads an expert of the scan over blocks.
const fn scan_parts(experts: usize) -> usize {
    let parts = 1024 / experts;
    if parts > 1 { parts } else { 1 }
}

/// One launch for few slots, else three.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PermutePlan {
    pub(crate) launches: [Option<Plan>; 3],
    pub(crate) blocks: usize,
    pub(crate) slots_per_block: usize,
    pub(crate) parts: usize,
}

pub(crate) fn permute(problem: &PermuteProblem, device: &DeviceNumbers) -> PermutePlan {
    let &PermuteProblem { slots, experts, .. } = problem;
    let warps = permute_warps(experts);
    let threads = 32 * warps;
    let counts = 4 * experts * warps as usize;
    let multiprocessors = (device.multiprocessors as usize).max(1);
    let slots_per_block = slots.div_ceil(multiprocessors).max(experts).max(1024);
    let blocks = slots / slots_per_block;
    if blocks <= 2 {
        let grid = Grid::line(1, threads).with_shared(counts + 4 * (experts + 1));
        let one = Plan { kernel: Kernel::Permute, grid, why: "few slots: one block sorts them" };
        return PermutePlan { launches: [Some(one), None, None], blocks: 1, slots_per_block: slots, parts: 1 };
    }
    let parts = scan_parts(experts);
    let why = "many slots: each block counts, one block scans, each block sorts";
    let all = Grid::line(blocks, threads).with_shared(counts);
    let scan = Grid::line(1, 1024).with_shared(4 * (experts + 1 + experts * parts));
    let launches = [
        Some(Plan { kernel: Kernel::PermuteCount, grid: all, why }),
        Some(Plan { kernel: Kernel::PermuteScan, grid: scan, why }),
        Some(Plan { kernel: Kernel::PermuteScatter, grid: all, why }),
    ];
    PermutePlan { launches, blocks, slots_per_block, parts }
}

pub(crate) fn combine(problem: &CombineProblem, norm: bool, aligned: impl Fn(u64) -> bool) -> Plan {
    let &CombineProblem { tokens, hidden, y, .. } = problem;
    let vector = if hidden.is_multiple_of(4) { vector(4, aligned) } else { 1 };
    let stash = norm && 4 * hidden <= 40 * 1024;
    let kernel = Kernel::Combine { y, vector, norm, stash };
    let (pieces, why) = if norm {
        (1, "a block a token: its norm needs all of it")
    } else {
        (hidden.div_ceil(256 * usize::from(vector)), "tokens and pieces of them in parallel")
    };
    let grid = Grid::plane(tokens, pieces, 256).with_shared(if stash { 4 * hidden } else { 0 });
    Plan { kernel, grid, why }
}

pub(crate) fn linear(problem: &LinearProblem, aligned: impl Fn(u64) -> bool, device: &DeviceNumbers) -> Plan {
    let &LinearProblem { rows, outer, x, weight, .. } = problem;
    if rows <= FEW_TOKENS {
        let kernel = Kernel::Linear { x, weight, vector: vector(dot_vector(x, weight), aligned) };
        let grid = warp_a_column(outer, rows, device);
        return Plan { kernel, grid, why: FEW };
    }
    let tiles = rows.div_ceil(TILE).saturating_mul(outer.div_ceil(TILE));
    let kernel = Kernel::LinearTiled { x, weight, vector: vector(4, aligned) };
    Plan { kernel, grid: Grid::line(tiles, 256), why: MANY }
}

/// Blocks of up to 8 warps, of fewer where that gives every multiprocessor some.
fn warp_a_column(columns: usize, rows: usize, device: &DeviceNumbers) -> Grid {
    let groups = rows.div_ceil(TOKENS as usize);
    let share = columns.saturating_mul(groups) / (device.multiprocessors as usize).max(1);
    let warps = share.clamp(1, 8).next_power_of_two();
    Grid::plane(columns.div_ceil(warps), groups, 32 * warps as u32)
}

/// Rows of an element-wise kernel along y, pieces of 256 elements along x.
pub(crate) fn elementwise(rows: usize, width: usize) -> Grid {
    Grid::plane(width.div_ceil(256), rows, 256)
}

fn vector(widest: u8, aligned: impl Fn(u64) -> bool) -> u8 {
    if aligned(widest.into()) { widest } else { 1 }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use fused_moe_core::config::RoutingRule;

    pub(crate) fn device() -> DeviceNumbers {
        DeviceNumbers {
            name: "test".into(),
            compute_capability: (9, 0),
            multiprocessors: 132,
            l2_bytes: 50 << 20,
            shared_per_block: 227 << 10,
            shared_per_multiprocessor: 228 << 10,
            memory_bytes: 80 << 30,
            driver: 13000,
        }
    }

    fn gate_problem(tokens: usize) -> GateProblem {
        GateProblem { tokens, hidden: 2048, experts: 128, x: DType::BF16, router: DType::BF16 }
    }

    #[test]
    fn few_tokens_stream_and_many_share() {
        assert_eq!(gate(&gate_problem(1), |_| true, &device()).grid, Grid::plane(128, 1, 32));
        assert_eq!(gate(&gate_problem(48), |_| true, &device()).grid, Grid::plane(16, 12, 256));
        assert!(matches!(gate(&gate_problem(1), |_| true, &device()).kernel, Kernel::Gate { vector: 8, .. }));
        assert!(matches!(gate(&gate_problem(9), |_| false, &device()).kernel, Kernel::Gate { vector: 1, .. }));
        assert!(matches!(gate(&gate_problem(49), |_| true, &device()).kernel, Kernel::GateTiled { .. }));
        assert_eq!(gate(&gate_problem(0), |_| true, &device()).grid.blocks[1], 0);
    }

    #[test]
    fn permute_keeps_counts_in_the_slots_of_a_block() {
        for experts in [1, 7, 128, 512, 4096] {
            for slots in [0, 1, 1000, 5000, 65536, 1 << 24, u32::MAX as usize - 2] {
                let problem = PermuteProblem { slots, experts, first: 0, end: experts };
                let plan = permute(&problem, &device());
                assert!(plan.launches[1].is_none() || plan.slots_per_block >= experts);
                assert!(plan.blocks * plan.slots_per_block <= slots.max(1) || plan.launches[1].is_none());
                for launch in plan.launches.into_iter().flatten() {
                    let limit = if launch.kernel.asks_for_shared() { 200 << 10 } else { 47 << 10 };
                    assert!(launch.grid.shared <= limit, "{launch:?}");
                }
            }
        }
    }

    #[test]
    fn route_gives_many_experts_a_block() {
        let problem = |experts| ChoiceProblem {
            tokens: 5,
            experts,
            top_k: 1,
            logits: DType::F32,
            vocabulary: 0,
            rule: RoutingRule::default(),
        };
        assert_eq!(route(&problem(128)).grid, Grid::line(2, 128).with_shared(4 * 1024));
        assert_eq!(route(&problem(4096)).grid, Grid::line(5, 256).with_shared(32 * 1024));
        let both = |tokens, hidden| {
            gate_route(&(GateProblem { hidden, ..gate_problem(tokens) }, problem(128)), |_| true).is_some()
        };
        assert!(both(1, 512) && !both(1, 2048) && !both(1000, 512));
    }

    #[test]
    fn combine_keeps_a_row_where_it_fits() {
        let problem = |hidden| CombineProblem { tokens: 3, top_k: 2, hidden, y: DType::BF16, out: DType::BF16 };
        assert!(matches!(
            combine(&problem(2048), true, |_| true).kernel,
            Kernel::Combine { stash: true, vector: 4, .. }
        ));
        assert!(matches!(combine(&problem(20000), true, |_| true).kernel, Kernel::Combine { stash: false, .. }));
        assert!(matches!(combine(&problem(2047), false, |_| true).kernel, Kernel::Combine { vector: 1, .. }));
        assert_eq!(combine(&problem(2048), false, |_| true).grid.blocks, [3, 2, 1]);
    }
}
