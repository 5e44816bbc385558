//! What stands around the experts.

use super::tensors::Tensors;
use crate::checkpoint::family::{Around, Rms};
use fused_moe_core::config::{LayerConfig, RmsNorm};
use fused_moe_core::weights::{LatentWeights, NormWeights};
use fused_moe_core::{HostView, Shape};

impl<'a> Tensors<'a, '_> {
    /// The projections, if config.json has a width for them.
    pub(super) fn latent(&mut self, around: &Around, config: &LayerConfig) -> Option<LatentWeights<'a>> {
        let described = around.latent?;
        let Some(width) = config.latent else {
            self.unasked([described.down].into_iter(), described.width);
            return None;
        };
        let down = self.named(&[described.down], Shape::from([width, config.hidden]), &[]);
        let up = self.named(&[described.up], Shape::from([config.hidden, width]), &[]);
        Some(LatentWeights { down: down?, up: up? })
    }

    /// The weights of the norms that the layer has.
    pub(super) fn norms(&mut self, around: &Around, config: &LayerConfig) -> NormWeights<'a> {
        let (hidden, width, norms) = (config.hidden, config.expert_width(), &config.norms);
        let mut weight = |described: Option<Rms>, norm: Option<RmsNorm>, n| -> Option<HostView<'a>> {
            let (described, _) = described.zip(norm)?;
            self.named(&[described.weight], Shape::from([n]), &[])
        };
        NormWeights {
            experts_in: weight(around.experts_in, norms.experts_in, width),
            expert_out: weight(around.expert_out, norms.expert_out, width),
            routed_out: weight(around.routed_out, norms.routed_out, hidden),
            shared_in: weight(around.shared_in, norms.shared_in, hidden),
            shared_out: weight(around.shared_out, norms.shared_out, hidden),
            out: weight(around.out, norms.out, hidden),
        }
    }
}
