use crate::Cpu;
use crate::arch::{Isa, PANEL};
use crate::error::Result;
use crate::memory::Memory;
use crate::panels::{PanelSizes, Panels};
use crate::plan::operand;
use fused_moe_core::config::{Activation, Function};
use fused_moe_core::weights::{ExpertMatrices, ExpertWeights, Matrix};
use fused_moe_core::{DType, Error as Contract, Shape};
use rayon::prelude::*;
use std::ops::Range;

/// Expert matrices as this backend reads them: copied once, in the format that they came in.
///
/// ```text
/// for each expert that is here:   gate_up  panels of 16 gate rows and their 16 up rows     32 up rows without gate
/// for each expert that is here:   down     panels of 32 rows
/// panel:                          [C][32]         element k of each of its rows is a line
///                                 [C / 2][32][2]  of bf16: a pair of elements
/// ```
/// A kernel holds the sums of a panel's rows in the lanes of its vectors, so it never sums across lanes; gate and up of
/// an output are formed in one pass over the memory, and so is the activation of them. Rows and columns are padded with
/// zeros.
#[derive(Debug)]
pub struct Experts {
    memory: Memory,
    sizes: [usize; 2],
    gate_up: PanelSizes,
    down: PanelSizes,
    down_offset: usize,
    /// For each expert, which of the matrices in `memory` are its own; `None` for experts that are elsewhere.
    places: Vec<Option<usize>>,
    /// f32 `[here, 2I]`, those of the gate first.
    gate_up_bias: Option<Vec<f32>>,
    /// f32 `[here, H]`.
    down_bias: Option<Vec<f32>>,
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
        let (intermediate, hidden, gated) = (first.up.rows(), first.up.cols(), first.gate.is_some());
        let gate_up = PanelSizes { outputs: intermediate, inner: hidden, gated, dtype: first.up.dtype() };
        let down = PanelSizes { outputs: hidden, inner: intermediate, gated: false, dtype: first.down.dtype() };
        let [gate_up_bytes, down_bytes] = [gate_up, down].map(|sizes| here.len().saturating_mul(sizes.matrix_bytes()));
        let down_offset = gate_up_bytes.checked_next_multiple_of(ALIGNMENT).unwrap_or(usize::MAX);
        let mut memory = Memory::new(down_offset.saturating_add(down_bytes))?;
        let (to_gate_up, to_down) = memory.split_at_mut(down_offset);
        cpu.pool.install(|| {
            fill(&mut to_gate_up[..gate_up_bytes], gate_up, |place, up| {
                let expert = here[place];
                if up { expert.up } else { expert.gate.unwrap_or(expert.up) }
            });
            fill(to_down, down, |place, _| here[place].down);
        });
        let gate_up_bias = here.iter().any(|expert| expert.gate_bias.or(expert.up_bias).is_some()).then(|| {
            let biases = |expert: &ExpertMatrices<'_>| {
                let gate = column(expert.gate_bias, if gated { intermediate } else { 0 });
                gate.into_iter().chain(column(expert.up_bias, intermediate))
            };
            here.iter().flat_map(|expert| biases(expert)).collect()
        });
        let down_bias = here
            .iter()
            .any(|expert| expert.down_bias.is_some())
            .then(|| here.iter().flat_map(|expert| column(expert.down_bias, hidden)).collect());
        let places = (0..experts.len()).map(|e| local.contains(&e).then(|| e - local.start)).collect();
        let sizes = [intermediate, hidden];
        Ok(Self { memory, sizes, gate_up, down, down_offset, places, gate_up_bias, down_bias })
    }

    /// `[E, I, H]`.
    pub(crate) fn shape(&self) -> Shape {
        Shape::from([self.places.len(), self.sizes[0], self.sizes[1]])
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
        self.gate_up.gated
    }

    /// The format of what lies between gate_up of x in some format and down: no wider than down multiplies it.
    pub(crate) fn between(&self, x: DType, isa: Isa) -> DType {
        operand(operand(x, self.gate_up.dtype, isa), self.down.dtype, isa)
    }

    /// Bytes of matrices and biases.
    pub(crate) fn bytes(&self) -> usize {
        let biases = [&self.gate_up_bias, &self.down_bias];
        self.memory.len()
            + biases.iter().map(|bias| bias.as_ref().map_or(0, Vec::len) * size_of::<f32>()).sum::<usize>()
    }

    pub(crate) fn gate_up(&self) -> Panels<'_> {
        let (bytes, bias) = (self.memory.get(..self.down_offset), self.gate_up_bias.as_deref());
        Panels { bytes: bytes.unwrap_or_default(), sizes: self.gate_up, places: &self.places, bias }
    }

    pub(crate) fn down(&self) -> Panels<'_> {
        let (bytes, bias) = (self.memory.get(self.down_offset..), self.down_bias.as_deref());
        Panels { bytes: bytes.unwrap_or_default(), sizes: self.down, places: &self.places, bias }
    }
}

/// Fills `to` with the panels of matrices; `matrix(place, up)` has a panel's rows, of which the later half are `up` where
/// the matrices are gated.
fn fill<'a>(to: &mut [u8], sizes: PanelSizes, matrix: impl Fn(usize, bool) -> Matrix<'a> + Sync) {
    let (panels, row_bytes) = (sizes.panels(), sizes.inner * sizes.dtype.size());
    if to.is_empty() {
        return;
    }
    let padded = sizes.steps() * sizes.element_bytes();
    to.par_chunks_exact_mut(sizes.panel_bytes()).enumerate().for_each_init(
        || vec![0; PANEL * padded],
        |rows, (n, to)| {
            let (place, panel) = (n / panels, n % panels);
            for (i, row) in rows.chunks_exact_mut(padded).enumerate() {
                let (up, output) = sizes.output(panel, i);
                match output < sizes.outputs {
                    true => matrix(place, up).copy_row(output, &mut row[..row_bytes]),
                    false => row.fill(0),
                }
            }
            match sizes.element_bytes() {
                2 => interleave::<2>(rows, to),
                _ => interleave::<4>(rows, to),
            }
        },
    );
}

/// `to[k][i] = rows[i][k]`, elements of SIZE bytes.
fn interleave<const SIZE: usize>(rows: &[u8], to: &mut [u8]) {
    let (rows, to) = (rows.as_chunks::<SIZE>().0, to.as_chunks_mut::<SIZE>().0);
    let steps = rows.len() / PANEL;
    for (k, line) in to.chunks_exact_mut(PANEL).enumerate().take(steps) {
        for (to, row) in line.iter_mut().zip(rows.chunks_exact(steps)) {
            *to = row[k];
        }
    }
}

/// A column of `count` elements in f32; zeros where there is none.
fn column(column: Option<Matrix<'_>>, count: usize) -> Vec<f32> {
    column.map_or_else(|| vec![0.0; count], |column| column.to_f32())
}
