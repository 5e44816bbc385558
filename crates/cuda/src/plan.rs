//! How an operation is carried out: a pure function of its problem and the device's numbers.

pub(crate) mod backward;
pub(crate) mod down_combine;
pub(crate) mod few;
pub(crate) mod grouped;
pub(crate) mod pieces;
pub(crate) mod ring;
mod swapped;
mod wgmma;

use crate::combine::CombineKernel;
use crate::device::DeviceNumbers;
use crate::kernel::{GATE_ROUTE_THREADS, Kernel, SPLIT_THREADS, SplitTile, TOKENS};
use crate::launch::Grid;
use crate::route_permute;
use fused_moe_core::DType;
use fused_moe_core::config::Selection;
use fused_moe_core::problem::{
    ChoiceProblem, CombineProblem, DropOverflowProblem, GateProblem, LinearProblem, PermuteProblem,
};

/// A kernel, its grid, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) kernel: Kernel,
    pub(crate) grid: Grid,
    pub(crate) why: &'static str,
}

/// Tokens up to which a warp a column reads the weights fast enough, in every format.
pub(crate) const FEW_TOKENS: usize = 32;

/// The most that one load brings is 16 bytes of the narrower format.
pub(crate) const fn dot_vector(x: DType, weight: DType) -> u8 {
    if x.size() == 2 && weight.size() == 2 { 8 } else { 4 }
}

/// Rows and columns of a tile in multiply-adds.
const TILE: usize = 64;
/// Such tiles up to which most of the device would idle: a warp a column is faster.
const FEW_TILES: usize = 8;
/// Tiles on tensor cores: small ones while they are few, so that every multiprocessor has some; then larger ones, which
/// read less.
pub(crate) const SPLIT_TILES: [SplitTile; 2] =
    [SplitTile { rows: 16, columns: 32 }, SplitTile { rows: 32, columns: 64 }];

const FEW: &str = "few tokens: a warp a column streams the weights";
const MANY: &str = "many tokens: 64 x 64 tiles in multiply-adds, groups of warps have slices of the rows";
const SMALL: &str =
    "some tokens: tensor cores, tiles of 16 x 32 for every multiprocessor, warps have slices of the rows";
const LARGE: &str = "many tokens: tensor cores, tiles of 32 x 64, warps have slices of the rows";

/// How `rows` times `columns` sums of `inner` products each are formed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Product {
    /// By a warp a column.
    Dot,
    /// In 64 x 64 tiles of multiply-adds.
    Tiled,
    /// On tensor cores.
    Split(SplitTile, &'static str),
}

impl Product {
    /// `tensor`: whether the formats are such as tensor cores take.
    fn of([rows, inner, columns]: [usize; 3], tensor: bool, device: &DeviceNumbers) -> Self {
        let tensor = tensor && inner.is_multiple_of(8);
        let [small, large] = SPLIT_TILES;
        // a tile would be all but empty, or nearly all of the device idle
        let few = columns < 8 || (!tensor && tiles(rows, columns, [TILE; 2]) <= FEW_TILES);
        let share = || tiles(rows, columns, [small.rows.into(), small.columns.into()]) / 2;
        match rows {
            ..=FEW_TOKENS => Self::Dot,
            _ if few => Self::Dot,
            _ if !tensor => Self::Tiled,
            _ if share() <= device.multiprocessors as usize => Self::Split(small, SMALL),
            _ => Self::Split(large, LARGE),
        }
    }
}

fn tiles(rows: usize, columns: usize, tile: [usize; 2]) -> usize {
    rows.div_ceil(tile[0]).saturating_mul(columns.div_ceil(tile[1]))
}

/// `aligned` says whether groups of so many elements of x, router and norm weight may be read at once; `weighted`, whether
/// there is a norm weight: what it makes of f16 has no place in f16.
pub(crate) fn gate(
    problem: &GateProblem,
    weighted: bool,
    aligned: impl Fn(u64) -> bool,
    device: &DeviceNumbers,
) -> Plan {
    let GateProblem { tokens, hidden, experts, x, router } = *problem;
    let tensor = x == router && x.size() == 2 && !(weighted && x == DType::F16) && aligned(8);
    match Product::of([tokens, hidden, experts], tensor, device) {
        Product::Dot => {
            let each = dot_tokens(experts, tokens, device);
            let kernel = Kernel::Gate { x, router, vector: vector(dot_vector(x, router), aligned), tokens: each };
            Plan { kernel, grid: warp_a_column(experts, tokens.div_ceil(each.into()), device), why: FEW }
        }
        Product::Tiled => {
            let kernel = Kernel::GateTiled { x, router, vector: vector(4, aligned) };
            let grid = Grid::plane(tokens.div_ceil(TILE), experts.div_ceil(TILE), SPLIT_THREADS[1]);
            Plan { kernel, grid, why: MANY }
        }
        Product::Split(tile, why) => {
            let blocks = [tokens.div_ceil(tile.rows.into()), experts.div_ceil(tile.columns.into())];
            let grid = Grid::plane(blocks[0], blocks[1], SPLIT_THREADS[0]);
            Plan { kernel: Kernel::GateMma { format: x, weighted, tile }, grid, why }
        }
    }
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

/// Logits of a lane of the warp that keeps a token's in registers; 0 stands for one that does not.
pub(crate) const LANE_LOGITS: [u8; 3] = [4, 8, 16];

/// How many logits a lane has where a warp keeps a token's in registers, for the rules that go so.
pub(crate) fn lane_logits(problem: &ChoiceProblem) -> Option<u8> {
    let plain = matches!(problem.rule.selection, Selection::TopK { groups: None, .. }) && problem.rule.always == 0;
    let fits = |&logits: &u8| problem.experts <= 32 * usize::from(logits);
    LANE_LOGITS.into_iter().find(fits).filter(|_| plain && problem.top_k <= 32)
}

/// `witness`: whether the keys about the last choice are asked for.
pub(crate) fn route(problem: &ChoiceProblem, witness: bool) -> Plan {
    let &ChoiceProblem { tokens, logits, .. } = problem;
    if let Some(lane_logits) = lane_logits(problem).filter(|_| !witness) {
        let kernel = Kernel::Route { logits, threads: 32, lane_logits };
        return Plan { kernel, grid: Grid::line(tokens.div_ceil(4), 128), why: "a warp has a token in registers" };
    }
    let shared = route_shared(problem);
    if warp_routes(problem) {
        let grid = Grid::line(tokens.div_ceil(4), 128).with_shared(4 * shared);
        let kernel = Kernel::Route { logits, threads: 32, lane_logits: 0 };
        return Plan { kernel, grid, why: "a warp holds the keys of a token" };
    }
    let grid = Grid::line(tokens, 256).with_shared(shared);
    let kernel = Kernel::Route { logits, threads: 256, lane_logits: 0 };
    Plan { kernel, grid, why: "many experts: a block a token" }
}

/// Tokens that a block routes as fast as one: a warp a scheduler.
const ROUTE_TOKENS: usize = 4;

/// Whether one launch makes the routes and groups their slots, and how. Every slot must have an expert that is here.
pub(crate) fn route_permute(problem: &ChoiceProblem, device: &DeviceNumbers) -> Option<Plan> {
    let &ChoiceProblem { tokens, logits, .. } = problem;
    let lane_logits = lane_logits(problem)?;
    let warps = route_permute::warps(lane_logits);
    let most_blocks = if device.has_clusters() { route_permute::BLOCKS } else { 1 };
    if tokens == 0 || tokens > most_blocks * warps * route_permute::ROUNDS {
        return None;
    }
    let blocks = tokens.div_ceil(ROUTE_TOKENS).next_power_of_two().min(most_blocks);
    let threads = 32 * tokens.div_ceil(blocks).min(warps) as u32;
    let kernel = Kernel::RoutePermute { logits, lane_logits };
    Some(Plan { kernel, grid: Grid::line(blocks, threads), why: "some tokens: one cluster routes and groups them" })
}

/// Bytes of one token's keys and groups.
fn route_shared(problem: &ChoiceProblem) -> usize {
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

pub(crate) fn drop_overflow(problem: &DropOverflowProblem) -> Plan {
    let why = "a warp a token counts the slots that come before its own";
    Plan { kernel: Kernel::DropOverflow, grid: Grid::line(problem.tokens.div_ceil(4), 128), why }
}

/// The most elements of a row that a thread of combine reads at once: 16 bytes.
pub(crate) const fn combine_vector(y: DType) -> u8 {
    if y.size() == 2 { 8 } else { 4 }
}

/// Threads of a block of combine without norm, at most.
const COMBINE_THREADS: usize = 128;

pub(crate) fn combine(
    problem: &CombineProblem,
    [copies, norm]: [bool; 2],
    aligned: impl Fn(u64) -> bool,
    device: &DeviceNumbers,
) -> Plan {
    let &CombineProblem { tokens, top_k, hidden, y, .. } = problem;
    let fits = |&vector: &u8| hidden.is_multiple_of(vector.into()) && aligned(vector.into());
    let widest = if norm { 4 } else { combine_vector(y) };
    let vector = [widest, 4].into_iter().find(fits).unwrap_or(1);
    let reads = hidden.div_ceil(vector.into());
    let pieces = reads.div_ceil(COMBINE_THREADS);
    // as many on their way as one block a place can have; many blocks hide more with fewer registers
    let blocks = tokens.saturating_mul(if norm { 1 } else { pieces });
    let most = if blocks <= 4 * device.multiprocessors as usize { 8 } else { 4 };
    let slots = top_k.next_power_of_two().clamp(2, most) as u8;
    let bytes = tokens.saturating_mul(top_k).saturating_mul(hidden).saturating_mul(y.size());
    let streams = bytes > device.l2_bytes;
    let stash = norm && 4 * hidden <= 40 * 1024;
    let kernel = Kernel::Combine(CombineKernel { y, vector, slots, streams, copies, norm, stash });
    if norm {
        let grid = Grid::plane(tokens, 1, 256).with_shared(if stash { 4 * hidden } else { 0 });
        return Plan { kernel, grid, why: "a block a token: its norm needs all of it" };
    }
    let threads = reads.div_ceil(pieces.max(1)).next_multiple_of(32).max(32);
    Plan { kernel, grid: Grid::plane(tokens, pieces, threads as u32), why: "tokens and pieces of them in parallel" }
}

pub(crate) fn linear(problem: &LinearProblem, aligned: impl Fn(u64) -> bool, device: &DeviceNumbers) -> Plan {
    let &LinearProblem { rows, inner, outer, x, weight, .. } = problem;
    let tensor = x == weight && x.size() == 2 && aligned(8);
    match Product::of([rows, inner, outer], tensor, device) {
        Product::Dot => {
            let kernel = Kernel::Linear { x, weight, vector: vector(dot_vector(x, weight), aligned) };
            Plan { kernel, grid: warp_a_column(outer, rows.div_ceil(TOKENS as usize), device), why: FEW }
        }
        Product::Tiled => {
            let kernel = Kernel::LinearTiled { x, weight, vector: vector(4, aligned) };
            Plan { kernel, grid: Grid::line(tiles(rows, outer, [TILE; 2]), SPLIT_THREADS[1]), why: MANY }
        }
        Product::Split(tile, why) => {
            let blocks = tiles(rows, outer, [tile.rows.into(), tile.columns.into()]);
            Plan { kernel: Kernel::LinearMma { format: x, tile }, grid: Grid::line(blocks, SPLIT_THREADS[0]), why }
        }
    }
}

/// Tokens that a warp of the router has at once: one, until every scheduler has two warps, then as many as that takes.
fn dot_tokens(columns: usize, tokens: usize, device: &DeviceNumbers) -> u8 {
    let warps = 8 * (device.multiprocessors as usize).max(1);
    let share = columns.saturating_mul(tokens).div_ceil(warps);
    share.next_power_of_two().clamp(1, TOKENS as usize) as u8
}

/// Blocks of up to 8 warps, of fewer where that gives every multiprocessor some.
fn warp_a_column(columns: usize, groups: usize, device: &DeviceNumbers) -> Grid {
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
        let plan = |tokens, aligned| gate(&gate_problem(tokens), false, |_| aligned, &device());
        assert_eq!(plan(1, true).grid, Grid::plane(128, 1, 32));
        assert_eq!(plan(8, true).grid, Grid::plane(16, 8, 256));
        assert_eq!(plan(32, true).grid, Grid::plane(16, 8, 256));
        assert!(matches!(plan(1, true).kernel, Kernel::Gate { vector: 8, tokens: 1, .. }));
        assert!(matches!(plan(16, true).kernel, Kernel::Gate { vector: 8, tokens: 2, .. }));
        assert!(matches!(plan(9, false).kernel, Kernel::Gate { vector: 1, .. }));
        assert_eq!(plan(64, true).grid, Grid::plane(4, 4, 256));
        assert_eq!(plan(2048, true).grid, Grid::plane(64, 2, 256));
        assert!(matches!(plan(64, false).kernel, Kernel::Gate { .. }));
        assert_eq!(plan(2048, false).grid, Grid::plane(32, 2, 1024));
        assert_eq!(plan(0, true).grid.blocks[1], 0);
    }

    #[test]
    fn tensor_cores_take_what_fits_their_format() {
        let plan = |problem: GateProblem, weighted| gate(&problem, weighted, |_| true, &device()).kernel;
        let bf16 = gate_problem(2048);
        let f16 = GateProblem { x: DType::F16, router: DType::F16, ..bf16 };
        assert!(matches!(plan(bf16, true), Kernel::GateMma { weighted: true, .. }));
        assert!(matches!(plan(f16, false), Kernel::GateMma { weighted: false, .. }));
        let odd = GateProblem { hidden: 2047, ..bf16 };
        let mixed = GateProblem { router: DType::F32, ..bf16 };
        for kernel in [plan(f16, true), plan(odd, false), plan(mixed, false)] {
            assert!(matches!(kernel, Kernel::GateTiled { .. }), "{kernel:?}");
        }
    }

    #[test]
    fn a_column_alone_streams() {
        let (x, weight, out) = (DType::BF16, DType::BF16, DType::F32);
        let problem = |outer| LinearProblem { rows: 8192, inner: 2048, outer, x, weight, out };
        assert!(matches!(linear(&problem(1), |_| true, &device()).kernel, Kernel::Linear { .. }));
        assert!(matches!(linear(&problem(64), |_| true, &device()).kernel, Kernel::LinearMma { .. }));
        assert!(matches!(linear(&problem(64), |_| false, &device()).kernel, Kernel::LinearTiled { .. }));
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
        assert_eq!(route(&problem(128), false).grid, Grid::line(2, 128));
        assert_eq!(route(&problem(128), true).grid, Grid::line(2, 128).with_shared(4 * 1024));
        assert_eq!(route(&problem(4096), false).grid, Grid::line(5, 256).with_shared(32 * 1024));
        let both = |tokens, hidden| {
            gate_route(&(GateProblem { hidden, ..gate_problem(tokens) }, problem(128)), |_| true).is_some()
        };
        assert!(both(1, 512) && !both(1, 2048) && !both(1000, 512));
    }

    #[test]
    fn registers_hold_the_logits_of_plain_rules() {
        let problem = |experts, top_k, rule| ChoiceProblem {
            tokens: 32,
            experts,
            top_k,
            logits: DType::F32,
            vocabulary: 0,
            rule,
        };
        let plain = RoutingRule::default();
        let logits = |experts, top_k| lane_logits(&problem(experts, top_k, plain));
        assert_eq!([1, 128, 129, 512].map(|experts| logits(experts, 1)), [Some(4), Some(4), Some(8), Some(16)]);
        assert_eq!([logits(513, 1), logits(128, 32), logits(128, 33)], [None, Some(4), None]);
        let always = RoutingRule { always: 1, ..plain };
        let mixer = RoutingRule { selection: Selection::SparseMixer { jitter: 0.01 }, ..plain };
        for rule in [always, mixer] {
            assert_eq!(lane_logits(&problem(8, 2, rule)), None);
        }
    }

    #[test]
    fn one_cluster_groups_as_many_tokens_as_its_words_have_bits() {
        let plan = |tokens, experts, device: &DeviceNumbers| {
            let (rule, logits) = (RoutingRule::default(), DType::BF16);
            let problem = ChoiceProblem { tokens, experts, top_k: 8, logits, vocabulary: 0, rule };
            route_permute(&problem, device).map(|plan| (plan.grid.blocks[0], plan.grid.threads))
        };
        let grids = [(1, (1, 32)), (4, (1, 128)), (8, (2, 128)), (33, (8, 160)), (128, (8, 512)), (512, (8, 1024))];
        for (tokens, grid) in grids {
            assert_eq!(plan(tokens, 128, &device()), Some(grid));
        }
        assert_eq!([0, 513].map(|tokens| plan(tokens, 128, &device())), [None; 2]);
        assert_eq!([256, 257].map(|tokens| plan(tokens, 300, &device())), [Some((8, 512)), None]);
        let old = DeviceNumbers { compute_capability: (8, 0), ..device() };
        assert_eq!([64, 65].map(|tokens| plan(tokens, 128, &old)), [Some((1, 1024)), None]);
    }

    fn combined(tokens: usize, top_k: usize, hidden: usize, norm: bool) -> (CombineKernel, Grid) {
        let problem = CombineProblem { tokens, top_k, hidden, y: DType::BF16, out: DType::BF16 };
        let plan = combine(&problem, [false, norm], |_| true, &device());
        let Kernel::Combine(kernel) = plan.kernel else { unreachable!() };
        (kernel, plan.grid)
    }

    #[test]
    fn combine_keeps_a_row_where_it_fits() {
        assert!(matches!(combined(3, 2, 2048, true).0, CombineKernel { stash: true, vector: 4, .. }));
        assert!(matches!(combined(3, 2, 20000, true).0, CombineKernel { stash: false, .. }));
    }

    #[test]
    fn combine_reads_16_bytes_of_rows_that_are_whole_in_them() {
        assert_eq!([2048, 2052, 2047].map(|hidden| combined(3, 2, hidden, false).0.vector), [8, 4, 1]);
        assert_eq!(combined(3, 2, 2048, false).1, Grid::plane(3, 2, 128));
        assert_eq!(combined(3, 2, 2816, false).1, Grid::plane(3, 3, 128));
        assert_eq!(combined(3, 2, 8, false).1, Grid::plane(3, 1, 32));
    }

    #[test]
    fn combine_asks_for_all_rows_at_once_where_there_is_room() {
        let slots = |tokens, top_k| {
            let kernel = combined(tokens, top_k, 2048, false).0;
            (kernel.slots, kernel.streams)
        };
        assert_eq!([1, 2, 3, 8, 33].map(|top_k| slots(128, top_k)), [2, 2, 4, 8, 8].map(|slots| (slots, false)));
        assert_eq!([(512, 8), (8192, 8), (8192, 2)].map(|(t, k)| slots(t, k)), [(4, false), (4, true), (2, true)]);
    }
}
