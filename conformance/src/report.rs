//! What came of a run.

use crate::cases::Stage;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;

/// What came of all cases.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Name of the backend.
    pub backend: String,
    /// The device in words.
    pub device: String,
    /// Case by case.
    pub results: Vec<CaseResult>,
}

/// What came of one case.
#[derive(Clone, Debug, Serialize)]
pub struct CaseResult {
    /// The operation.
    pub stage: Stage,
    /// Name of the case.
    pub case: String,
    /// Formats of its operands.
    pub dtype: String,
    /// Whether it is right.
    pub outcome: Outcome,
    /// The error where it is worst against the tolerance, as a part of the largest expected value.
    pub max_error: f64,
    /// The tolerance there, likewise.
    pub tolerance: f64,
    /// The error as a part of the tolerance.
    pub ratio: f64,
    /// Where and what, if anything is wrong or missing; names the case.
    pub message: Option<String>,
    /// How long it took, reference included.
    pub seconds: f64,
}

/// What came of one case, in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Within the tolerance, in every run the same.
    Passed,
    /// Wrong, or an error that was not declared.
    Failed,
    /// Declared as missing, and missing.
    Gap,
}

/// What came of the cases of one stage and format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Cases.
    pub cases: usize,
    /// Of them failed.
    pub failed: usize,
    /// Of them declared as missing.
    pub gaps: usize,
    /// The largest finite error, as a part of the largest expected value.
    pub max_error: f64,
    /// The tolerance where that was.
    pub tolerance: f64,
    /// The largest finite error as a part of its tolerance.
    pub ratio: f64,
}

impl Report {
    /// Without results yet.
    pub fn new(backend: impl Into<String>, device: impl Into<String>) -> Self {
        Self { backend: backend.into(), device: device.into(), results: Vec::new() }
    }

    /// Whether no case failed and there was one at least.
    pub fn passed(&self) -> bool {
        !self.results.is_empty() && self.failures().next().is_none()
    }

    /// The cases that failed.
    pub fn failures(&self) -> impl Iterator<Item = &CaseResult> {
        self.results.iter().filter(|result| result.outcome == Outcome::Failed)
    }

    /// By stage and format, in the order of the stages.
    pub fn summary(&self) -> BTreeMap<(Stage, String), Summary> {
        let mut table: BTreeMap<_, Summary> = BTreeMap::new();
        for result in &self.results {
            let line = table.entry((result.stage, result.dtype.clone())).or_default();
            line.cases += 1;
            line.failed += usize::from(result.outcome == Outcome::Failed);
            line.gaps += usize::from(result.outcome == Outcome::Gap);
            if result.max_error.is_finite() && result.max_error >= line.max_error {
                (line.max_error, line.tolerance) = (result.max_error, result.tolerance);
            }
            if result.ratio.is_finite() {
                line.ratio = line.ratio.max(result.ratio);
            }
        }
        table
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} ({})", self.backend, self.device)?;
        let columns = ["stage", "operands", "cases", "failed", "gaps", "error", "tolerance", "error/tolerance"];
        let [stage, dtype, cases, failed, gaps, error, tolerance, ratio] = columns;
        writeln!(f, "{stage:19} {dtype:18} {cases:>5} {failed:>6} {gaps:>4} {error:>9} {tolerance:>9} {ratio:>15}")?;
        for ((stage, dtype), line) in self.summary() {
            let Summary { cases, failed, gaps, max_error, tolerance, ratio } = line;
            let stage = stage.name();
            writeln!(
                f,
                "{stage:19} {dtype:18} {cases:>5} {failed:>6} {gaps:>4} {max_error:>9.1e} {tolerance:>9.1e} {ratio:>15.2}"
            )?;
        }
        for failure in self.failures() {
            writeln!(f, "FAILED {}", failure.message.as_deref().unwrap_or(&failure.case))?;
        }
        let seconds: f64 = self.results.iter().map(|result| result.seconds).sum();
        let gaps = self.results.iter().filter(|result| result.outcome == Outcome::Gap).count();
        let failed = self.failures().count();
        let passed = self.results.len() - failed - gaps;
        write!(f, "{passed} passed, {failed} failed, {gaps} gaps, {seconds:.1} s")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(outcome: Outcome, error: f64) -> CaseResult {
        CaseResult {
            stage: Stage::Gate,
            case: "T=1".into(),
            dtype: "f32".into(),
            outcome,
            max_error: error,
            tolerance: 1e-6,
            ratio: error / 1e-6,
            message: (outcome == Outcome::Failed).then(|| "gate/T=1/f32: wrong".into()),
            seconds: 0.5,
        }
    }

    #[test]
    fn summary_and_table() {
        let mut report = Report::new("cpu", "2 threads");
        assert!(!report.passed());
        report.results.push(result(Outcome::Passed, 5e-7));
        report.results.push(result(Outcome::Gap, 0.0));
        assert!(report.passed());
        report.results.push(result(Outcome::Failed, f64::INFINITY));
        assert!(!report.passed());
        let summary = report.summary();
        let line = summary[&(Stage::Gate, "f32".to_string())];
        assert_eq!((line.cases, line.failed, line.gaps, line.max_error), (3, 1, 1, 5e-7));
        let table = report.to_string();
        assert!(table.contains("FAILED gate/T=1/f32: wrong") && table.ends_with("1 passed, 1 failed, 1 gaps, 1.5 s"));
        assert!(serde_json::to_string(&report).unwrap().contains(r#""outcome":"passed""#));
    }
}
