//! down and combine of one token in one launch.

use crate::error::Result;
use crate::grouped::GroupedParams;
use crate::launch::{Tensor, launch, params};
use crate::memory::{Mut, Ref};
use crate::pack::Experts;
use crate::plan::down_combine as plan;
use crate::{Cuda, CudaStream};
use fused_moe_core::View;
use fused_moe_core::operation::{Residual, Shared};

params! {
    DownCombineParams {
        down: GroupedParams, weights: Tensor, shared: Tensor, logit: Tensor, residual: Tensor, out: Tensor,
        routed_scale: f32, shared_scale: f32,
    }
}

/// Operands of [`down_combine`].
pub(crate) struct DownCombine<'a> {
    /// `[T K, I]`, by slot; [`down_combine`] takes one token.
    pub(crate) a: View<Ref<'a>>,
    /// u32 `[T, K]`, each in range and here; for [`down_combine`] there already when the launch before began.
    pub(crate) experts: View<Ref<'a>>,
    /// f32 `[T, K]`; absent: every slot counts once.
    pub(crate) weights: Option<View<Ref<'a>>>,
    pub(crate) matrices: &'a Experts,
    pub(crate) routed_scale: f32,
    pub(crate) shared: Option<Shared<'a, Cuda>>,
    pub(crate) residual: Option<Residual<'a, Cuda>>,
    /// Written: `[T, H]`.
    pub(crate) out: View<Mut<'a>>,
}

impl DownCombine<'_> {
    /// Errors: `Misaligned`.
    pub(crate) fn params(&self) -> Result<DownCombineParams> {
        let (shared, out) = (&self.shared, Tensor::of(&self.out)?);
        Ok(DownCombineParams {
            down: GroupedParams {
                x: Tensor::of(&self.a)?,
                slot_experts: Tensor::of(&self.experts)?.data,
                rows: self.a.rows() as u64,
                ..self.matrices.down().params()
            },
            weights: Tensor::maybe(self.weights.as_ref())?,
            shared: Tensor::maybe(shared.as_ref().map(|shared| &shared.y))?,
            logit: Tensor::maybe(shared.as_ref().and_then(|shared| shared.logit.as_ref()))?,
            residual: match &self.residual {
                Some(Residual::Of(residual)) => Tensor::of(residual)?,
                Some(Residual::InPlace) => out,
                None => Tensor::default(),
            },
            out,
            routed_scale: self.routed_scale,
            shared_scale: shared.as_ref().map_or(0.0, |shared| shared.scale),
        })
    }
}

/// `out = residual + routed_scale * sum_k weights[k] * (down_k . a[k] + bias_k) + shared`, slots in order.
///
/// Errors: `Misaligned`.
pub(crate) fn down_combine(cuda: &Cuda, stream: &CudaStream, operands: &DownCombine<'_>) -> Result<()> {
    let DownCombine { a, matrices, .. } = operands;
    let (table, params) = (matrices.down(), operands.params()?);
    let (w, inner) = (table.weights(), params.down.inner);
    let sizes =
        plan::Sizes { slots: a.rows(), inner: table.inner, outputs: table.outputs, x: a.dtype(), weight: table.format };
    let aligned = |n: u64| params.down.x.aligned(n) && w.aligned(n) && inner.is_multiple_of(n);
    let plan = plan::down_combine(&sizes, aligned);
    if let Some(recorder) = cuda.recorder() {
        recorder.explain(plan.why);
    }
    launch(cuda, stream, plan.kernel, plan.grid, &params)
}
