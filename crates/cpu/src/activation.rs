use crate::Cpu;
use crate::error::Result;
use fused_moe_core::operation::Activate;

pub(crate) fn activation(_cpu: &Cpu, _operands: Activate<'_, Cpu>) -> Result<()> {
    Ok(())
}
