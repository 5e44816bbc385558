use crate::Cpu;
use crate::error::Result;
use fused_moe_core::operation::Down;

pub(crate) fn down(_cpu: &Cpu, _operands: Down<'_, Cpu>) -> Result<()> {
    Ok(())
}
