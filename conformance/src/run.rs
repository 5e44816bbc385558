//! Runs cases on a backend: twice each, into poisoned outputs between sentinels, from inputs that must stay as they are.

use crate::cases::{Case, Operation, Scale, Stage, cases, id};
use crate::compare::{self, Comparison};
use crate::data::{Values, decode};
use crate::image::{Placement, Window};
use crate::operands::{Buffer, Expected, Operands, Output, Prepared};
use crate::report::{CaseResult, Outcome, Report};
use crate::stage::Check;
use fused_moe_core::{Backend, DType, Status, Stream};
use std::time::Instant;

/// What an output holds before the first and the second run: not a number, and a large number.
const POISON: [u8; 2] = [0xff, 0x5a];

/// Which cases are run, and what may fail.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Runs the cases whose name contains this; a name is `stage/case/dtypes`.
    pub filter: Option<String>,
    /// How many cases, of what sizes.
    pub scale: Scale,
    /// Ends with the first failure.
    pub fail_fast: bool,
    /// What the backend does not do: beginnings of the names of cases that may return an error. One that passes all the
    /// same is a failure.
    pub gaps: Vec<String>,
}

/// How far a run has come; told before each case.
#[derive(Clone, Debug)]
pub struct Progress<'a> {
    /// The case that begins.
    pub case: &'a str,
    /// Its place among those that are run.
    pub index: usize,
    /// How many are run.
    pub count: usize,
    /// Failures so far.
    pub failures: usize,
}

/// Holds a backend against the reference.
///
/// Errors: what the backend returns where it makes memory and streams; what an operation returns is a failure of its
/// case.
pub fn run<B: Backend>(
    backend: &B,
    options: &Options,
    progress: &mut dyn FnMut(&Progress<'_>),
) -> Result<Report, B::Error> {
    let mut list = cases(options.scale);
    if let Some(filter) = &options.filter {
        list.retain(|case| case.id().contains(filter));
    }
    let headings: Vec<Heading> = list.iter().map(Heading::of).collect();
    run_all(backend, options, &headings, progress, &mut |index| run_case(backend, &list[index]))
}

/// What a case is called in a report.
pub(crate) struct Heading {
    pub(crate) stage: Stage,
    pub(crate) name: String,
    pub(crate) dtype: String,
}

impl Heading {
    fn of(case: &Case) -> Self {
        Self { stage: case.stage, name: case.name.clone(), dtype: case.dtype.clone() }
    }

    fn id(&self) -> String {
        id(self.stage, &self.name, &self.dtype)
    }
}

/// Runs a list of cases, each by its place in the list.
pub(crate) fn run_all<B: Backend>(
    backend: &B,
    options: &Options,
    list: &[Heading],
    progress: &mut dyn FnMut(&Progress<'_>),
    case: &mut dyn FnMut(usize) -> Result<Verdict, B::Error>,
) -> Result<Report, B::Error> {
    let mut report = Report::new(backend.name(), backend.describe());
    for (index, heading) in list.iter().enumerate() {
        let id = heading.id();
        progress(&Progress { case: &id, index, count: list.len(), failures: report.failures().count() });
        let gap = options.gaps.iter().any(|gap| id.starts_with(gap.as_str()));
        let start = Instant::now();
        let verdict = case(index)?;
        report.results.push(result(heading, verdict, gap, start.elapsed().as_secs_f64()));
        if options.fail_fast && report.failures().next().is_some() {
            break;
        }
    }
    Ok(report)
}

/// What came of one case: the comparison, or what the operation returned.
pub(crate) type Verdict = Result<Comparison, String>;

fn result(case: &Heading, verdict: Verdict, gap: bool, seconds: f64) -> CaseResult {
    let (outcome, comparison) = match (verdict, gap) {
        (Ok(comparison), false) => {
            (if comparison.failure.is_some() { Outcome::Failed } else { Outcome::Passed }, comparison)
        }
        (Ok(comparison), true) => {
            let failure = comparison.failure.or(Some("is declared a gap, but runs".into()));
            (Outcome::Failed, Comparison { failure, ..comparison })
        }
        (Err(message), true) => (Outcome::Gap, Comparison { failure: Some(message), ..Comparison::default() }),
        (Err(message), false) => (Outcome::Failed, Comparison::wrong(message)),
    };
    CaseResult {
        stage: case.stage,
        case: case.name.clone(),
        dtype: case.dtype.clone(),
        outcome,
        max_error: comparison.error,
        tolerance: comparison.tolerance,
        ratio: comparison.ratio,
        message: comparison.failure.map(|failure| format!("{}: {failure}", case.id())),
        seconds,
    }
}

fn run_case<B: Backend>(backend: &B, case: &Case) -> Result<Verdict, B::Error> {
    match &case.operation {
        Operation::Gate(operation) => check(backend, case, operation),
        Operation::Route(operation) => check(backend, case, operation),
        Operation::GateRoute(operation) => check(backend, case, operation),
        Operation::GatherWeights(operation) => check(backend, case, operation),
        Operation::Permute(operation) => check(backend, case, operation),
        Operation::DropOverflow(operation) => check(backend, case, operation),
        Operation::TileSchedule(operation) => check(backend, case, operation),
        Operation::GateUp(operation) => check(backend, case, operation),
        Operation::Activation(operation) => check(backend, case, operation),
        Operation::Down(operation) => check(backend, case, operation),
        Operation::Combine(operation) => check(backend, case, operation),
        Operation::Linear(operation) => check(backend, case, operation),
        Operation::Zero(operation) => check(backend, case, operation),
        Operation::Accumulate(operation) => check(backend, case, operation),
        Operation::ExpertLoop(operation) => check(backend, case, operation),
        Operation::Layer(operation) => check(backend, case, operation.as_ref()),
    }
}

fn check<B: Backend, O: Check>(backend: &B, case: &Case, operation: &O) -> Result<Verdict, B::Error> {
    let call = |stream: &B::Stream, operands: Operands<'_, B>| operation.call(backend, stream, operands);
    let mut prepared = operation.prepare();
    let runs = match run_twice(backend, case.placement, &prepared, &call)? {
        Ok(runs) => runs,
        Err(message) => return Ok(Err(message)),
    };
    if let Some(run) = runs.first() {
        let found = run.values(&prepared);
        operation.resolve(&mut prepared, &found);
    }
    Ok(Ok(judge(&prepared, &runs)))
}

/// How an operation is called with the operands of a case.
pub(crate) type Call<'c, B> =
    dyn Fn(&<B as Backend>::Stream, Operands<'_, B>) -> Result<(), <B as Backend>::Error> + 'c;

/// Two runs from the same inputs, or what the operation returned.
pub(crate) fn run_twice<B: Backend>(
    backend: &B,
    placement: Placement,
    prepared: &Prepared,
    call: &Call<'_, B>,
) -> Result<Result<Vec<Run>, String>, B::Error> {
    let mut inputs = Vec::with_capacity(prepared.inputs.len());
    for (index, input) in prepared.inputs.iter().enumerate() {
        inputs.push(Buffer::input(backend, input, placement, index)?);
    }
    let mut runs = Vec::with_capacity(2);
    for attempt in 0..2 {
        match attempt_case(backend, placement, call, (prepared, &inputs), attempt)? {
            Ok(run) => runs.push(run),
            Err(message) => return Ok(Err(message)),
        }
    }
    Ok(Ok(runs))
}

/// What one run of a case left behind.
pub(crate) struct Run {
    /// What the stream reported, and what it reported when it was asked again.
    pub(crate) status: [Status; 2],
    /// Of each operand that is only read and holds something else now: its name.
    pub(crate) changed: Vec<&'static str>,
    /// Of each output: where it lay, its buffer before and after.
    pub(crate) images: Vec<(Window, Vec<u8>, Vec<u8>)>,
}

impl Run {
    fn values(&self, prepared: &Prepared) -> Vec<(&'static str, Values)> {
        let named = prepared.outputs.iter().zip(&self.images);
        named.map(|(output, (window, _, after))| (output.name, decode(output.dtype, &window.elements(after)))).collect()
    }
}

fn attempt_case<B: Backend>(
    backend: &B,
    placement: Placement,
    call: &Call<'_, B>,
    (prepared, inputs): (&Prepared, &[Buffer<B>]),
    attempt: usize,
) -> Result<Result<Run, String>, B::Error> {
    let stream = backend.stream()?;
    let mut outputs = Vec::with_capacity(prepared.outputs.len());
    for (index, output) in prepared.outputs.iter().enumerate() {
        let placement = if output.contiguous { Default::default() } else { placement };
        let window = Window::new(output.dtype, output.shape, placement, inputs.len() + index);
        let before = match &output.initial {
            Some(initial) => window.image(initial.bytes()),
            None => window.poisoned(POISON[attempt]),
        };
        outputs.push(Buffer::new(backend, output.name, window, before)?);
    }
    let operands = Operands::new(inputs, &mut outputs, &prepared.host, attempt)?;
    if let Err(error) = call(&stream, operands) {
        return Ok(Err(error.to_string()));
    }
    let status = [stream.status()?, stream.status()?];
    let mut images = Vec::with_capacity(outputs.len());
    for output in outputs {
        let mut after = vec![0; output.before.len()];
        backend.download(&stream, &output.memory, &mut after)?;
        images.push((output.window, output.before, after));
    }
    let mut changed = Vec::new();
    for input in inputs {
        let mut after = vec![0; input.before.len()];
        backend.download(&stream, &input.memory, &mut after)?;
        if after != input.before {
            changed.push(input.name);
        }
    }
    Ok(Ok(Run { status, changed, images }))
}

/// Everything that can be wrong with what the runs left behind.
pub(crate) fn judge(prepared: &Prepared, runs: &[Run]) -> Comparison {
    let mut verdict = Comparison::default();
    for run in runs {
        let [status, again] = run.status;
        if status != prepared.status {
            verdict = verdict.worse(Comparison::wrong(format!("status: expected {}, got {status}", prepared.status)));
        }
        if !again.is_ok() {
            verdict = verdict.worse(Comparison::wrong(format!("status: still {again} after it was read")));
        }
        for name in &run.changed {
            verdict = verdict.worse(Comparison::wrong(format!("{name}: is only to be read and was overwritten")));
        }
        for (output, (window, before, after)) in prepared.outputs.iter().zip(&run.images) {
            if let Some(message) = window.trespass(output.written, before, after) {
                verdict = verdict.worse(Comparison::wrong(format!("{}: {message}", output.name)));
            }
            verdict = verdict.worse(compare_output(output, &window.elements(after)));
        }
    }
    if let [first, second] = runs {
        for (output, (one, two)) in prepared.outputs.iter().zip(first.images.iter().zip(&second.images)) {
            let written = |(window, _, after): &(Window, Vec<u8>, Vec<u8>)| {
                let mut elements = window.elements(after);
                elements.truncate(output.written * output.shape.cols() * output.dtype.size());
                elements
            };
            if output.expected != Expected::Anything && written(one) != written(two) {
                let message = format!("{}: two runs differ in their bits, or leave elements unwritten", output.name);
                verdict = verdict.worse(Comparison::wrong(message));
            }
        }
    }
    verdict
}

fn compare_output(output: &Output, elements: &[u8]) -> Comparison {
    let count = output.written * output.shape.cols();
    let found = decode(output.dtype, &elements[..count * output.dtype.size()]);
    match (&output.expected, &found) {
        (Expected::Anything, _) => Comparison::default(),
        (Expected::Ids(expected), Values::Ids(found)) => match expected.get(..count) {
            Some(expected) => compare::ids(output.name, output.shape, [expected, found]),
            None => compare::ids(output.name, output.shape, [expected, found]),
        },
        (Expected::Floats { values, allowed }, Values::Floats(found)) => {
            let first = |of: &[f64]| of.get(..count).unwrap_or(of).to_vec();
            let (values, allowed) = (first(values), first(allowed));
            compare::floats(output.name, output.shape, [&values, &allowed, found])
        }
        _ => Comparison::wrong(format!("{}: {} where other numbers belong", output.name, DType::U32)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Tensor, encode};

    fn prepared() -> Prepared {
        let mut prepared = Prepared::default();
        let errors = vec![0.0; 6];
        prepared.output(Output::floats("y", DType::F32, [3, 2], [vec![1.0, 2.0, 3.0, 4.0, 0.0, 0.0], errors]).only(2));
        prepared.output(Output::ids("experts", [2, 1], vec![7, u32::MAX]));
        prepared
    }

    fn right(attempt: usize) -> Run {
        let y = Window::new(DType::F32, [3, 2].into(), Placement::Strided, 0);
        let ids = Window::new(DType::U32, [2, 1].into(), Placement::Strided, 1);
        let before = [y.poisoned(POISON[attempt]), ids.poisoned(POISON[attempt])];
        let mut elements = encode(DType::F32, &Values::Floats(vec![1.0, 2.0, 3.0, 4.0]));
        elements.extend([POISON[attempt]; 8]);
        let after = [y.image(&elements), ids.image(Tensor::ids([2, 1], vec![7, u32::MAX]).bytes())];
        let [y_before, ids_before] = before;
        let [y_after, ids_after] = after;
        Run {
            status: [Status::OK; 2],
            changed: Vec::new(),
            images: vec![(y, y_before, y_after), (ids, ids_before, ids_after)],
        }
    }

    fn failure(change: impl Fn(&mut Run, usize)) -> String {
        let runs: Vec<Run> = (0..2)
            .map(|attempt| {
                let mut run = right(attempt);
                change(&mut run, attempt);
                run
            })
            .collect();
        judge(&prepared(), &runs).failure.unwrap_or_default()
    }

    /// Puts an element of output `index` into the buffer after the run.
    fn put(run: &mut Run, index: usize, element: usize, bytes: [u8; 4]) {
        let (window, _, after) = &mut run.images[index];
        let (row, column) = (element / window.shape.cols(), element % window.shape.cols());
        let at = window.offset + (row * window.row_stride + column) * 4;
        after[at..at + 4].copy_from_slice(&bytes);
    }

    #[test]
    fn right_passes() {
        assert_eq!(failure(|_, _| {}), "");
    }

    #[test]
    fn a_wrong_element() {
        assert!(failure(|run, _| put(run, 0, 3, 4.01f32.to_ne_bytes())).starts_with("y[1, 1]: expected 4e0"));
        assert!(failure(|run, _| put(run, 0, 0, f32::NAN.to_ne_bytes())).contains("NaN"));
    }

    #[test]
    fn a_wrong_id() {
        assert!(failure(|run, _| put(run, 1, 0, 8u32.to_ne_bytes())).starts_with("experts[0, 0]: expected 7, got 8"));
    }

    #[test]
    fn an_element_that_is_not_written() {
        let unwritten = |run: &mut Run, attempt: usize| put(run, 1, 1, [POISON[attempt]; 4]);
        assert!(failure(unwritten).starts_with("experts[1, 0]: expected none"));
        assert!(failure(|run, attempt| put(run, 0, 1, [POISON[attempt]; 4])).starts_with("y[0, 1]"));
    }

    #[test]
    fn a_row_that_is_to_be_left_alone() {
        assert!(failure(|run, _| put(run, 0, 4, 0f32.to_ne_bytes())).contains("row 2, column 0 is to be left alone"));
    }

    #[test]
    fn a_broken_sentinel() {
        let before_first = |run: &mut Run, _: usize| {
            let (window, _, after) = &mut run.images[0];
            after[window.offset - 4] = 0;
        };
        assert!(failure(before_first).contains("before the operand"));
        let gap = |run: &mut Run, attempt: usize| {
            let (window, _, after) = &mut run.images[0];
            after[window.offset + 8] = attempt as u8;
        };
        assert!(failure(gap).contains("the gap after row 0"));
    }

    #[test]
    fn an_operand_that_is_only_read() {
        assert!(failure(|run, _| run.changed.push("x")).starts_with("x: is only to be read"));
    }

    #[test]
    fn runs_that_differ() {
        let last_bit = |run: &mut Run, attempt: usize| {
            put(run, 0, 3, (4.0f32.to_bits() + attempt as u32).to_ne_bytes());
        };
        let mut prepared = prepared();
        if let Some(Expected::Floats { allowed, .. }) = prepared.expected("y") {
            allowed.fill(0.1);
        }
        let runs: Vec<Run> = (0..2)
            .map(|attempt| {
                let mut run = right(attempt);
                last_bit(&mut run, attempt);
                run
            })
            .collect();
        assert!(judge(&prepared, &runs).failure.unwrap_or_default().contains("two runs differ"));
    }

    #[test]
    fn a_wrong_status() {
        assert!(failure(|run, _| run.status[0] = Status::NO_FINITE_SCORE).starts_with("status: expected ok"));
        assert!(failure(|run, _| run.status[1] = Status::NO_FINITE_SCORE).contains("after it was read"));
    }

    #[test]
    fn gaps() {
        let case = cases(Scale::Quick).swap_remove(0);
        let fine = || Ok(Comparison::default());
        assert_eq!(result(&Heading::of(&case), fine(), false, 0.0).outcome, Outcome::Passed);
        assert_eq!(result(&Heading::of(&case), fine(), true, 0.0).outcome, Outcome::Failed);
        assert_eq!(result(&Heading::of(&case), Err("unsupported".into()), true, 0.0).outcome, Outcome::Gap);
        assert_eq!(result(&Heading::of(&case), Err("unsupported".into()), false, 0.0).outcome, Outcome::Failed);
    }
}
