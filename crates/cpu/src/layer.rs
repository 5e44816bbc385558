use crate::error::Result;
use crate::memory::Memory;
use crate::{Cpu, CpuStream};
use fused_moe_core::config::LayerConfig;
use fused_moe_core::operation::Forward;
use fused_moe_core::problem::LayerProblem;
use fused_moe_core::weights::LayerWeights;
use fused_moe_core::{Layer, Options};

/// A layer prepared for this backend.
#[derive(Debug)]
pub struct CpuLayer {
    problem: LayerProblem,
}

/// Scratch of a layer.
#[derive(Debug)]
pub struct Workspace {}

impl CpuLayer {
    pub(crate) fn new(_cpu: &Cpu, config: &LayerConfig, weights: &LayerWeights<'_>, options: &Options) -> Result<Self> {
        Ok(Self { problem: LayerProblem::new(config, weights, options)? })
    }
}

impl Layer<Cpu> for CpuLayer {
    fn config(&self) -> &LayerConfig {
        &self.problem.config
    }
    fn weight_bytes(&self) -> usize {
        0
    }
    fn workspace_bytes(&self, _max_tokens: usize) -> Result<usize> {
        Ok(0)
    }
    fn workspace_in(&self, _memory: Memory, _max_tokens: usize) -> Result<Workspace> {
        Ok(Workspace {})
    }
    fn workspace(&self, _max_tokens: usize) -> Result<Workspace> {
        Ok(Workspace {})
    }
    fn explain(&self, _tokens: usize) -> String {
        String::new()
    }
    fn run(&self, _stream: &CpuStream, _call: Forward<'_, Cpu>, _workspace: &mut Workspace) -> Result<()> {
        Ok(())
    }
}
