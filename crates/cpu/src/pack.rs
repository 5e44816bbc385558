use crate::Cpu;
use crate::error::Result;
use crate::memory::Memory;
use crate::plan::PACKED_ROWS;
use crate::table::{RowOrder, Table};
use fused_moe_core::config::{Activation, Function};
use fused_moe_core::weights::{ExpertMatrices, ExpertWeights, Matrix};
use fused_moe_core::{DType, Error as Contract, Shape, View};
use half::{bf16, f16};
use rayon::prelude::*;
use std::ops::Range;

/// Expert matrices as this backend reads them: copied once, in the format that they came in.
///
/// ```text
/// for each expert that is here:   gate_up  [2I, H], rows g0, u0, g1, u1, ..     [I, H] without gate
/// for each expert that is here:   down     [H, I]
/// ```
/// A gate row and its up row are neighbours, so that one pass over the memory makes both and the activation of them.
#[derive(Debug)]
pub struct Experts {
    memory: Memory,
    sizes: Sizes,
    down_offset: usize,
    /// For each expert, which of the matrices in `memory` are its own; `None` for experts that are elsewhere.
    places: Vec<Option<usize>>,
    /// f32 `[here, 2I]`, in the order of the rows.
    gate_up_bias: Option<Vec<f32>>,
    /// f32 `[here, H]`.
    down_bias: Option<Vec<f32>>,
}

#[derive(Clone, Copy, Debug)]
struct Sizes {
    here: usize,
    intermediate: usize,
    hidden: usize,
    gated: bool,
    gate_up: DType,
    down: DType,
}

impl Sizes {
    fn gate_up_rows(&self) -> usize {
        if self.gated { self.intermediate.saturating_mul(2) } else { self.intermediate }
    }

    /// Bytes of gate_up and down of all experts that are here.
    fn bytes(&self) -> [usize; 2] {
        let bytes = |rows: usize, cols: usize, dtype: DType| {
            self.here.saturating_mul(rows).saturating_mul(cols).saturating_mul(dtype.size())
        };
        [bytes(self.gate_up_rows(), self.hidden, self.gate_up), bytes(self.hidden, self.intermediate, self.down)]
    }
}

/// Bytes that a matrix begins at a multiple of.
const ALIGNMENT: usize = 4096;

impl Experts {
    pub(crate) fn new(cpu: &Cpu, weights: &ExpertWeights<'_>) -> Result<Self> {
        let gated = weights.iter().next().is_some_and(|expert| expert.gate.is_some());
        let any = Function::Identity;
        weights.problem(if gated { Activation::Gated(any) } else { Activation::Plain(any) })?;
        let experts: Vec<_> = weights.iter().collect();
        Self::local(cpu, &experts, 0..experts.len())
    }

    /// The experts `local` of a list that was checked.
    pub(crate) fn local(cpu: &Cpu, experts: &[&ExpertMatrices<'_>], local: Range<usize>) -> Result<Self> {
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
        };
        let [gate_up_bytes, down_bytes] = sizes.bytes();
        let down_offset = gate_up_bytes.checked_next_multiple_of(ALIGNMENT).unwrap_or(usize::MAX);
        let mut memory = Memory::new(down_offset.saturating_add(down_bytes))?;
        let (gate_up, down) = memory.split_at_mut(down_offset);
        cpu.pool.install(|| {
            copy_rows(&mut gate_up[..gate_up_bytes], sizes.gate_up_rows(), |place, i| gate_up_row(here[place], i));
            copy_rows(down, sizes.hidden, |place, i| (here[place].down, i));
        });
        let gate_up_bias = here.iter().any(|expert| expert.gate_bias.or(expert.up_bias).is_some()).then(|| {
            let row = |expert: &ExpertMatrices<'_>, i: usize| match (expert.gate.is_some(), i % 2) {
                (true, 0) => element(expert.gate_bias, i / 2),
                (true, _) => element(expert.up_bias, i / 2),
                (false, _) => element(expert.up_bias, i),
            };
            here.iter().flat_map(|expert| (0..sizes.gate_up_rows()).map(|i| row(expert, i))).collect()
        });
        let down_bias = here
            .iter()
            .any(|expert| expert.down_bias.is_some())
            .then(|| here.iter().flat_map(|expert| (0..sizes.hidden).map(|i| element(expert.down_bias, i))).collect());
        let places = (0..experts.len()).map(|e| local.contains(&e).then(|| e - local.start)).collect();
        Ok(Self { memory, sizes, down_offset, places, gate_up_bias, down_bias })
    }

    /// `[E, I, H]`.
    pub(crate) fn shape(&self) -> Shape {
        Shape::from([self.places.len(), self.sizes.intermediate, self.sizes.hidden])
    }

    /// Whether these are the experts that an operation expects.
    pub(crate) fn check(&self, operation: &'static str, expected: Shape) -> Result<()> {
        if self.shape() == expected {
            return Ok(());
        }
        let (operand, layout, actual) = ("packed experts", "[E, I, H]", self.shape());
        Err(Contract::Shape { operation, operand, layout, expected, actual }.into())
    }

    pub(crate) fn is_gated(&self) -> bool {
        self.sizes.gated
    }

    /// Bytes of matrices and biases.
    pub(crate) fn bytes(&self) -> usize {
        let biases = [&self.gate_up_bias, &self.down_bias];
        self.memory.len()
            + biases.iter().map(|bias| bias.as_ref().map_or(0, Vec::len) * size_of::<f32>()).sum::<usize>()
    }

    pub(crate) fn gate_up(&self) -> Result<Table<'_>> {
        let Sizes { here, hidden, gate_up, gated, .. } = self.sizes;
        let height = self.sizes.gate_up_rows();
        let order = if gated { RowOrder::Pairs } else { RowOrder::Single };
        self.table(View::new(&self.memory[..], gate_up, 0, [here, height, hidden])?, &self.gate_up_bias, order)
    }

    pub(crate) fn down(&self) -> Result<Table<'_>> {
        let Sizes { here, intermediate, hidden, down, .. } = self.sizes;
        let view = View::new(&self.memory[..], down, self.down_offset, [here, hidden, intermediate])?;
        self.table(view, &self.down_bias, RowOrder::Single)
    }

    fn table<'a>(&'a self, matrices: View<&'a [u8]>, bias: &'a Option<Vec<f32>>, order: RowOrder) -> Result<Table<'a>> {
        let height = matrices.shape().dims()[1];
        let bias = bias.as_ref().map(|bias| View::of(bias, [self.sizes.here, height])).transpose()?;
        Ok(Table { matrices, height, places: Some(&self.places), bias, order })
    }
}

fn gate_up_row<'a>(expert: &ExpertMatrices<'a>, i: usize) -> (Matrix<'a>, usize) {
    match (expert.gate, i % 2) {
        (Some(gate), 0) => (gate, i / 2),
        (Some(_), _) => (expert.up, i / 2),
        (None, _) => (expert.up, i),
    }
}

/// Fills `to` with matrices of `height` rows; row i of the matrix at a place is `row(place, i)`.
fn copy_rows<'a>(to: &mut [u8], height: usize, row: impl Fn(usize, usize) -> (Matrix<'a>, usize) + Sync) {
    if to.is_empty() {
        return;
    }
    let (first, _) = row(0, 0);
    let bytes = first.cols() * first.dtype().size();
    to.par_chunks_mut(PACKED_ROWS * bytes).enumerate().for_each(|(block, to)| {
        for (n, to) in (block * PACKED_ROWS..).zip(to.chunks_exact_mut(bytes)) {
            let (matrix, i) = row(n / height, n % height);
            matrix.copy_row(i, to);
        }
    });
}

/// Element i of a column; 0 where there is none.
fn element(column: Option<Matrix<'_>>, i: usize) -> f32 {
    let Some(column) = column else { return 0.0 };
    let mut bytes = [0; 4];
    column.copy_row(i, &mut bytes[..column.dtype().size()]);
    let narrow = [bytes[0], bytes[1]];
    match column.dtype() {
        DType::F16 => f16::from_ne_bytes(narrow).to_f32(),
        DType::BF16 => bf16::from_ne_bytes(narrow).to_f32(),
        _ => f32::from_ne_bytes(bytes),
    }
}
