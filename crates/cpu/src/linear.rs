use crate::Cpu;
use crate::error::Result;
use fused_moe_core::operation::Linear;

pub(crate) fn linear(_cpu: &Cpu, _operands: Linear<'_, Cpu>) -> Result<()> {
    Ok(())
}
