use crate::error::Result;
use crate::{Cpu, CpuStream};
use fused_moe_core::operation::{Permute, TileSchedule};

pub(crate) fn permute(_cpu: &Cpu, _stream: &CpuStream, _operands: Permute<'_, Cpu>) -> Result<()> {
    Ok(())
}
pub(crate) fn tile_schedule(_operands: TileSchedule<'_, Cpu>) -> Result<()> {
    Ok(())
}
