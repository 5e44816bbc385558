//! How a gradient is carried out.

use super::grouped::row_tiles;
use super::{Plan, vector, wgmma};
use crate::device::DeviceNumbers;
use crate::grouped::MmaTile;
use crate::grouped_backward::{GroupedBackwardKernel, Stage};
use crate::grouped_backward_wgmma::MatricesTile;
use crate::kernel::Kernel;
use crate::kernel::backward::{BackwardKernel, ONE_BLOCK};
use crate::launch::Grid;
use crate::wgmma::Ends;
use fused_moe_core::DType;
use fused_moe_core::problem::{
    CombineBackwardProblem, GroupedBackwardProblem, LossProblem, NormBackwardProblem, RouteBackwardProblem,
};

/// A kernel of a grouped product's gradients, its grid, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GroupedBackwardPlan {
    pub(crate) kernel: GroupedBackwardKernel,
    pub(crate) grid: Grid,
    pub(crate) why: &'static str,
}

/// Elements that element-wise kernels take at once.
pub(crate) const VECTOR: u8 = 8;
/// Rows and columns of a tile of the general kernels, and blocks of them that a multiprocessor holds.
const TILE: usize = 64;
const TILED_BLOCKS: usize = 4;
/// Tiles on tensor cores by the rows that an expert has on average. Those of the matrices do not depend on them.
const ROWS: [(usize, MmaTile); 4] = [
    (12, MmaTile { rows: 16, columns: 64, warps: [1, 4], stages: 5, blocks: 4 }),
    (40, MmaTile { rows: 32, columns: 128, warps: [1, 4], stages: 3, blocks: 3 }),
    (160, MmaTile { rows: 64, columns: 128, warps: [2, 2], stages: 3, blocks: 3 }),
    (usize::MAX, MmaTile { rows: 128, columns: 128, warps: [2, 4], stages: 3, blocks: 2 }),
];
const MATRICES: MmaTile = MmaTile { rows: 128, columns: 128, warps: [2, 4], stages: 3, blocks: 2 };

/// On warpgroup tensor cores: columns of a tile, and the most stages of its ring.
const WGMMA_WIDTHS: [(u16, u8); 2] = [(256, 4), (384, 3)];

const GENERAL: &str = "f32, mixed formats, weighted sums or odd sizes: multiply-adds in f32";

/// Whether tensor cores take operands of these formats.
fn fast([a, b]: [DType; 2], aligned: &impl Fn(u64) -> bool) -> bool {
    a == b && a.size() == 2 && aligned(8)
}

/// What the router's kernels on tensor cores have in shared memory; that of its matrix where a tile has so many columns.
const GATE_ROWS_SHARED: usize = 4 * (64 * 40 * 4 + 32 * 128 * 2);
const fn gate_matrices_shared(columns: usize) -> usize {
    8 * 3 * (16 * 68 * 4 + 16 * (columns + 8) * 2)
}
const WIDE: &str = "router: tensor cores, each f32 of the logits' gradient in three terms";

/// What the gradient of the rows follows from besides its sizes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    /// Of d and the matrices.
    pub(crate) formats: [DType; 2],
    /// Whether d is as it lies.
    pub(crate) plain: bool,
    /// Whether it is gathered.
    pub(crate) gather: bool,
    /// How outputs may be stored, where the tensor copy engine reaches the operands.
    pub(crate) engine: Option<Ends>,
}

/// The gradient of the rows; `aligned` says whether groups of so many elements of d and the matrices may be read at once.
pub(crate) fn rows(
    stage: Stage,
    problem: &GroupedBackwardProblem,
    Rows { formats, plain, gather, engine }: Rows,
    aligned: impl Fn(u64) -> bool,
    device: &DeviceNumbers,
) -> GroupedBackwardPlan {
    let &GroupedBackwardProblem { rows, experts, inputs, .. } = problem;
    let ([d, matrix], schedule) = (formats, 4 * (experts + 1));
    if stage == Stage::Gate && plain && formats == [DType::F32, DType::BF16] && aligned(8) {
        let grid = Grid::plane(rows.div_ceil(64), inputs.div_ceil(128), 256).with_shared(GATE_ROWS_SHARED);
        return GroupedBackwardPlan { kernel: GroupedBackwardKernel::GateRowsMma, grid, why: WIDE };
    }
    let cores = stage != Stage::Gate && fast(formats, &aligned);
    let engine = engine.filter(|_| cores).zip(wgmma::backward_rows(problem, gather, device));
    if let Some((ends, (tile, grid))) = engine {
        let kernel = GroupedBackwardKernel::RowsWgmma { stage, gather, format: d, tile, ends };
        let why = "gradient of many rows: warpgroup tensor cores, matrices read as they lie";
        return GroupedBackwardPlan { kernel, grid, why };
    }
    if cores {
        let mean = rows / experts.min(rows).max(1);
        let tile = ROWS.iter().find(|(most, _)| mean <= *most).unwrap_or(&ROWS[3]).1.fit(schedule, device);
        let tiles = row_tiles(rows, experts, tile.rows.into()).saturating_mul(inputs.div_ceil(tile.columns.into()));
        let kernel = GroupedBackwardKernel::RowsMma { stage, format: d, tile };
        let why = "gradient of rows: tensor cores, matrices read as they lie, tiles by the rows of an expert";
        return GroupedBackwardPlan { kernel, grid: persistent(tiles, tile, schedule, device), why };
    }
    let tiles = row_tiles(rows, experts, TILE).saturating_mul(inputs.div_ceil(TILE));
    let grid = Grid::line(tiles.min(device.multiprocessors as usize * TILED_BLOCKS), 256).with_shared(schedule);
    let kernel = GroupedBackwardKernel::Rows { stage, d, matrix, vector: vector(4, aligned) };
    GroupedBackwardPlan { kernel, grid, why: GENERAL }
}

/// The gradient of the matrices; `plain`: no row has a factor; `gathers`: whether one operand's rows are found through slots,
/// none where warpgroup tensor cores do not take the operands.
pub(crate) fn matrices(
    stage: Stage,
    problem: &GroupedBackwardProblem,
    (formats, plain): ([DType; 2], bool),
    aligned: impl Fn(u64) -> bool,
    gathers: Option<bool>,
    device: &DeviceNumbers,
) -> GroupedBackwardPlan {
    let &GroupedBackwardProblem { experts, outputs, inputs, .. } = problem;
    let [d, x] = formats;
    let paired = device.has_clusters();
    let (columns, cluster) = if paired { (64, 2) } else { (32, 1) };
    let shared = gate_matrices_shared(columns);
    let room = device.shared_per_block >= shared;
    if stage == Stage::Gate && plain && room && formats == [DType::F32, DType::BF16] && aligned(8) {
        let mut grid = Grid::plane(outputs.div_ceil(64), inputs.div_ceil(columns), 256).with_shared(shared);
        grid.blocks[2] = cluster;
        return GroupedBackwardPlan { kernel: GroupedBackwardKernel::GateMatricesMma { paired }, grid, why: WIDE };
    }
    let tiles = |[m, n]: [usize; 2]| experts.saturating_mul(super::tiles(outputs, inputs, [m, n]));
    if stage != Stage::Gate && plain && fast(formats, &aligned) {
        let warpgroups = gathers.and_then(|gathered| matrices_wgmma((stage, d, gathered), problem, device));
        if let Some(plan) = warpgroups {
            return plan;
        }
        let tile = MATRICES.fit(0, device);
        let kernel = GroupedBackwardKernel::MatricesMma { stage, format: d, tile };
        let grid = persistent(tiles([tile.rows.into(), tile.columns.into()]), tile, 0, device);
        let why = "gradient of matrices: tensor cores, sums over an expert's rows, read as they lie";
        return GroupedBackwardPlan { kernel, grid, why };
    }
    let grid = Grid::line(tiles([TILE; 2]).min(device.multiprocessors as usize * TILED_BLOCKS), 256);
    let kernel = GroupedBackwardKernel::Matrices { stage, d, x, vector: vector(4, aligned) };
    GroupedBackwardPlan { kernel, grid, why: GENERAL }
}

/// The same on warpgroup tensor cores; none where the device has none.
fn matrices_wgmma(
    (stage, format, gathered): (Stage, DType, bool),
    problem: &GroupedBackwardProblem,
    device: &DeviceNumbers,
) -> Option<GroupedBackwardPlan> {
    let &GroupedBackwardProblem { rows, experts, outputs, inputs, .. } = problem;
    if device.compute_capability != (9, 0) {
        return None;
    }
    let [a, b] = if stage == Stage::GateUp { [inputs, outputs] } else { [outputs, inputs] };
    let across = |columns: u16| b.div_ceil(columns.into());
    let [narrow, wide] = WGMMA_WIDTHS;
    // the narrower tile where as many of them do
    let (columns, stages) = if across(narrow.0) == across(wide.0) { narrow } else { wide };
    // an odd tile out would leave a block of its pair idle
    let many = rows / experts.min(rows).max(1) >= wgmma::VERY_MANY_ROWS;
    let paired = many && a.div_ceil(MatricesTile::ROWS.into()).is_multiple_of(2);
    let tile = MatricesTile { columns, gathered, stages, paired };
    let shared = usize::from(stages) * tile.stage_bytes() + tile.other_bytes(experts);
    if shared > device.shared_per_block {
        return None;
    }
    let cluster = tile.cluster();
    let each = a.div_ceil(usize::from(MatricesTile::ROWS) * cluster) * across(columns);
    let blocks = experts.saturating_mul(each).min((device.multiprocessors as usize / cluster).max(1)) * cluster;
    let kernel = GroupedBackwardKernel::MatricesWgmma { stage, format, tile };
    let grid = Grid::line(blocks, MatricesTile::THREADS).with_shared(shared);
    let why = "gradient of matrices: warpgroup tensor cores, sums over an expert's rows, read as they lie";
    Some(GroupedBackwardPlan { kernel, grid, why })
}

/// As many blocks as the device holds, which take turns.
fn persistent(tiles: usize, tile: MmaTile, schedule: usize, device: &DeviceNumbers) -> Grid {
    let resident = device.multiprocessors as usize * usize::from(tile.blocks);
    let shared = usize::from(tile.stages) * tile.stage_bytes() + schedule;
    Grid::line(tiles.min(resident), tile.threads()).with_shared(shared)
}

/// Neighbouring elements that a kernel stores at once.
pub(crate) fn neighbours(kernel: GroupedBackwardKernel) -> u64 {
    use GroupedBackwardKernel::*;
    match kernel {
        MatricesWgmma { .. } => 8,
        Rows { .. } | Matrices { .. } => 4,
        RowsMma { .. } | RowsWgmma { .. } | MatricesMma { .. } | GateRowsMma | GateMatricesMma { .. } => 2,
        Bias => 1,
    }
}

/// Every kernel of a grouped product's gradients: formats and tiles, combined as far as they meet in one text.
pub(crate) fn all() -> Vec<GroupedBackwardKernel> {
    use GroupedBackwardKernel::{Bias, Matrices, MatricesMma, MatricesWgmma, Rows, RowsMma, RowsWgmma};
    let floats = [DType::F32, DType::F16, DType::BF16];
    let mut all = vec![Bias, GroupedBackwardKernel::GateRowsMma];
    all.extend([false, true].map(|paired| GroupedBackwardKernel::GateMatricesMma { paired }));
    for (d, other) in floats.into_iter().flat_map(|d| floats.map(|other| (d, other))) {
        for vector in [1, 4] {
            let stage = Stage::Down;
            all.extend([Rows { stage, d, matrix: other, vector }, Matrices { stage, d, x: other, vector }]);
        }
    }
    for stage in [Stage::GateUp, Stage::Gate] {
        let (d, other, vector) = (DType::F32, DType::BF16, 4);
        all.extend([Rows { stage, d, matrix: other, vector }, Matrices { stage, d, x: other, vector }]);
    }
    for format in [DType::F16, DType::BF16] {
        let stage = Stage::Down;
        all.extend(ROWS.map(|(_, tile)| RowsMma { stage, format, tile }));
        all.push(MatricesMma { stage, format, tile: MATRICES });
    }
    for (format, stage) in [DType::F16, DType::BF16].into_iter().zip([Stage::Down, Stage::GateUp]) {
        let (gather, pieces, bias) = (stage == Stage::Down, stage == Stage::GateUp, None);
        let ends = Ends { pieces, bias };
        let kernel = |tile, gather, ends| RowsWgmma { stage, gather, format, tile, ends };
        all.extend(
            wgmma::backward_tiles()
                .flat_map(|tile| [kernel(tile, gather, ends), kernel(tile, !gather, Ends { pieces: !pieces, ..ends })]),
        );
    }
    let (stage, format, tile) = (Stage::GateUp, DType::BF16, MATRICES);
    all.extend([RowsMma { stage, format, tile }, MatricesMma { stage, format, tile }]);
    for stage in [Stage::Down, Stage::GateUp] {
        for (format, gathered) in [(DType::F16, true), (DType::BF16, true), (DType::BF16, false)] {
            for paired in [false, true] {
                let tile = |(columns, stages)| MatricesTile { columns, gathered, stages, paired };
                all.extend(WGMMA_WIDTHS.map(|width| MatricesWgmma { stage, format, tile: tile(width) }));
            }
        }
    }
    all
}

pub(crate) fn combine_weights(slots: usize, aligned: impl Fn(u64) -> bool) -> Plan {
    let kernel = Kernel::Backward(BackwardKernel::CombineWeights { vector: vector(VECTOR, aligned) });
    Plan { kernel, grid: Grid::line(slots.div_ceil(8), 256), why: "a warp a slot" }
}

pub(crate) fn combine_shared(problem: &CombineBackwardProblem, aligned: impl Fn(u64) -> bool) -> Plan {
    let kernel = Kernel::Backward(BackwardKernel::CombineShared { vector: whole(problem.hidden, aligned) });
    Plan { kernel, grid: Grid::line(problem.tokens, 128), why: "a block a token" }
}

pub(crate) fn route(problem: &RouteBackwardProblem, logits: DType) -> Plan {
    let &RouteBackwardProblem { tokens, experts, top_k, .. } = problem;
    let shared = 8 * (experts + top_k);
    let kernel = |threads| Kernel::Backward(BackwardKernel::Route { logits, threads });
    if experts <= 512 {
        let grid = Grid::line(tokens.div_ceil(4), 128).with_shared(4 * shared);
        return Plan { kernel: kernel(32), grid, why: "a warp a token" };
    }
    Plan {
        kernel: kernel(256),
        grid: Grid::line(tokens, 256).with_shared(shared),
        why: "many experts: a block a token",
    }
}

pub(crate) fn route_scale(problem: &RouteBackwardProblem, logits: DType) -> Plan {
    let kernel = Kernel::Backward(BackwardKernel::RouteScale { logits });
    Plan { kernel, grid: Grid::line(problem.experts, 256), why: "a block an expert" }
}

pub(crate) fn norm(problem: &NormBackwardProblem) -> Plan {
    let kernel = Kernel::Backward(BackwardKernel::Norm);
    Plan { kernel, grid: Grid::line(problem.tokens, 256), why: "a block a token" }
}

pub(crate) fn norm_weight(problem: &NormBackwardProblem, aligned: impl Fn(u64) -> bool) -> Plan {
    let kernel = Kernel::Backward(BackwardKernel::NormWeight { vector: whole(problem.hidden, aligned) });
    Plan { kernel, grid: Grid::line(problem.hidden.div_ceil(32), 1024), why: "a block has 32 columns of all tokens" }
}

pub(crate) fn load_balance_loss(problem: &LossProblem, logits: DType) -> Plan {
    let kernel = Kernel::Backward(BackwardKernel::LoadBalanceLoss { logits });
    let grid = Grid::line(1, ONE_BLOCK).with_shared(4 * problem.experts);
    Plan { kernel, grid, why: "one sum: one block" }
}

/// Tokens of a sequence that a block takes at least: it counts the whole sequence's slots.
const LOSS_TOKENS: usize = 64;

pub(crate) fn load_balance_loss_logits(problem: &LossProblem, logits: DType) -> Plan {
    let kernel = Kernel::Backward(BackwardKernel::LoadBalanceLossLogits { logits });
    let each = problem.tokens / problem.sequences.max(1);
    let grid = Grid::plane(each.div_ceil(LOSS_TOKENS).max(1), problem.sequences, 256);
    Plan { kernel, grid: grid.with_shared(4 * problem.experts), why: "sequences and their tokens in parallel" }
}

pub(crate) fn z_loss(logits: DType) -> Plan {
    let kernel = Kernel::Backward(BackwardKernel::ZLoss { logits });
    Plan { kernel, grid: Grid::line(1, ONE_BLOCK), why: "one sum: one block" }
}

pub(crate) fn z_loss_logits(problem: &LossProblem, logits: DType) -> Plan {
    let kernel = Kernel::Backward(BackwardKernel::ZLossLogits { logits });
    Plan { kernel, grid: Grid::line(problem.tokens.div_ceil(8), 256), why: "a warp a token" }
}

/// Elements of rows of such a width that are read at once.
fn whole(width: usize, aligned: impl Fn(u64) -> bool) -> u8 {
    if width.is_multiple_of(VECTOR.into()) { vector(VECTOR, aligned) } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::device;
    use fused_moe_conformance::backward::grouped::Grouped;
    use fused_moe_conformance::backward::{BackwardOperation, backward_cases};
    use fused_moe_conformance::{Scale, cases};

    fn problem(rows: usize) -> GroupedBackwardProblem {
        GroupedBackwardProblem { rows, experts: 128, outputs: 2048, inputs: 768, matrices: DType::BF16 }
    }

    fn operands(formats: [DType; 2]) -> Rows {
        let engine = Some(Ends { pieces: true, bias: None });
        Rows { formats, plain: true, gather: true, engine }
    }

    fn plan_rows(rows_of_all: usize, formats: [DType; 2], aligned: bool) -> GroupedBackwardPlan {
        let device = DeviceNumbers { compute_capability: (8, 0), ..device() };
        rows(Stage::Down, &problem(rows_of_all), operands(formats), |_| aligned, &device)
    }

    #[test]
    fn tiles_of_rows_grow_with_the_rows_of_an_expert() {
        let tile = |rows| match plan_rows(rows, [DType::BF16; 2], true).kernel {
            GroupedBackwardKernel::RowsMma { tile, .. } => tile.rows,
            _ => 0,
        };
        assert_eq!([256, 4096, 16384, 65536].map(tile), [16, 32, 64, 128]);
    }

    #[test]
    fn many_rows_take_warpgroup_tensor_cores_where_the_engine_reaches_them() {
        let formats = [DType::BF16; 2];
        let tile = |rows_of_all, rows_of| {
            let problem = problem(rows_of_all);
            match rows(Stage::Down, &problem, rows_of, |_| true, &device()).kernel {
                GroupedBackwardKernel::RowsWgmma { tile, .. } => (tile.rows, tile.columns),
                _ => (0, 0),
            }
        };
        assert_eq!(tile(65536, operands(formats)), (64, 256));
        assert_eq!(tile(131_072, operands(formats)), (128, 256), "pairs");
        assert_eq!(tile(1536, operands(formats)), (0, 0), "few rows an expert");
        assert_eq!(tile(65536, Rows { engine: None, ..operands(formats) }), (0, 0));
        assert_eq!(tile(65536, operands([DType::F32, DType::BF16])), (0, 0));
    }

    #[test]
    fn what_tensor_cores_do_not_take_goes_the_general_way() {
        let mixed = plan_rows(4096, [DType::F32, DType::BF16], true);
        let odd = plan_rows(4096, [DType::BF16; 2], false);
        for plan in [mixed, odd] {
            assert!(matches!(plan.kernel, GroupedBackwardKernel::Rows { .. }), "{plan:?}");
        }
        let of =
            |plain| matrices(Stage::Down, &problem(4096), ([DType::BF16; 2], plain), |_| true, None, &device()).kernel;
        assert!(matches!(of(true), GroupedBackwardKernel::MatricesMma { .. }));
        assert!(matches!(of(false), GroupedBackwardKernel::Matrices { vector: 4, .. }), "factors inside a sum");
    }

    #[test]
    fn matrices_take_warpgroups_where_there_are_some() {
        let of = |stage, problem: &GroupedBackwardProblem, gathers, device: &DeviceNumbers| {
            let kernel = matrices(stage, problem, ([DType::BF16; 2], true), |_| true, gathers, device).kernel;
            match kernel {
                GroupedBackwardKernel::MatricesWgmma { tile, .. } => Some((tile.columns, tile.gathered)),
                _ => None,
            }
        };
        let paired = |problem: &GroupedBackwardProblem| match matrices(
            Stage::Down,
            problem,
            ([DType::BF16; 2], true),
            |_| true,
            Some(true),
            &device(),
        )
        .kernel
        {
            GroupedBackwardKernel::MatricesWgmma { tile, .. } => Some(tile.paired),
            _ => None,
        };
        // 16 tiles of the outputs, and 17
        let odd = GroupedBackwardProblem { outputs: 2049, ..problem(131_072) };
        let pairs = [problem(65536), problem(131_072), odd].map(|problem| paired(&problem));
        assert_eq!(pairs, [Some(false), Some(true), Some(false)]);
        let (down, device) = (problem(65536), device());
        let gate_up = GroupedBackwardProblem { outputs: 1536, inputs: 2048, ..down };
        assert_eq!(of(Stage::Down, &down, Some(true), &device), Some((384, true)));
        assert_eq!(of(Stage::GateUp, &gate_up, Some(false), &device), Some((384, false)));
        // 512 columns: two tiles of either width
        let narrow = GroupedBackwardProblem { inputs: 512, ..down };
        assert_eq!(of(Stage::Down, &narrow, Some(true), &device), Some((256, true)));
        assert_eq!(of(Stage::Down, &down, None, &device), None);
        for compute_capability in [(8, 0), (8, 9), (10, 0), (12, 0)] {
            let device = DeviceNumbers { compute_capability, ..device.clone() };
            assert_eq!(of(Stage::Down, &down, Some(true), &device), None);
        }
    }

    /// The stage of a case whose tiles are in several bands and several columns, and whether in pairs.
    fn banded(case: &Grouped) -> Option<(Stage, bool)> {
        let stage = if case.stage == cases::Stage::DownBackward { Stage::Down } else { Stage::GateUp };
        let ([tokens, top_k, outputs, inputs, experts], format) = (case.sizes, case.dtypes[0]);
        let problem = GroupedBackwardProblem { rows: tokens * top_k, experts, outputs, inputs, matrices: format };
        let GroupedBackwardKernel::MatricesWgmma { tile, .. } =
            matrices_wgmma((stage, format, true), &problem, &device())?.kernel
        else {
            return None;
        };
        let [a, b] = if stage == Stage::GateUp { [inputs, outputs] } else { [outputs, inputs] };
        // `BAND` of `include/grouped_backward_wgmma.cuh`
        let bands = a.div_ceil(MatricesTile::ROWS.into()).div_ceil(16);
        let whole = format.size() == 2 && outputs.is_multiple_of(8) && inputs.is_multiple_of(8);
        (whole && bands > 1 && b > tile.columns.into()).then_some((stage, tile.paired))
    }

    #[test]
    fn the_conformance_suite_meets_bands_of_several_columns() {
        let all = |scale| {
            let cases = backward_cases(scale).into_iter();
            let grouped = cases.filter_map(|case| match case.operation {
                BackwardOperation::Grouped(case) => banded(&case),
                _ => None,
            });
            grouped.collect::<Vec<_>>()
        };
        let [quick, full] = [Scale::Quick, Scale::Full].map(all);
        for stage in [Stage::Down, Stage::GateUp] {
            assert!(quick.contains(&(stage, false)), "{stage:?}");
            assert!(full.contains(&(stage, true)), "{stage:?}, pairs");
        }
    }

    #[test]
    fn pairs_of_blocks_share_the_routers_tiles_where_there_are_clusters() {
        let problem = GroupedBackwardProblem { rows: 8192, experts: 1, outputs: 128, inputs: 2048, ..problem(0) };
        let blocks = |compute_capability| {
            let device = DeviceNumbers { compute_capability, ..device() };
            let formats = ([DType::F32, DType::BF16], true);
            matrices(Stage::Gate, &problem, formats, |_| true, None, &device).grid.blocks
        };
        assert_eq!([(8, 0), (9, 0)].map(blocks), [[2, 64, 1], [2, 32, 2]]);
    }

    #[test]
    fn blocks_fit_the_device() {
        for experts in [1, 128, 4096] {
            for shared in [99 << 10, 163 << 10, 227 << 10] {
                let device = DeviceNumbers { shared_per_block: shared, ..device() };
                for rows_of_all in [0, 49, 50_000, 1 << 24] {
                    let problem = GroupedBackwardProblem { experts, ..problem(rows_of_all) };
                    let plan = rows(Stage::Down, &problem, operands([DType::BF16; 2]), |_| true, &device);
                    assert!(plan.grid.shared as usize <= shared, "{plan:?}");
                    let plan = matrices(Stage::Down, &problem, ([DType::BF16; 2], true), |_| true, Some(true), &device);
                    assert!(plan.grid.shared as usize <= shared && plan.grid.blocks[0] > 0, "{plan:?}");
                }
            }
        }
    }

    #[test]
    fn a_token_has_room_for_all_experts() {
        let problem = |experts, top_k| {
            let rule = fused_moe_core::config::RoutingRule::default();
            route(&RouteBackwardProblem { tokens: 5, experts, top_k, rule }, DType::F32).grid
        };
        assert_eq!(problem(128, 8), Grid::line(2, 128).with_shared(4 * 8 * 136));
        assert!(problem(4096, 4096).shared <= 98 << 10);
    }
}
