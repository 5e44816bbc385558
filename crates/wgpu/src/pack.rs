use crate::Wgpu;
use crate::device::Device;
use crate::error::Result;
use crate::grouped::{too_large, widest};
use crate::launch::Operand;
use crate::memory::Ref;
use crate::plan::room;
use crate::plan::windows::{Window, windows};
use crate::upload::Upload;
use fused_moe_core::config::{Activation, Function};
use fused_moe_core::weights::{ExpertMatrices, ExpertWeights, Matrix};
use fused_moe_core::{DType, Error as Contract, Shape, View};
use half::{bf16, f16};
use std::ops::Range;

/// Expert matrices as this backend reads them: copied once, in the format that they came in.
///
/// ```text
/// gate_up: for each window, for each expert in it:   its gate rows, then its up rows     (up rows alone without gate)
/// down:    for each window, for each expert in it:   its rows
/// biases:  for each expert that is here:             f32 [2I] (gate, then up), f32 [H]
/// ```
/// A window is a buffer, which a binding holds: some experts, or some rows of one that is larger. Rows are padded with
/// zeros to a multiple of 8 elements, so that any are read by 16 bytes.
#[derive(Debug)]
pub struct Experts {
    matrices: [Stored; 2],
    intermediate: usize,
    hidden: usize,
    gated: bool,
    /// The experts that are here, of so many.
    local: Range<usize>,
    experts: usize,
}

/// The same matrix of every expert.
#[derive(Debug)]
struct Stored {
    form: Form,
    pieces: Vec<(Window, wgpu::Buffer)>,
    bias: Option<wgpu::Buffer>,
}

/// What a matrix is: pairs of its rows are a gate row and an up row, or else neighbours.
#[derive(Clone, Copy, Debug)]
struct Form {
    format: DType,
    gated: bool,
    outputs: usize,
    inner: usize,
}

impl Form {
    fn pairs(self) -> usize {
        if self.gated { self.outputs } else { self.outputs.div_ceil(2) }
    }

    fn height(self) -> usize {
        if self.gated { self.outputs.saturating_mul(2) } else { self.outputs }
    }

    /// Elements from one packed row to the next.
    fn stride(self) -> usize {
        self.inner.next_multiple_of(8)
    }

    /// The rows of an expert that a window of packed ones has, in order: one range, or a gate's and an up's.
    fn rows(self, pairs: &Range<usize>) -> [Range<usize>; 2] {
        if self.gated {
            [pairs.clone(), self.outputs + pairs.start..self.outputs + pairs.end]
        } else {
            [2 * pairs.start..self.outputs.min(2 * pairs.end), 0..0]
        }
    }
}

impl Experts {
    pub(crate) fn new(wgpu: &Wgpu, weights: &ExpertWeights<'_>) -> Result<Self> {
        let gated = weights.iter().next().is_some_and(|expert| expert.gate.is_some());
        let any = Function::Identity;
        weights.problem(if gated { Activation::Gated(any) } else { Activation::Plain(any) })?;
        let experts: Vec<_> = weights.iter().collect();
        Self::local(wgpu, &experts, 0..experts.len())
    }

    /// The experts `local` of a list that was checked.
    pub(crate) fn local(wgpu: &Wgpu, experts: &[&ExpertMatrices<'_>], local: Range<usize>) -> Result<Self> {
        let Some(first) = experts.first() else {
            return Err(Contract::Missing { operation: "pack", operand: "experts", reason: "there is none" }.into());
        };
        let here = experts.get(local.clone()).unwrap_or(&[]);
        let (intermediate, hidden, gated) = (first.up.rows(), first.up.cols(), first.gate.is_some());
        let gate_up = Form { format: first.up.dtype(), gated, outputs: intermediate, inner: hidden };
        let down = Form { format: first.down.dtype(), gated: false, outputs: hidden, inner: intermediate };
        let gate_up = Stored::new(wgpu, gate_up, here.len(), |e, row, to| match here[e].gate {
            Some(gate) if row < intermediate => gate.copy_row(row, to),
            Some(_) => here[e].up.copy_row(row - intermediate, to),
            None => here[e].up.copy_row(row, to),
        })?;
        let down = Stored::new(wgpu, down, here.len(), |e, row, to| here[e].down.copy_row(row, to))?;
        let gate_rows = if gated { intermediate * 4 } else { 0 };
        let biased = [
            here.iter().any(|expert| expert.gate_bias.or(expert.up_bias).is_some()),
            here.iter().any(|expert| expert.down_bias.is_some()),
        ];
        let gate_up = gate_up.with_bias(wgpu.device(), here.len(), biased[0], |e, to| {
            let (gate, up) = to.split_at_mut(gate_rows);
            column(here[e].gate_bias, gate);
            column(here[e].up_bias, up);
        })?;
        let down = down.with_bias(wgpu.device(), here.len(), biased[1], |e, to| column(here[e].down_bias, to))?;
        Ok(Self { matrices: [gate_up, down], intermediate, hidden, gated, local, experts: experts.len() })
    }

    /// `[E, I, H]`.
    pub(crate) fn shape(&self) -> Shape {
        Shape::from([self.experts, self.intermediate, self.hidden])
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
        self.gated
    }

    /// Pairs of rows that a matrix has, of gate_up and of down.
    pub(crate) fn pairs(&self) -> [usize; 2] {
        [0, 1].map(|i| self.matrices[i].form.pairs())
    }

    /// Bytes of matrices and biases.
    pub(crate) fn bytes(&self) -> usize {
        let of = |stored: &Stored| {
            stored.pieces.iter().map(|(_, buffer)| buffer).chain(&stored.bias).map(wgpu::Buffer::size).sum::<u64>()
        };
        usize::try_from(self.matrices.iter().map(of).sum::<u64>()).unwrap_or(usize::MAX)
    }

    pub(crate) fn gate_up(&self, wgpu: &Wgpu) -> Result<Table<'_>> {
        self.matrices[0].table(wgpu, "gate_up", self.experts, self.local.start)
    }

    pub(crate) fn down(&self, wgpu: &Wgpu) -> Result<Table<'_>> {
        self.matrices[1].table(wgpu, "down", self.experts, self.local.start)
    }
}

impl Stored {
    /// `fill(e, row, to)` copies a row of an expert that is here.
    fn new(wgpu: &Wgpu, form: Form, here: usize, fill: impl Fn(usize, usize, &mut [u8])) -> Result<Self> {
        let row_bytes = form.stride() * form.format.size();
        let packed = |experts: usize, pairs: usize| experts.saturating_mul(2).saturating_mul(pairs);
        let windows = windows(here, form.pairs(), room(wgpu) / row_bytes.max(1), packed);
        let windows = windows.ok_or_else(|| too_large(wgpu, "pack", 2 * row_bytes))?;
        let mut pieces = Vec::with_capacity(windows.len());
        let mut upload = Upload::new(wgpu.device(), row_bytes);
        for window in windows {
            let [first, second] = form.rows(&window.pairs);
            let height = first.len() + second.len();
            let rows = window.experts.len() * height;
            let buffer = wgpu.device().buffer((rows * row_bytes) as u64, Device::USAGES)?;
            upload.rows(&buffer, rows, |n, to| {
                let (e, row) = (window.experts.start + n / height, n % height);
                let row = if row < first.len() { first.start + row } else { second.start + row - first.len() };
                fill(e, row, &mut to[..form.inner * form.format.size()]);
            })?;
            pieces.push((window, buffer));
        }
        Ok(Self { form, pieces, bias: None })
    }

    /// `fill(e, to)` makes an expert's bias in f32.
    fn with_bias(self, device: &Device, here: usize, biased: bool, fill: impl Fn(usize, &mut [u8])) -> Result<Self> {
        if !biased {
            return Ok(self);
        }
        let bytes = self.form.height() * 4;
        let buffer = device.buffer((here * bytes) as u64, Device::USAGES)?;
        Upload::new(device, bytes).rows(&buffer, here, fill)?;
        Ok(Self { bias: Some(buffer), ..self })
    }

    fn table(&self, wgpu: &Wgpu, operation: &'static str, experts: usize, first: usize) -> Result<Table<'_>> {
        let form = self.form;
        let (device, stride) = (wgpu.device(), form.stride() as u32);
        let mut pieces = Vec::with_capacity(self.pieces.len());
        for (window, buffer) in &self.pieces {
            let rows = Operand::matrix(device, operation, buffer, (form.format, stride))?.widened();
            let [one, two] = form.rows(&window.pairs);
            let [gate, up] = if form.gated {
                [rows, rows.after(device, operation, one.len() as u32)?]
            } else {
                rows.alternate(device, operation)?
            };
            let Range { start, end } = window.experts;
            pieces.push(Piece {
                experts: first + start..first + end,
                pairs: window.pairs.clone(),
                rows,
                gate,
                up,
                expert_stride: (one.len() + two.len()) as u32 * stride,
            });
        }
        let like = (DType::F32, form.height() as u32);
        let bias = self.bias.as_ref().map(|buffer| Operand::matrix(device, operation, buffer, like)).transpose()?;
        Ok(Table { experts, first, inner: form.inner, outputs: form.outputs, bias, pieces })
    }
}

/// The matrices of the experts, and which is whose: the only way from an expert to its weights.
#[derive(Debug)]
pub(crate) struct Table<'a> {
    /// E, and which of them the first bias is for.
    pub(crate) experts: usize,
    pub(crate) first: usize,
    /// Columns of a matrix.
    pub(crate) inner: usize,
    /// Outputs of an expert.
    pub(crate) outputs: usize,
    pub(crate) bias: Option<Operand<'a>>,
    pub(crate) pieces: Vec<Piece<'a>>,
}

/// What one launch reads: some experts, or some pairs of matrix rows of one.
#[derive(Clone, Debug)]
pub(crate) struct Piece<'a> {
    /// Of all E.
    pub(crate) experts: Range<usize>,
    pub(crate) pairs: Range<usize>,
    /// The rows of the first of the experts, one after the other; gate rows where there is a gate.
    pub(crate) rows: Operand<'a>,
    /// The first rows of the pairs, of the first of the experts.
    pub(crate) gate: Operand<'a>,
    /// Their second rows.
    pub(crate) up: Operand<'a>,
    /// Elements from one expert to the next.
    pub(crate) expert_stride: u32,
}

impl<'a> Table<'a> {
    /// A canonical stack as it lies, and its bias `[E, rows]`.
    ///
    /// Errors: `Binding` when not even one row fits; as [`Operand::of`].
    pub(crate) fn stack(
        wgpu: &Wgpu,
        operation: &'static str,
        (view, bias): (&'a View<Ref<'a>>, Option<&'a View<Ref<'a>>>),
        (experts, gated): (usize, bool),
    ) -> Result<Self> {
        let (device, inner, stride) = (wgpu.device(), view.cols(), view.row_stride());
        let height = view.rows() / experts.max(1);
        let form = Form { format: view.dtype(), gated, outputs: if gated { height / 2 } else { height }, inner };
        // gate and up are bound apart; neighbours are bound together
        let each = if gated { 1 } else { 2 };
        let between = |n: usize, pairs: usize| (n - 1).saturating_mul(height).saturating_add(each * pairs);
        let row_bytes = stride.max(inner).saturating_mul(view.dtype().size());
        let windows = windows(experts, form.pairs(), room(wgpu) / row_bytes.max(1), between);
        let mut pieces = Vec::new();
        for Window { experts, pairs } in windows.ok_or_else(|| too_large(wgpu, operation, row_bytes))? {
            let bind = |rows: Range<usize>| {
                let all = experts.start * height + rows.start..(experts.end - 1) * height + rows.end;
                Operand::rows(device, operation, view, all)
            };
            let [one, two] = form.rows(&pairs);
            let rows = bind(one)?;
            let [gate, up] = if gated { [rows, bind(two)?] } else { rows.alternate(device, operation)? };
            let expert_stride = (height * stride) as u32;
            let wide =
                expert_stride.is_multiple_of(8) && [gate, up].map(|rows| widest(rows, inner).is_wide()) == [true; 2];
            let [rows, gate, up] = if wide { [rows, gate, up].map(Operand::widened) } else { [rows, gate, up] };
            pieces.push(Piece { experts, pairs, rows, gate, up, expert_stride });
        }
        Ok(Self {
            experts,
            first: 0,
            inner,
            outputs: form.outputs,
            bias: Operand::maybe(device, operation, bias)?,
            pieces,
        })
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
