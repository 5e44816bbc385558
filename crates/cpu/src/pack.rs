use crate::Cpu;
use crate::error::Result;
use fused_moe_core::weights::ExpertWeights;

/// Expert matrices as this backend reads them.
#[derive(Debug)]
pub struct Experts {}

impl Experts {
    pub(crate) fn new(_cpu: &Cpu, _weights: &ExpertWeights<'_>) -> Result<Self> {
        Ok(Self {})
    }
}
