use super::grouped::{Grouping, Sizes, grouped, tiles};
use crate::device::DeviceNumbers;
use crate::grouped::{GroupedKernel, Product};
use crate::workspace;
use fused_moe_core::config::LayerConfig;
use fused_moe_core::problem::LayerProblem;

/// The most tokens that go through a layer at once: each buffer of its workspace fits a binding, and all of them one buffer.
/// One token is never cut.
pub(crate) fn tokens_at_once(layer: &LayerProblem, device: &DeviceNumbers) -> usize {
    let binding = room(device);
    let buffer = usize::try_from(device.buffer_bytes).unwrap_or(usize::MAX);
    let fits = |tokens: usize| {
        workspace::buffers(layer, tokens).is_some_and(|sizes| {
            let total = sizes.iter().try_fold(0usize, |sum, &bytes| sum.checked_add(bytes));
            sizes.iter().all(|&bytes| bytes <= binding) && total.is_some_and(|total| total <= buffer)
        })
    };
    let (mut yes, mut no) = (1, u32::MAX as usize);
    while no - yes > 1 {
        let middle = yes + (no - yes) / 2;
        if fits(middle) { yes = middle } else { no = middle }
    }
    yes
}

/// The tokens of a call that go through a layer at once, where the longest distance of two tokens in an operand is so many
/// bytes.
pub(crate) fn piece(at_once: usize, token_bytes: usize, device: &DeviceNumbers) -> usize {
    at_once.min(room(device) / token_bytes.max(1)).max(1)
}

/// How many tiles a schedule has room for, where the experts' products take tiles, and so many workgroups that each looking
/// for its own costs more than a list of them; `columns` are column tiles of gate_up and down.
pub(crate) fn schedule(layer: &LayerProblem, rows: usize, invariant: bool, columns: [usize; 2]) -> Option<usize> {
    let LayerConfig { experts, .. } = layer.core;
    let (product, grouping) = (Product::DOWN, Grouping::Offsets);
    let plan = grouped(&Sizes { product, rows, experts, grouping, invariant });
    let GroupedKernel::Tiled { .. } = plan.kernel else { return None };
    let tiles = tiles(rows, experts);
    // a line of the grid has room for so many
    let fits = tiles.max(columns[0]).max(columns[1]) <= 65535;
    (fits && tiles.saturating_mul(columns[0] + columns[1]) >= MANY).then_some(tiles)
}

/// Workgroups of both products that a schedule is worth its launch for.
const MANY: usize = 8192;

/// What an operand takes of a binding, which begins at a multiple of the alignment.
fn room(device: &DeviceNumbers) -> usize {
    usize::try_from(device.binding_bytes.saturating_sub(512)).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::device;
    use fused_moe_core::DType;
    use fused_moe_core::config::{LayerConfig, SharedConfig};

    fn layer(hidden: usize, intermediate: usize, top_k: usize, shared: usize) -> LayerProblem {
        let shared = SharedConfig { intermediate: shared, activation: Default::default(), gated: false, scale: 1.0 };
        let config = LayerConfig { shared: Some(shared), ..LayerConfig::new(hidden, intermediate, 128, top_k) };
        LayerProblem {
            core: config.core(),
            config,
            gate_up: DType::BF16,
            down: DType::BF16,
            router: Some(DType::BF16),
            shared: Some([DType::BF16; 2]),
            local: 0..128,
        }
    }

    #[test]
    fn the_largest_buffer_fills_a_binding() {
        let device = DeviceNumbers { binding_bytes: 128 << 20, buffer_bytes: 4 << 30, ..device() };
        // [R, H]
        assert_eq!(tokens_at_once(&layer(2048, 768, 8, 1), &device), 2047);
        // [R, I]
        assert_eq!(tokens_at_once(&layer(16, 4096, 8, 1), &device), 1023);
        // [T, S]
        assert_eq!(tokens_at_once(&layer(16, 16, 1, 65536), &device), 511);
    }

    #[test]
    fn all_buffers_fill_a_buffer() {
        let layer = layer(2048, 768, 8, 1);
        let device = DeviceNumbers { binding_bytes: 128 << 20, buffer_bytes: 128 << 20, ..device() };
        let tokens = tokens_at_once(&layer, &device);
        let total = |tokens| workspace::buffers(&layer, tokens).unwrap().iter().sum::<usize>();
        assert!(total(tokens) <= 128 << 20 && total(tokens + 1) > 128 << 20 && tokens > 1000);
    }

    #[test]
    fn a_token_is_never_cut() {
        let device = DeviceNumbers { binding_bytes: 4096, buffer_bytes: 4096, ..device() };
        assert_eq!(tokens_at_once(&layer(2048, 768, 8, 1), &device), 1);
        assert_eq!(piece(1, 1 << 40, &device), 1);
    }

    #[test]
    fn many_tiles_are_listed() {
        let layer = layer(2048, 768, 8, 1);
        let of = |tokens: usize, invariant| schedule(&layer, 8 * tokens, invariant, [12, 16]);
        assert_eq!(
            [of(1, false), of(64, false), of(1024, false), of(4096, false)],
            [None, None, Some(384), Some(1152)]
        );
        assert_eq!([of(1, true), of(64, true), of(4096, true)], [None, None, Some(1152)]);
        assert_eq!(schedule(&layer, 32 * 65536, true, [12, 16]), None);
    }

    #[test]
    fn rows_far_apart_make_small_pieces() {
        let device = DeviceNumbers { binding_bytes: 128 << 20, ..device() };
        assert_eq!(piece(2048, 4096, &device), 2048);
        assert_eq!(piece(2048, 1 << 20, &device), 127);
    }
}
