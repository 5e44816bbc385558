//! The gradients, as methods of [`Wgpu`].

use crate::error::Result;
use crate::{Wgpu, WgpuStream};
use crate::{
    activation_backward, combine_backward, down_backward, gate_backward, gate_up_backward, losses, norm_backward,
    route_backward,
};
use fused_moe_core::BackendBackward;
use fused_moe_core::operation::*;

impl BackendBackward for Wgpu {
    fn combine_backward(&self, stream: &WgpuStream, operands: CombineBackward<'_, Self>) -> Result<()> {
        stream.whole(|| combine_backward::combine_backward(self, stream, operands))
    }

    fn down_backward(&self, stream: &WgpuStream, operands: DownBackward<'_, Self>) -> Result<()> {
        stream.whole(|| down_backward::down_backward(self, stream, operands))
    }

    fn activation_backward(&self, stream: &WgpuStream, operands: ActivationBackward<'_, Self>) -> Result<()> {
        stream.whole(|| activation_backward::activation_backward(self, stream, operands))
    }

    fn gate_up_backward(&self, stream: &WgpuStream, operands: GateUpBackward<'_, Self>) -> Result<()> {
        stream.whole(|| gate_up_backward::gate_up_backward(self, stream, operands))
    }

    fn route_backward(&self, stream: &WgpuStream, operands: RouteBackward<'_, Self>) -> Result<()> {
        stream.whole(|| route_backward::route_backward(self, stream, operands))
    }

    fn gate_backward(&self, stream: &WgpuStream, operands: GateBackward<'_, Self>) -> Result<()> {
        stream.whole(|| gate_backward::gate_backward(self, stream, operands))
    }

    fn norm_backward(&self, stream: &WgpuStream, operands: NormBackward<'_, Self>) -> Result<()> {
        stream.whole(|| norm_backward::norm_backward(self, stream, operands))
    }

    fn load_balance_loss(&self, stream: &WgpuStream, operands: LoadBalanceLoss<'_, Self>) -> Result<()> {
        stream.whole(|| losses::load_balance_loss(self, stream, operands))
    }

    fn z_loss(&self, stream: &WgpuStream, operands: ZLoss<'_, Self>) -> Result<()> {
        stream.whole(|| losses::z_loss(self, stream, operands))
    }
}
