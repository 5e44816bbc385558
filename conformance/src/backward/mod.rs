//! The cases of the gradients: what a backend that trains is held to, besides [`run`](crate::run).

pub mod grouped;
pub mod layer;
pub mod routes;
pub mod rows;

use crate::cases::{Scale, Stage, id};
use crate::data::Tensor;
use crate::image::Placement;
use crate::operands::{Operands, Output, Prepared};
use crate::report::Report;
use crate::run::{Heading, Options, Progress, Verdict, judge, run_all, run_twice};
use crate::tolerance;
use fused_moe_core::operation::{Gradient, GradientMode};
use fused_moe_core::{Backend, BackendBackward, DType, Shape};

/// A case of a gradient that can be worked out and called.
pub(crate) trait CheckBackward {
    /// Works out its operands and what the reference makes of them.
    fn prepare(&self) -> Prepared;

    /// Calls the operation.
    fn call<B: BackendBackward>(
        &self,
        backend: &B,
        stream: &B::Stream,
        operands: Operands<'_, B>,
    ) -> Result<(), B::Error>;
}

/// One case.
#[derive(Clone, Debug)]
pub struct BackwardCase {
    /// The operation.
    pub stage: Stage,
    /// What is special about it, and its sizes.
    pub name: String,
    /// Formats of its operands.
    pub dtype: String,
    /// How its operands lie in memory.
    pub placement: Placement,
    /// What is to be done.
    pub operation: BackwardOperation,
}

impl BackwardCase {
    /// `stage/case/dtypes`, unique.
    pub fn id(&self) -> String {
        id(self.stage, &self.name, &self.dtype)
    }

    /// The same with operands at odd offsets, their rows apart.
    pub(crate) fn strided(self) -> Self {
        Self { name: format!("strided {}", self.name), placement: Placement::Strided, ..self }
    }
}

/// What a case does.
#[derive(Clone, Debug)]
pub enum BackwardOperation {
    /// Of the experts' matrices.
    Grouped(grouped::Grouped),
    /// Of the activation.
    Activation(rows::Activation),
    /// Of combine.
    Combine(rows::Combine),
    /// Of a norm.
    Norm(rows::Norm),
    /// Of the routing weights.
    Route(routes::Route),
    /// Of the router's product.
    Gate(routes::Gate),
    /// A loss.
    Loss(routes::Loss),
    /// A whole layer.
    Layer(Box<layer::Layer>),
}

/// All cases of all gradients.
pub fn backward_cases(scale: Scale) -> Vec<BackwardCase> {
    let mut cases = rows::cases();
    cases.extend(grouped::cases(scale));
    cases.extend(routes::cases());
    cases.extend(layer::cases());
    cases
}

/// Holds a backend's gradients against the reference, as [`run`](crate::run) holds the rest of it.
///
/// Errors: what the backend returns where it makes memory and streams.
pub fn run_backward<B: BackendBackward>(
    backend: &B,
    options: &Options,
    progress: &mut dyn FnMut(&Progress<'_>),
) -> Result<Report, B::Error> {
    let mut list = backward_cases(options.scale);
    if let Some(filter) = &options.filter {
        list.retain(|case| case.id().contains(filter));
    }
    let heading =
        |case: &BackwardCase| Heading { stage: case.stage, name: case.name.clone(), dtype: case.dtype.clone() };
    let headings: Vec<Heading> = list.iter().map(heading).collect();
    run_all(backend, options, &headings, progress, &mut |index| match &list[index].operation {
        BackwardOperation::Grouped(operation) => check(backend, &list[index], operation),
        BackwardOperation::Activation(operation) => check(backend, &list[index], operation),
        BackwardOperation::Combine(operation) => check(backend, &list[index], operation),
        BackwardOperation::Norm(operation) => check(backend, &list[index], operation),
        BackwardOperation::Route(operation) => check(backend, &list[index], operation),
        BackwardOperation::Gate(operation) => check(backend, &list[index], operation),
        BackwardOperation::Loss(operation) => check(backend, &list[index], operation),
        BackwardOperation::Layer(operation) => check(backend, &list[index], operation.as_ref()),
    })
}

fn check<B: BackendBackward, O: CheckBackward>(
    backend: &B,
    case: &BackwardCase,
    operation: &O,
) -> Result<Verdict, B::Error> {
    let prepared = operation.prepare();
    let call = |stream: &B::Stream, operands: Operands<'_, B>| operation.call(backend, stream, operands);
    Ok(run_twice(backend, case.placement, &prepared, &call)?.map(|runs| judge(&prepared, &runs)))
}

/// A gradient and what it may be off by; in a mode that adds, to what was there before.
pub(crate) fn output(
    name: &'static str,
    (dtype, mode): (DType, GradientMode),
    shape: impl Into<Shape>,
    [values, errors]: [Vec<f64>; 2],
) -> Output {
    let shape = shape.into();
    if mode == GradientMode::Assign {
        return Output::floats(name, dtype, shape, [values, errors]);
    }
    let before = crate::data::Data::new(name).of("before").normal(dtype, shape, 1.0);
    let sums: Vec<f64> = values.iter().zip(before.as_floats()).map(|(d, before)| d + before).collect();
    let errors = errors.iter().zip(&values).zip(before.as_floats());
    let errors = errors.map(|((e, d), before)| e + tolerance::sum(1, d.abs() + before.abs())).collect();
    let exact = Tensor::floats(dtype, shape, before.as_floats().iter().copied());
    Output::floats(name, dtype, shape, [sums, errors]).over(exact)
}

/// The operand of a gradient, if the case has it.
pub(crate) fn gradient<'a, B: Backend>(
    operands: &mut Operands<'a, B>,
    name: &str,
    mode: GradientMode,
) -> Option<Gradient<'a, B>> {
    operands.output_if(name).map(|view| Gradient { view, mode })
}

/// Both ways of storing a gradient, as they are named.
pub(crate) const MODES: [(&str, GradientMode); 2] =
    [("", GradientMode::Assign), ("accumulate ", GradientMode::Accumulate)];
