use crate::error::Result;
use crate::launch::{Tensor, launch, params};
use crate::{Cuda, CudaStream, plan};
use fused_moe_core::DType;
use fused_moe_core::operation::{Combine, Residual, SlotRows};

params! {
    CombineParams {
        y: Tensor, slot_row: Tensor, weights: Tensor, shared: Tensor, factor: Tensor, logit: Tensor, residual: Tensor,
        norm_weight: Tensor, normed: Tensor, out: Tensor, copied: Tensor, experts: Tensor, tokens: u64, hidden: u64,
        rows: u64, top_k: u32, copies_first: u32, copies_end: u32, routed_scale: f32, shared_scale: f32, eps: f32,
        early: u32, zero: u32,
    }
}

/// What the kernel is specialised by: the experts' outputs, elements and slots that a thread reads at once, whether rows are
/// too many to stay in the cache, and what else there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct CombineKernel {
    pub(crate) y: DType,
    pub(crate) vector: u8,
    pub(crate) slots: u8,
    pub(crate) streams: bool,
    pub(crate) copies: bool,
    pub(crate) norm: bool,
    pub(crate) stash: bool,
}

impl CombineKernel {
    pub(crate) fn defines(self) -> Vec<(&'static str, String)> {
        vec![
            ("Y_T", self.y.to_string()),
            ("VEC", self.vector.to_string()),
            ("SLOTS", self.slots.to_string()),
            ("STREAMS", self.streams.to_string()),
            ("COPIES", self.copies.to_string()),
            ("NORM", self.norm.to_string()),
            ("STASH", self.stash.to_string()),
        ]
    }

    /// Those of every plan for outputs in this format, with copies or without.
    pub(crate) fn all(y: DType) -> Vec<Self> {
        let mut all = Vec::new();
        let widest = plan::combine_vector(y);
        for (norm, stash, widest) in [(false, false, widest), (true, false, 4), (true, true, 4)] {
            for vector in [1, 4, 8].into_iter().filter(|&vector| vector <= widest) {
                for (slots, streams) in [(2, false), (2, true), (4, false), (4, true), (8, false), (8, true)] {
                    let copies = !streams;
                    all.push(Self { y, vector, slots, streams, copies, norm, stash });
                }
            }
        }
        all
    }
}

impl CombineParams {
    /// Whether groups of so many elements may be read and written at once.
    fn aligned(&self, elements: u64) -> bool {
        let vector = Tensor { stride: 0, ..self.norm_weight };
        [self.y, self.shared, self.residual, vector, self.normed, self.out, self.copied]
            .iter()
            .all(|t| t.aligned(elements))
    }
}

pub(crate) fn combine(cuda: &Cuda, stream: &CudaStream, operands: Combine<'_, Cuda>) -> Result<()> {
    combine_of(cuda, stream, operands, false)
}

/// The same; `early` says that slots, weights and experts are older than the launch before.
pub(crate) fn combine_of(cuda: &Cuda, stream: &CudaStream, operands: Combine<'_, Cuda>, early: bool) -> Result<()> {
    let problem = operands.problem()?;
    let (y, slot_row, rows) = match &operands.rows {
        SlotRows::Slots(y) => (Tensor::of(y)?, Tensor::default(), y.rows()),
        SlotRows::Permuted { y, slot_row } => (Tensor::of(y)?, Tensor::of(slot_row)?, y.rows()),
    };
    let out = Tensor::of(&operands.out)?;
    let (shared, norm, copies) = (operands.shared.as_ref(), operands.norm.as_ref(), operands.copies.as_ref());
    let column = |view: Option<_>| view.map_or(Ok(Tensor::default()), Tensor::column);
    let params = CombineParams {
        y,
        slot_row,
        weights: Tensor::maybe(operands.weights.as_ref())?,
        shared: Tensor::maybe(shared.map(|shared| &shared.y))?,
        factor: column(shared.and_then(|shared| shared.factor.as_ref()))?,
        logit: column(shared.and_then(|shared| shared.logit.as_ref()))?,
        residual: match &operands.residual {
            Some(Residual::Of(residual)) => Tensor::of(residual)?,
            Some(Residual::InPlace) => out,
            None => Tensor::default(),
        },
        norm_weight: Tensor::maybe(norm.and_then(|norm| norm.weight.as_ref()))?,
        normed: Tensor::maybe(norm.map(|norm| &norm.out))?,
        out,
        tokens: problem.tokens as u64,
        hidden: problem.hidden as u64,
        rows: rows as u64,
        top_k: problem.top_k as u32,
        copied: Tensor::maybe(copies.map(|copies| &copies.x))?,
        experts: Tensor::maybe(copies.map(|copies| &copies.experts))?,
        copies_first: copies.map_or(0, |copies| copies.first as u32),
        copies_end: copies.map_or(0, |copies| copies.end as u32),
        routed_scale: operands.routed_scale,
        shared_scale: shared.map_or(0.0, |shared| shared.scale),
        eps: norm.map_or(0.0, |norm| norm.eps),
        early: early.into(),
        zero: 0,
    };
    let plan = plan::combine(&problem, [copies.is_some(), norm.is_some()], |n| params.aligned(n), cuda.numbers());
    launch(cuda, stream, plan.kernel, plan.grid, &params)
}
