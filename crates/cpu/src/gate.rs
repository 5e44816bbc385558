use crate::error::Result;
use crate::{Cpu, CpuStream};
use fused_moe_core::operation::{Gate, GateRoute};

pub(crate) fn gate(_cpu: &Cpu, _stream: &CpuStream, _operands: Gate<'_, Cpu>) -> Result<()> {
    Ok(())
}
pub(crate) fn gate_route(_cpu: &Cpu, _stream: &CpuStream, _operands: GateRoute<'_, Cpu>) -> Result<()> {
    Ok(())
}
