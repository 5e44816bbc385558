//! Where gradients go: sums that several launches add up are rounded once.

use crate::launch::Operand;
use crate::memory::Mut;
use crate::plan;
use crate::stream::SCRATCH;
use crate::{Error, Result, Wgpu, WgpuStream};
use fused_moe_core::operation::{Gradient, GradientMode};
use fused_moe_core::{DType, View};

/// Numbers in the first half of a stream's scratch: sums between two launches.
const SUMS: usize = SCRATCH / 2;
/// Numbers in its second half: what a launch tells the next one.
pub(crate) const TOLD: usize = SCRATCH - SUMS;

/// What a launch tells the next one, a number after the other.
pub(crate) fn told(scratch: &wgpu::Buffer) -> Operand<'_> {
    Operand::part(scratch, SUMS..SCRATCH, 1)
}

/// One of the launches that add to the same sums.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub(crate) number: usize,
    pub(crate) count: usize,
}

/// Sums that go somewhere, and where they are until the last launch adds to them: there, if it has room for all their
/// digits.
#[derive(Debug)]
pub(crate) struct Sums {
    /// Rows that launches take at once.
    pub(crate) rows_at_once: usize,
    columns: usize,
    scratch: Option<wgpu::Buffer>,
}

impl Sums {
    /// Of so many launches.
    ///
    /// Errors: `Binding` when not even one row fits, `OutOfMemory`.
    pub(crate) fn new(
        (wgpu, stream): (&Wgpu, &WgpuStream),
        operation: &'static str,
        to: &View<Mut<'_>>,
        launches: usize,
    ) -> Result<Self> {
        let (columns, row_bytes) = (to.cols(), to.row_stride().max(1) * to.dtype().size());
        if launches <= 1 || to.dtype() == DType::F32 {
            return Ok(Self { rows_at_once: (plan::room(wgpu) / row_bytes).max(1), columns, scratch: None });
        }
        match SUMS / columns.max(1) {
            0 => Err(Error::Binding { operation, bytes: 4 * columns as u64, limit: 4 * SUMS as u64 }),
            rows_at_once => Ok(Self { rows_at_once, columns, scratch: Some(stream.scratch()?) }),
        }
    }

    /// Of some rows of where they go, `out`.
    pub(crate) fn target<'a>(&'a self, out: Operand<'a>, (part, mode): (Part, GradientMode)) -> Target<'a> {
        let adds = mode == GradientMode::Accumulate;
        let Some(scratch) = &self.scratch else {
            return Target { out, before: None, adds: adds || part.number > 0 };
        };
        let sums = Operand::part(scratch, 0..SUMS, self.columns);
        if part.number + 1 == part.count {
            Target { out, before: Some(sums), adds: false }
        } else if part.number == 0 {
            Target { out: sums, before: adds.then_some(out), adds: false }
        } else {
            Target { out: sums, before: None, adds: true }
        }
    }
}

/// What a launch writes, and what it adds to that.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target<'a> {
    pub(crate) out: Operand<'a>,
    /// Something else that is added.
    pub(crate) before: Option<Operand<'a>>,
    /// Whether what is there is added.
    pub(crate) adds: bool,
}

/// A gradient's place and mode, if it is asked for.
pub(crate) fn wanted<'a>(gradient: &'a Option<Gradient<'_, Wgpu>>) -> Option<(&'a View<Mut<'a>>, GradientMode)> {
    gradient.as_ref().map(|gradient| (&gradient.view, gradient.mode))
}
