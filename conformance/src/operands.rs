//! The operands of a case: what goes in, what must come out, and both in a backend's memory.

use crate::data::{Tensor, round};
use crate::image::{Placement, Window};
use fused_moe_core::backend::{shorten, shorten_mut};
use fused_moe_core::{Backend, DType, Error, In, Out, Shape, Status, View};

/// A case worked out on the host: its operands and what the reference makes of them.
#[derive(Debug, Default)]
pub struct Prepared {
    /// Operands in the backend's memory.
    pub inputs: Vec<(&'static str, Tensor)>,
    /// Operands in host memory: weights to be packed.
    pub host: Vec<(&'static str, Tensor)>,
    /// What is written.
    pub outputs: Vec<Output>,
    /// What the stream has to report.
    pub status: Status,
}

/// Something that is written.
#[derive(Debug)]
pub struct Output {
    /// The operand.
    pub name: &'static str,
    /// Its format.
    pub dtype: DType,
    /// Its shape.
    pub shape: Shape,
    /// What it holds before, where that is read; poison otherwise.
    pub initial: Option<Tensor>,
    /// What it must hold.
    pub expected: Expected,
    /// The rows that are written; those past them must be left alone.
    pub written: usize,
    /// Whether its rows must lie without gaps.
    pub contiguous: bool,
}

/// What an output must hold.
#[derive(Clone, Debug, PartialEq)]
pub enum Expected {
    /// Numbers, and how far each may be off.
    Floats {
        /// As many as the shape says.
        values: Vec<f64>,
        /// As many.
        allowed: Vec<f64>,
    },
    /// Exactly these.
    Ids(Vec<u32>),
    /// Scratch.
    Anything,
}

impl Output {
    /// Floats; `errors` is what each may be off by before it is stored.
    pub fn floats(name: &'static str, dtype: DType, shape: impl Into<Shape>, [values, errors]: [Vec<f64>; 2]) -> Self {
        let allowed = values.iter().zip(errors).map(|(&v, e)| crate::tolerance::stored(dtype, v, e)).collect();
        // too large for the format: infinite in it
        let values =
            values.into_iter().map(|v| if round(dtype, v).is_infinite() { round(dtype, v) } else { v }).collect();
        Self::new(name, dtype, shape.into(), Expected::Floats { values, allowed })
    }

    /// u32 numbers.
    pub fn ids(name: &'static str, shape: impl Into<Shape>, ids: Vec<u32>) -> Self {
        Self::new(name, DType::U32, shape.into(), Expected::Ids(ids))
    }

    /// Scratch, without gaps.
    pub fn scratch(name: &'static str, dtype: DType, shape: impl Into<Shape>) -> Self {
        Self { contiguous: true, ..Self::new(name, dtype, shape.into(), Expected::Anything) }
    }

    fn new(name: &'static str, dtype: DType, shape: Shape, expected: Expected) -> Self {
        Self { name, dtype, shape, initial: None, expected, written: shape.rows(), contiguous: false }
    }

    /// An operand that is read before it is written.
    pub fn over(self, initial: Tensor) -> Self {
        Self { initial: Some(initial), ..self }
    }

    /// Rows from `rows` on are left alone.
    pub fn only(self, rows: usize) -> Self {
        Self { written: rows, ..self }
    }
}

impl Prepared {
    /// Adds an operand that is read.
    pub fn input(&mut self, name: &'static str, tensor: Tensor) -> &mut Self {
        self.inputs.push((name, tensor));
        self
    }

    /// Adds an operand that is read, if there is one.
    pub fn input_if(&mut self, name: &'static str, tensor: Option<Tensor>) -> &mut Self {
        self.inputs.extend(tensor.map(|tensor| (name, tensor)));
        self
    }

    /// Adds an operand that is written.
    pub fn output(&mut self, output: Output) -> &mut Self {
        self.outputs.push(output);
        self
    }

    /// The numbers of an operand that is read; empty where there is none.
    pub fn floats(&self, name: &str) -> &[f64] {
        self.tensor(name).map_or(&[], Tensor::as_floats)
    }

    /// The numbers of an operand that is read, if there is one.
    pub fn floats_if(&self, name: &str) -> Option<&[f64]> {
        self.tensor(name).map(Tensor::as_floats)
    }

    /// The ids of an operand that is read; empty where there is none.
    pub fn ids(&self, name: &str) -> &[u32] {
        self.tensor(name).map_or(&[], Tensor::as_ids)
    }

    fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.inputs.iter().chain(&self.host).find(|(n, _)| *n == name).map(|(_, tensor)| tensor)
    }

    /// What an output must hold, to be corrected after the fact.
    pub fn expected(&mut self, name: &str) -> Option<&mut Expected> {
        self.outputs.iter_mut().find(|output| output.name == name).map(|output| &mut output.expected)
    }
}

/// An operand in a backend's memory.
pub(crate) struct Buffer<B: Backend> {
    pub(crate) name: &'static str,
    pub(crate) window: Window,
    pub(crate) memory: B::Memory,
    pub(crate) before: Vec<u8>,
}

impl<B: Backend> Buffer<B> {
    pub(crate) fn new(backend: &B, name: &'static str, window: Window, before: Vec<u8>) -> Result<Self, B::Error> {
        let mut memory = backend.allocate(before.len())?;
        backend.upload(&before, &mut memory)?;
        Ok(Self { name, window, memory, before })
    }

    pub(crate) fn input(
        backend: &B,
        (name, tensor): &(&'static str, Tensor),
        placement: Placement,
        index: usize,
    ) -> Result<Self, B::Error> {
        let window = Window::new(tensor.dtype(), tensor.shape(), placement, index);
        Self::new(backend, name, window, window.image(tensor.bytes()))
    }

    pub(crate) fn read(&self) -> Result<In<'_, B>, Error> {
        let Window { dtype, offset, shape, row_stride, .. } = self.window;
        View::new(B::read(&self.memory), dtype, offset, shape)?.with_row_stride(row_stride)
    }

    pub(crate) fn write(&mut self) -> Result<Out<'_, B>, Error> {
        let Window { dtype, offset, shape, row_stride, .. } = self.window;
        View::new(B::write(&mut self.memory), dtype, offset, shape)?.with_row_stride(row_stride)
    }
}

/// What a case hands to an operation.
pub(crate) struct Operands<'a, B: Backend> {
    inputs: Vec<(&'static str, In<'a, B>)>,
    outputs: Vec<(&'static str, Option<Out<'a, B>>)>,
    host: &'a [(&'static str, Tensor)],
    /// 0 for the first run of a case, 1 for the second.
    pub(crate) attempt: usize,
}

impl<'a, B: Backend> Operands<'a, B> {
    pub(crate) fn new(
        inputs: &'a [Buffer<B>],
        outputs: &'a mut [Buffer<B>],
        host: &'a [(&'static str, Tensor)],
        attempt: usize,
    ) -> Result<Self, Error> {
        let inputs = inputs.iter().map(|b| Ok((b.name, b.read()?))).collect::<Result<_, Error>>()?;
        let outputs = outputs.iter_mut().map(|b| Ok((b.name, Some(b.write()?)))).collect::<Result<_, Error>>()?;
        Ok(Self { inputs, outputs, host, attempt })
    }

    /// The same operands for a shorter while, to bring them together with what lives less long.
    pub(crate) fn shorten<'b>(self) -> Operands<'b, B>
    where
        'a: 'b,
    {
        let inputs = self.inputs.into_iter().map(|(name, view)| (name, shorten::<B>(view)));
        let outputs = self.outputs.into_iter().map(|(name, view)| (name, view.map(|view| shorten_mut::<B>(view))));
        Operands { inputs: inputs.collect(), outputs: outputs.collect(), host: self.host, attempt: self.attempt }
    }

    pub(crate) fn input(&self, name: &'static str) -> Result<In<'a, B>, Error> {
        self.input_if(name).ok_or(missing(name))
    }

    pub(crate) fn input_if(&self, name: &str) -> Option<In<'a, B>> {
        self.inputs.iter().find(|(n, _)| *n == name).map(|(_, view)| *view)
    }

    pub(crate) fn host(&self, name: &'static str) -> Result<&'a Tensor, Error> {
        self.host_if(name).ok_or(missing(name))
    }

    pub(crate) fn host_if(&self, name: &str) -> Option<&'a Tensor> {
        self.host.iter().find(|(n, _)| *n == name).map(|(_, tensor)| tensor)
    }

    pub(crate) fn output(&mut self, name: &'static str) -> Result<Out<'a, B>, Error> {
        self.output_if(name).ok_or(missing(name))
    }

    pub(crate) fn output_if(&mut self, name: &str) -> Option<Out<'a, B>> {
        self.outputs.iter_mut().find(|(n, _)| *n == name).and_then(|(_, view)| view.take())
    }
}

fn missing(operand: &'static str) -> Error {
    Error::Missing { operation: "case", operand, reason: "the operation is called with it" }
}
