use crate::error::Result;
use crate::{Cpu, CpuStream};
use fused_moe_core::operation::{GatherWeights, Route};

pub(crate) fn route(_cpu: &Cpu, _stream: &CpuStream, _operands: Route<'_, Cpu>) -> Result<()> {
    Ok(())
}
pub(crate) fn gather_weights(_cpu: &Cpu, _stream: &CpuStream, _operands: GatherWeights<'_, Cpu>) -> Result<()> {
    Ok(())
}
