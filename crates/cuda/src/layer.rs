use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::{Cuda, CudaStream};
use fused_moe_core::Layer;
use fused_moe_core::config::LayerConfig;
use fused_moe_core::operation::Forward;

/// Expert matrices as the kernels read them.
#[derive(Debug)]
pub struct Experts {}

/// Scratch of a layer.
#[derive(Debug)]
pub struct Workspace {}

/// A layer prepared for this backend.
#[derive(Debug)]
pub struct CudaLayer {
    config: LayerConfig,
}

pub(crate) fn unsupported<T>(operation: &'static str) -> Result<T> {
    Err(Error::Unsupported { operation, reason: "this backend has the routing stages only" })
}

impl Layer<Cuda> for CudaLayer {
    fn config(&self) -> &LayerConfig {
        &self.config
    }
    fn weight_bytes(&self) -> usize {
        0
    }
    fn workspace_bytes(&self, _max_tokens: usize) -> Result<usize> {
        unsupported("layer")
    }
    fn workspace_in(&self, _memory: Memory, _max_tokens: usize) -> Result<Workspace> {
        unsupported("layer")
    }
    fn workspace(&self, _max_tokens: usize) -> Result<Workspace> {
        unsupported("layer")
    }
    fn explain(&self, _tokens: usize) -> String {
        String::new()
    }
    fn run(&self, _stream: &CudaStream, _call: Forward<'_, Cuda>, _workspace: &mut Workspace) -> Result<()> {
        unsupported("layer")
    }
}
