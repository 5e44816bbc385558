//! The gradients, as methods of [`Cuda`].

use crate::error::Result;
use crate::launch::Tensor;
use crate::{Cuda, CudaStream};
use crate::{
    activation_backward, combine_backward, down_backward, gate_backward, gate_up_backward, losses, route_backward,
};
use fused_moe_core::operation::*;
use fused_moe_core::{BackendBackward, DType};

impl BackendBackward for Cuda {
    fn between(&self, x: DType, matrices: DType) -> DType {
        if x == matrices && x.size() == 2 { x } else { DType::F32 }
    }

    fn combine_backward(&self, stream: &CudaStream, operands: CombineBackward<'_, Self>) -> Result<()> {
        combine_backward::combine_backward(self, stream, operands)
    }

    fn down_backward(&self, stream: &CudaStream, operands: DownBackward<'_, Self>) -> Result<()> {
        down_backward::down_backward(self, stream, &operands)
    }

    fn activation_backward(&self, stream: &CudaStream, operands: ActivationBackward<'_, Self>) -> Result<()> {
        activation_backward::activation_backward(self, stream, operands)
    }

    fn activation_weights_backward(
        &self,
        stream: &CudaStream,
        operands: ActivationWeightsBackward<'_, Self>,
    ) -> Result<bool> {
        activation_backward::activation_weights_backward(self, stream, operands)
    }

    fn gate_up_backward(&self, stream: &CudaStream, operands: GateUpBackward<'_, Self>) -> Result<()> {
        gate_up_backward::gate_up_backward(self, stream, &operands)
    }

    fn route_backward(&self, stream: &CudaStream, operands: RouteBackward<'_, Self>) -> Result<()> {
        route_backward::route_backward(self, stream, &operands)
    }

    fn gate_backward(&self, stream: &CudaStream, operands: GateBackward<'_, Self>) -> Result<()> {
        gate_backward::gate_backward(self, stream, &operands)
    }

    fn norm_backward(&self, stream: &CudaStream, operands: NormBackward<'_, Self>) -> Result<()> {
        gate_backward::norm_backward(self, stream, &operands)
    }

    fn load_balance_loss(&self, stream: &CudaStream, operands: LoadBalanceLoss<'_, Self>) -> Result<()> {
        losses::load_balance_loss(self, stream, operands)
    }

    fn z_loss(&self, stream: &CudaStream, operands: ZLoss<'_, Self>) -> Result<()> {
        losses::z_loss(self, stream, &operands)
    }
}

/// Where a gradient goes: the operand, and whether it is added to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Target {
    pub(crate) out: Tensor,
    pub(crate) accumulate: u32,
}

impl Target {
    pub(crate) fn of(gradient: &Gradient<'_, Cuda>) -> Result<Self> {
        let accumulate = gradient.mode == GradientMode::Accumulate;
        Ok(Self { out: Tensor::of(&gradient.view)?, accumulate: accumulate.into() })
    }

    pub(crate) fn maybe(gradient: &Option<Gradient<'_, Cuda>>) -> Result<Option<Self>> {
        gradient.as_ref().map(Self::of).transpose()
    }

    /// A vector or column.
    pub(crate) fn column(gradient: &Gradient<'_, Cuda>) -> Result<Self> {
        Ok(Self { out: Tensor::column(&gradient.view)?, ..Self::of(gradient)? })
    }

    /// What replaces what was there.
    pub(crate) fn assign(out: Tensor) -> Self {
        Self { out, accumulate: 0 }
    }
}
