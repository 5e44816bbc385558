//! The gradients, as methods of [`Cpu`].

use crate::error::Result;
use crate::plan::operand;
use crate::{Cpu, CpuStream};
use crate::{
    activation_backward, combine_backward, down_backward, gate_backward, gate_up_backward, losses, route_backward,
};
use fused_moe_core::BackendBackward;
use fused_moe_core::DType;
use fused_moe_core::operation::*;

impl BackendBackward for Cpu {
    fn between(&self, x: DType, matrices: DType) -> DType {
        operand(x, matrices, self.isa())
    }

    fn combine_backward(&self, _stream: &CpuStream, operands: CombineBackward<'_, Self>) -> Result<()> {
        combine_backward::combine_backward(self, operands)
    }

    fn down_backward(&self, _stream: &CpuStream, operands: DownBackward<'_, Self>) -> Result<()> {
        down_backward::down_backward(self, operands)
    }

    fn activation_backward(&self, _stream: &CpuStream, operands: ActivationBackward<'_, Self>) -> Result<()> {
        activation_backward::activation_backward(self, operands)
    }

    fn gate_up_backward(&self, _stream: &CpuStream, operands: GateUpBackward<'_, Self>) -> Result<()> {
        gate_up_backward::gate_up_backward(self, operands)
    }

    fn route_backward(&self, _stream: &CpuStream, operands: RouteBackward<'_, Self>) -> Result<()> {
        route_backward::route_backward(self, operands)
    }

    fn gate_backward(&self, _stream: &CpuStream, operands: GateBackward<'_, Self>) -> Result<()> {
        gate_backward::gate_backward(self, operands)
    }

    fn norm_backward(&self, _stream: &CpuStream, operands: NormBackward<'_, Self>) -> Result<()> {
        gate_backward::norm_backward(self, operands)
    }

    fn load_balance_loss(&self, _stream: &CpuStream, operands: LoadBalanceLoss<'_, Self>) -> Result<()> {
        losses::load_balance_loss(self, operands)
    }

    fn z_loss(&self, _stream: &CpuStream, operands: ZLoss<'_, Self>) -> Result<()> {
        losses::z_loss(self, operands)
    }
}
