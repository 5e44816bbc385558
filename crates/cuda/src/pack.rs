use crate::Cuda;
use crate::error::Result;
use crate::grouped::GroupedParams;
use crate::launch::{Addressed, Tensor, dtype_code};
use crate::memory::Memory;
use crate::upload::Upload;
use fused_moe_core::config::{Activation, Function};
use fused_moe_core::weights::{ExpertMatrices, ExpertWeights, Matrix};
use fused_moe_core::{DType, Error as Contract, Shape, View};
use half::{bf16, f16};
use std::ops::Range;

/// Expert matrices as this backend reads them: copied once, in the format that they came in.
///
/// ```text
/// for each expert that is here:   gate_up  [2I, H], the I gate rows, then the I up rows     [I, H] without gate
/// for each expert that is here:   down     [H, I]
/// for each expert that is here:   biases   f32 [2I], f32 [H]
/// for each expert:                where its gate_up and its bias lie, where its down and its bias lie
/// ```
/// A matrix lies as in a canonical stack; a tile takes its rows from both halves, so that gate and up of an output meet
/// in one thread. Kernels find an expert through the table of addresses, or by arithmetic where a look costs too much.
#[derive(Debug)]
pub struct Experts {
    memory: Memory,
    sizes: Sizes,
    places: Places,
    /// The experts that are here, of so many.
    local: Range<usize>,
    experts: usize,
}

#[derive(Clone, Copy, Debug)]
struct Sizes {
    here: usize,
    intermediate: usize,
    hidden: usize,
    gated: bool,
    gate_up: DType,
    down: DType,
    biased: [bool; 2],
}

/// Where the parts begin in the memory, and its size.
#[derive(Clone, Copy, Debug)]
struct Places {
    matrices: [usize; 2],
    biases: [usize; 2],
    tables: [usize; 2],
    bytes: usize,
}

const ALIGNMENT: usize = 256;
/// Bytes of an expert in a table: the addresses of a matrix and of a bias.
const ENTRY: usize = 16;

impl Sizes {
    /// Rows and columns of gate_up and down, and their formats.
    fn matrices(&self) -> [(usize, usize, DType); 2] {
        let height = if self.gated { self.intermediate.saturating_mul(2) } else { self.intermediate };
        [(height, self.hidden, self.gate_up), (self.hidden, self.intermediate, self.down)]
    }

    fn places(&self, experts: usize) -> Places {
        let mut end = 0usize;
        let mut place = |count: usize, bytes: usize| {
            let begin = end;
            end = end.saturating_add(count.saturating_mul(bytes)).saturating_add(ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
            begin
        };
        let formats = self.matrices();
        let matrices =
            formats.map(|(rows, cols, dtype)| place(self.here, rows.saturating_mul(cols).saturating_mul(dtype.size())));
        let biases = [0, 1].map(|i| place(if self.biased[i] { self.here } else { 0 }, formats[i].0.saturating_mul(4)));
        let tables = [0, 1].map(|_| place(experts, ENTRY));
        Places { matrices, biases, tables, bytes: end }
    }
}

impl Experts {
    pub(crate) fn new(cuda: &Cuda, weights: &ExpertWeights<'_>) -> Result<Self> {
        let gated = weights.iter().next().is_some_and(|expert| expert.gate.is_some());
        let any = Function::Identity;
        weights.problem(if gated { Activation::Gated(any) } else { Activation::Plain(any) })?;
        let experts: Vec<_> = weights.iter().collect();
        Self::local(cuda, &experts, 0..experts.len())
    }

    /// The experts `local` of a list that was checked.
    pub(crate) fn local(cuda: &Cuda, experts: &[&ExpertMatrices<'_>], local: Range<usize>) -> Result<Self> {
        let Some(first) = experts.first() else {
            return Err(Contract::Missing { operation: "pack", operand: "experts", reason: "there is none" }.into());
        };
        let here = experts.get(local.clone()).unwrap_or(&[]);
        let sizes = Sizes {
            here: here.len(),
            intermediate: first.up.rows(),
            hidden: first.up.cols(),
            gated: first.gate.is_some(),
            gate_up: first.up.dtype(),
            down: first.down.dtype(),
            biased: [
                here.iter().any(|expert| expert.gate_bias.or(expert.up_bias).is_some()),
                here.iter().any(|expert| expert.down_bias.is_some()),
            ],
        };
        let places = sizes.places(experts.len());
        let packed =
            Self { memory: Memory::new(cuda.device(), places.bytes)?, sizes, places, local, experts: experts.len() };
        packed.fill(cuda, here)?;
        Ok(packed)
    }

    fn fill(&self, cuda: &Cuda, here: &[&ExpertMatrices<'_>]) -> Result<()> {
        let formats = self.sizes.matrices();
        let row_bytes = formats.map(|(_, cols, dtype)| cols.saturating_mul(dtype.size()));
        let heights = formats.map(|(rows, ..)| rows);
        let tables = [0, 1].map(|i| self.entries(i));
        let longest = row_bytes.into_iter().chain(heights.map(|rows| rows.saturating_mul(4))).chain([tables[0].len()]);
        let mut upload = Upload::new(cuda.device(), longest.max().unwrap_or(0))?;
        let room = |place: usize| (self.memory.address() + place as u64, self.places.bytes - place);
        let gate_rows = if self.sizes.gated { self.sizes.intermediate } else { 0 };
        upload.rows(room(self.places.matrices[0]), here.len() * heights[0], row_bytes[0], |n, to| {
            let (expert, row) = (here[n / heights[0]], n % heights[0]);
            match expert.gate {
                Some(gate) if row < gate_rows => gate.copy_row(row, to),
                _ => expert.up.copy_row(row - gate_rows, to),
            }
        })?;
        upload.rows(room(self.places.matrices[1]), here.len() * heights[1], row_bytes[1], |n, to| {
            here[n / heights[1]].down.copy_row(n % heights[1], to);
        })?;
        if self.sizes.biased[0] {
            upload.rows(room(self.places.biases[0]), here.len(), heights[0] * 4, |e, to| {
                let (gate, up) = to.split_at_mut(gate_rows * 4);
                column(here[e].gate_bias, gate);
                column(here[e].up_bias, up);
            })?;
        }
        if self.sizes.biased[1] {
            upload
                .rows(room(self.places.biases[1]), here.len(), heights[1] * 4, |e, to| column(here[e].down_bias, to))?;
        }
        for (place, table) in self.places.tables.into_iter().zip(&tables) {
            upload.rows(room(place), 1, table.len(), |_, to| to.copy_from_slice(table))?;
        }
        upload.finish()
    }

    /// The table of gate_up (0) or down (1).
    fn entries(&self, i: usize) -> Vec<u8> {
        let (rows, cols, dtype) = self.sizes.matrices()[i];
        let entry = |e: usize| {
            let Some(place) = e.checked_sub(self.local.start).filter(|_| self.local.contains(&e)) else {
                return [0; 2];
            };
            let at = |begin: usize, bytes: usize| self.memory.address() + (begin + place * bytes) as u64;
            let bias = if self.sizes.biased[i] { at(self.places.biases[i], rows * 4) } else { 0 };
            [at(self.places.matrices[i], rows * cols * dtype.size()), bias]
        };
        (0..self.experts).flat_map(entry).flat_map(u64::to_le_bytes).collect()
    }

    /// `[E, I, H]`.
    pub(crate) fn shape(&self) -> Shape {
        Shape::from([self.experts, self.sizes.intermediate, self.sizes.hidden])
    }

    /// Whether these are the experts that an operation on this device expects.
    pub(crate) fn check(&self, cuda: &Cuda, operation: &'static str, expected: Shape) -> Result<()> {
        self.memory.check(cuda.device(), operation, "packed experts")?;
        if self.shape() == expected {
            return Ok(());
        }
        let (operand, layout, actual) = ("packed experts", "[E, I, H]", self.shape());
        Err(Contract::Shape { operation, operand, layout, expected, actual }.into())
    }

    pub(crate) fn is_gated(&self) -> bool {
        self.sizes.gated
    }

    /// Formats of gate_up and down.
    pub(crate) fn formats(&self) -> [DType; 2] {
        [self.sizes.gate_up, self.sizes.down]
    }

    /// Bytes of matrices, biases and tables.
    pub(crate) fn bytes(&self) -> usize {
        self.places.bytes
    }

    pub(crate) fn gate_up(&self) -> Table {
        self.table(0, self.sizes.intermediate)
    }

    pub(crate) fn down(&self) -> Table {
        self.table(1, self.sizes.hidden)
    }

    fn table(&self, i: usize, outputs: usize) -> Table {
        let (rows, cols, format) = self.sizes.matrices()[i];
        let at = |place: usize| self.memory.address() + place as u64;
        let bias = if self.sizes.biased[i] { at(self.places.biases[i]) } else { 0 };
        Table {
            format,
            address: at(self.places.matrices[i]),
            row_stride: cols,
            expert_stride: rows * cols,
            entries: at(self.places.tables[i]),
            bias: Tensor { data: bias, stride: rows as u64, dtype: dtype_code(DType::F32), zero: 0 },
            experts: self.experts,
            first: self.local.start,
            here: self.sizes.here,
            inner: cols,
            outputs,
        }
    }
}

/// The matrices of the experts, and which is whose: the only way from an expert to its weights.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Table {
    pub(crate) format: DType,
    address: u64,
    row_stride: usize,
    /// Elements from one expert's matrix to the next one's.
    pub(crate) expert_stride: usize,
    /// The address of each expert's matrix and bias; 0: they are a stack.
    pub(crate) entries: u64,
    /// `[here, ..]`.
    pub(crate) bias: Tensor,
    /// E, and which of them are in the stack.
    pub(crate) experts: usize,
    pub(crate) first: usize,
    pub(crate) here: usize,
    /// Columns of a matrix.
    pub(crate) inner: usize,
    /// Outputs of an expert.
    pub(crate) outputs: usize,
}

impl Table {
    /// A canonical stack as it lies.
    pub(crate) fn stack<S: Addressed>(
        view: &View<S>,
        bias: Option<&View<S>>,
        experts: usize,
        outputs: usize,
    ) -> Result<Self> {
        let weights = Tensor::of(view)?;
        let (rows, row_stride) = (view.rows() / experts.max(1), view.row_stride());
        Ok(Self {
            format: view.dtype(),
            address: weights.data,
            row_stride,
            expert_stride: rows * row_stride,
            entries: 0,
            bias: Tensor::maybe(bias)?,
            experts,
            first: 0,
            here: experts,
            inner: view.cols(),
            outputs,
        })
    }

    /// Where a grouped product finds the experts, which are a stack.
    pub(crate) fn params(&self) -> GroupedParams {
        GroupedParams {
            bias: self.bias,
            weights: self.address,
            expert_stride: self.expert_stride as u64,
            row_stride: self.row_stride as u64,
            inner: self.inner as u64,
            outputs: self.outputs as u64,
            experts: self.experts as u32,
            first: self.first as u32,
            here: self.here as u32,
            ..GroupedParams::default()
        }
    }

    /// The stack as rows.
    pub(crate) fn weights(&self) -> Tensor {
        Tensor { data: self.address, stride: self.row_stride as u64, dtype: dtype_code(self.format), zero: 0 }
    }
}

/// A column of floats in f32; zeros where there is none.
fn column(column: Option<Matrix<'_>>, to: &mut [u8]) {
    for (i, to) in to.chunks_exact_mut(4).enumerate() {
        let mut bytes = [0; 4];
        let dtype = column.map_or(DType::F32, |column| {
            column.copy_row(i, &mut bytes[..column.dtype().size()]);
            column.dtype()
        });
        to.copy_from_slice(&float(dtype, bytes).to_le_bytes());
    }
}

fn float(dtype: DType, bytes: [u8; 4]) -> f32 {
    let narrow = [bytes[0], bytes[1]];
    match dtype {
        DType::F16 => f16::from_ne_bytes(narrow).to_f32(),
        DType::BF16 => bf16::from_ne_bytes(narrow).to_f32(),
        _ => f32::from_ne_bytes(bytes),
    }
}
