//! The gradients of a grouped product, behind those of down, gate_up and the router: of its rows, its matrices, its biases.

use crate::backward::Target;
use crate::error::Result;
use crate::grouped::{self, GroupedParams, MmaTile, Product, wgmma_parts};
use crate::grouped_backward_wgmma::{self as matrices_wgmma, MatricesTile, MatricesWgmmaParams};
use crate::kernel::Kernel;
use crate::kernel::backward::BackwardKernel;
use crate::launch::{Grid, Params, Tensor, launch, params};
use crate::plan::backward as plan;
use crate::wgmma::{self, Ends, INSTRUCTIONS, WgmmaParams, WgmmaTile};
use crate::{Cuda, CudaStream};
use fused_moe_core::DType;
use fused_moe_core::problem::GroupedBackwardProblem;

params! {
    GroupedBackwardParams {
        grouped: GroupedParams, d: Tensor, x: Tensor, capped: Tensor, outputs: u64, inputs: u64,
        d_gathered: u32, x_gathered: u32, accumulate: u32, scale: f32, softcap: f32,
    }
}

/// Whose gradients they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Stage {
    Down,
    GateUp,
    Gate,
}

/// A kernel of the gradients of a grouped product: of the rows or of the matrices, on tensor cores or in multiply-adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum GroupedBackwardKernel {
    Rows {
        stage: Stage,
        d: DType,
        matrix: DType,
        vector: u8,
    },
    Matrices {
        stage: Stage,
        d: DType,
        x: DType,
        vector: u8,
    },
    RowsMma {
        stage: Stage,
        format: DType,
        tile: MmaTile,
    },
    RowsWgmma {
        stage: Stage,
        /// Whether d is gathered.
        gather: bool,
        format: DType,
        tile: WgmmaTile,
        ends: Ends,
    },
    MatricesMma {
        stage: Stage,
        format: DType,
        tile: MmaTile,
    },
    MatricesWgmma {
        stage: Stage,
        format: DType,
        tile: MatricesTile,
    },
    /// Of the router, f32 times bf16.
    GateRowsMma,
    GateMatricesMma {
        /// Whether pairs of blocks share a tile of twice the columns.
        paired: bool,
    },
    Bias,
}

/// Headers of the kernels here.
const SHARED: &str = include_str!("include/grouped_backward.cuh");
const TILED: [&str; 2] = [include_str!("include/tiles.cuh"), include_str!("include/grouped_backward_tiled.cuh")];
const MMA: [&str; 2] = [include_str!("include/mma.cuh"), include_str!("include/grouped_backward_mma.cuh")];

impl GroupedBackwardKernel {
    /// The name of its entry and of its file, and its text.
    fn file(self) -> (&'static str, &'static str) {
        use Stage::{Down, Gate, GateUp};
        match self {
            Self::Rows { stage: Down, .. } => ("down_backward_rows", include_str!("down_backward_rows.cu")),
            Self::Rows { stage: GateUp, .. } => ("gate_up_backward_rows", include_str!("gate_up_backward_rows.cu")),
            Self::Rows { stage: Gate, .. } => ("gate_backward_rows", include_str!("gate_backward_rows.cu")),
            Self::Matrices { stage: Down, .. } => ("down_backward_matrices", include_str!("down_backward_matrices.cu")),
            Self::Matrices { stage: GateUp, .. } => {
                ("gate_up_backward_matrices", include_str!("gate_up_backward_matrices.cu"))
            }
            Self::Matrices { stage: Gate, .. } => ("gate_backward_matrices", include_str!("gate_backward_matrices.cu")),
            Self::RowsMma { stage: Down, .. } => ("down_backward_rows_mma", include_str!("down_backward_rows_mma.cu")),
            Self::RowsMma { .. } => ("gate_up_backward_rows_mma", include_str!("gate_up_backward_rows_mma.cu")),
            Self::RowsWgmma { stage: Down, .. } => {
                ("down_backward_rows_wgmma", include_str!("down_backward_rows_wgmma.cu"))
            }
            Self::RowsWgmma { .. } => ("gate_up_backward_rows_wgmma", include_str!("gate_up_backward_rows_wgmma.cu")),
            Self::MatricesMma { stage: Down, .. } => {
                ("down_backward_matrices_mma", include_str!("down_backward_matrices_mma.cu"))
            }
            Self::MatricesMma { .. } => {
                ("gate_up_backward_matrices_mma", include_str!("gate_up_backward_matrices_mma.cu"))
            }
            Self::MatricesWgmma { stage: Down, .. } => {
                ("down_backward_matrices_wgmma", include_str!("down_backward_matrices_wgmma.cu"))
            }
            Self::MatricesWgmma { .. } => {
                ("gate_up_backward_matrices_wgmma", include_str!("gate_up_backward_matrices_wgmma.cu"))
            }
            Self::GateRowsMma => ("gate_backward_rows_mma", include_str!("gate_backward_rows_mma.cu")),
            Self::GateMatricesMma { .. } => {
                ("gate_backward_matrices_mma", include_str!("gate_backward_matrices_mma.cu"))
            }
            Self::Bias => ("bias_backward", include_str!("bias_backward.cu")),
        }
    }

    pub(crate) fn entry(self) -> &'static str {
        self.file().0
    }

    /// The definition of its parameter.
    pub(crate) fn params(self) -> &'static str {
        match self {
            Self::RowsWgmma { .. } => WgmmaParams::DEFINITION,
            Self::MatricesWgmma { .. } => MatricesWgmmaParams::DEFINITION,
            _ => GroupedBackwardParams::DEFINITION,
        }
    }

    /// The parts of its text that follow the common parameters and those of the grouped product.
    pub(crate) fn parts(self) -> Vec<&'static str> {
        if let Self::RowsWgmma { tile, .. } = self {
            return [&wgmma_parts(tile)[..], &[self.file().1]].concat();
        }
        let mut parts = vec![GroupedBackwardParams::DEFINITION, SHARED];
        match self {
            Self::Rows { .. } | Self::Matrices { .. } => parts.extend(TILED),
            Self::RowsMma { .. } | Self::MatricesMma { .. } => parts.extend(MMA),
            Self::MatricesWgmma { .. } => {
                parts.extend(INSTRUCTIONS);
                parts.extend([MatricesWgmmaParams::DEFINITION, include_str!("include/grouped_backward_wgmma.cuh")]);
            }
            Self::GateRowsMma | Self::GateMatricesMma { .. } => {
                parts.extend([MMA[0], include_str!("include/wide_mma.cuh")])
            }
            Self::RowsWgmma { .. } | Self::Bias => {}
        }
        parts.push(self.file().1);
        parts
    }

    /// What its text is specialised by.
    pub(crate) fn defines(self) -> Vec<(&'static str, String)> {
        let (stage, gather) = (grouped::Stage::Down, matches!(self, Self::RowsWgmma { gather: true, .. }));
        let mut defines = Product { stage, gather, gated: false, activation: None }.defines();
        match self {
            Self::Rows { d, matrix: other, vector, .. } | Self::Matrices { d, x: other, vector, .. } => {
                defines.extend([("D_T", d.to_string()), ("OTHER_T", other.to_string()), ("VEC", vector.to_string())])
            }
            Self::RowsMma { format, tile, .. } | Self::MatricesMma { format, tile, .. } => {
                let matrices = matches!(self, Self::MatricesMma { .. });
                defines.extend([("MATRICES", matrices.to_string()), ("W_T", format.to_string())]);
                defines.extend(tile.defines());
            }
            Self::RowsWgmma { format, tile, ends, .. } => {
                defines.extend([("W_T", format.to_string()), ("TRANSPOSED", "true".into())]);
                defines.extend(tile.defines());
                defines.extend(ends.defines());
            }
            Self::MatricesWgmma { stage, format, tile } => {
                defines.push(("A_IS_X", (stage == Stage::GateUp).to_string()));
                defines.push(("W_T", format.to_string()));
                defines.extend(tile.defines());
            }
            Self::GateMatricesMma { paired } => defines.push(("CLUSTER", if paired { "2" } else { "1" }.into())),
            Self::GateRowsMma | Self::Bias => {}
        }
        defines
    }
}

/// Rows that a product reads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source {
    pub(crate) rows: Tensor,
    pub(crate) format: DType,
    /// K, where row r is `row_slot[r] / K` of them.
    pub(crate) top_k: Option<usize>,
}

/// Operands of [`grouped_backward`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct GroupedBackward {
    pub(crate) stage: Stage,
    pub(crate) problem: GroupedBackwardProblem,
    /// Offsets `[E+1]` and `row_slot [R]`; without addresses all rows are the one expert's.
    pub(crate) groups: [Tensor; 2],
    pub(crate) d: Source,
    pub(crate) x: Option<Source>,
    /// f32, one a slot (a row where nothing is gathered), in rows of so many; whichever operand they belong to, the
    /// gradient of the matrices has them as factors, and that of rows and biases where they are d's.
    pub(crate) weights: (Tensor, usize),
    pub(crate) weights_are_ds: bool,
    pub(crate) scale: f32,
    /// What the soft-cap of the product gave, and its limit.
    pub(crate) softcap: Option<(Tensor, f32)>,
    /// The stack, and the distance of its experts.
    pub(crate) matrices: (Tensor, usize),
    pub(crate) d_rows: Option<Target>,
    pub(crate) d_matrices: Option<Target>,
    pub(crate) d_bias: Option<Target>,
}

/// Enqueues what is asked for.
pub(crate) fn grouped_backward(cuda: &Cuda, stream: &CudaStream, operands: &GroupedBackward) -> Result<()> {
    if let Some(to) = operands.d_rows {
        operands.rows(cuda, stream, to)?;
    }
    if let (Some(x), Some(to)) = (operands.x, operands.d_matrices) {
        operands.matrices(cuda, stream, x, to)?;
    }
    match operands.d_bias {
        Some(to) => operands.bias(cuda, stream, to),
        None => Ok(()),
    }
}

impl GroupedBackward {
    /// What the three have in common. `slots`: whether rows are found, or weighted, through their slots.
    fn params(&self, to: Target, [slots, weighted]: [bool; 2], neighbours: u64) -> GroupedBackwardParams {
        let GroupedBackwardProblem { rows, experts, outputs, inputs, .. } = self.problem;
        let [offsets, row_slot] = self.groups;
        let (weights, columns) = if weighted { self.weights } else { (Tensor::default(), 1) };
        let (matrices, expert_stride) = self.matrices;
        let (capped, softcap) = self.softcap.unwrap_or_default();
        GroupedBackwardParams {
            grouped: GroupedParams {
                out: to.out,
                input_weights: weights,
                weights: matrices.data,
                expert_stride: expert_stride as u64,
                row_stride: matrices.stride,
                offsets: offsets.data,
                row_slot: if slots { row_slot.data } else { 0 },
                rows: rows as u64,
                inner: outputs as u64,
                outputs: inputs as u64,
                experts: experts as u32,
                here: experts as u32,
                top_k: self.top_k(),
                input_columns: columns as u32,
                neighbours: to.out.aligned(neighbours).into(),
                ..GroupedParams::default()
            },
            d: self.d.rows,
            capped,
            softcap,
            outputs: outputs as u64,
            inputs: inputs as u64,
            d_gathered: self.d.top_k.is_some().into(),
            accumulate: to.accumulate,
            scale: self.scale,
            ..GroupedBackwardParams::default()
        }
    }

    fn top_k(&self) -> u32 {
        let x = self.x.and_then(|x| x.top_k);
        self.d.top_k.or(x).unwrap_or(1).max(1) as u32
    }

    fn rows(&self, cuda: &Cuda, stream: &CudaStream, to: Target) -> Result<()> {
        let (matrices, d) = (self.matrices.0, self.d);
        let GroupedBackwardProblem { outputs, inputs, .. } = self.problem;
        let aligned = |n: u64| {
            let whole = |width: usize| (width as u64).is_multiple_of(n);
            d.rows.aligned(n) && matrices.aligned(n) && whole(outputs) && whole(inputs)
        };
        let gather = d.top_k.is_some();
        let within_reach = to.accumulate == 0 && wgmma::is_within_reach_of_rows(&self.problem, d.rows, d.top_k);
        let operands = plan::Rows {
            formats: [d.format, self.problem.matrices],
            plain: self.softcap.is_none(),
            gather,
            engine: within_reach.then(|| Ends::without_bias(to.out, d.format, inputs)),
        };
        let plan = plan::rows(self.stage, &self.problem, operands, aligned, cuda.numbers());
        let neighbours = plan::neighbours(plan.kernel);
        let params = self.params(to, [gather, self.weights_are_ds], neighbours);
        match plan.kernel {
            GroupedBackwardKernel::RowsWgmma { format, .. } => {
                run(cuda, stream, plan, &wgmma::params_of_rows(cuda, (&params, gather), format)?)
            }
            _ => run(cuda, stream, plan, &params),
        }
    }

    fn matrices(&self, cuda: &Cuda, stream: &CudaStream, x: Source, to: Target) -> Result<()> {
        let d = self.d;
        let GroupedBackwardProblem { outputs, inputs, .. } = self.problem;
        let aligned = |n: u64| {
            let whole = |width: usize| (width as u64).is_multiple_of(n);
            d.rows.aligned(n) && x.rows.aligned(n) && whole(outputs) && whole(inputs)
        };
        let plain = self.weights.0.data == 0 && self.softcap.is_none();
        let formats = ([d.format, x.format], plain);
        let gathers = matrices_wgmma::gathers(self, &x, to.out);
        let plan = plan::matrices(self.stage, &self.problem, formats, aligned, gathers, cuda.numbers());
        let slots = d.top_k.is_some() || x.top_k.is_some();
        let params = GroupedBackwardParams {
            x: x.rows,
            x_gathered: x.top_k.is_some().into(),
            ..self.params(to, [slots, true], plan::neighbours(plan.kernel))
        };
        match plan.kernel {
            GroupedBackwardKernel::MatricesWgmma { .. } => {
                run(cuda, stream, plan, &matrices_wgmma::params(cuda, self, &x, &params)?)
            }
            _ => run(cuda, stream, plan, &params),
        }
    }

    fn bias(&self, cuda: &Cuda, stream: &CudaStream, to: Target) -> Result<()> {
        let GroupedBackwardProblem { experts, outputs, .. } = self.problem;
        let params = self.params(to, [self.d.top_k.is_some(), self.weights_are_ds], 1);
        let kernel = Kernel::Backward(BackwardKernel::Grouped(GroupedBackwardKernel::Bias));
        launch(cuda, stream, kernel, Grid::plane(outputs.div_ceil(32), experts, 1024), &params)
    }
}

fn run<P: Params>(cuda: &Cuda, stream: &CudaStream, plan: plan::GroupedBackwardPlan, params: &P) -> Result<()> {
    if let Some(recorder) = cuda.recorder() {
        recorder.explain(plan.why);
    }
    launch(cuda, stream, Kernel::Backward(BackwardKernel::Grouped(plan.kernel)), plan.grid, params)
}
