use crate::Cpu;
use crate::error::Result;
use fused_moe_core::operation::{Accumulate, Combine, Zero};

pub(crate) fn combine(_cpu: &Cpu, _operands: Combine<'_, Cpu>) -> Result<()> {
    Ok(())
}
pub(crate) fn zero(_cpu: &Cpu, _operands: Zero<'_, Cpu>) -> Result<()> {
    Ok(())
}
pub(crate) fn accumulate(_cpu: &Cpu, _operands: Accumulate<'_, Cpu>) -> Result<()> {
    Ok(())
}
