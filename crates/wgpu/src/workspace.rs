use crate::device::Device;
use crate::error::{Error, Result};
use crate::memory::{Memory, Mut, Ref};
use crate::plan::grouped::tiles;
use crate::plan::tokens_at_once;
use fused_moe_core::problem::{LayerProblem, workspace_bytes};
use fused_moe_core::{DType, Error as Contract, Shape, Storage, View, surroundings};
use wgpu::BufferUsages;

/// Scratch of a layer: one buffer, divided anew in each call, and a small one for the sizes of launches.
///
/// For T tokens, K experts a token and R = T*K it holds about `4 * (R * (H + I + 4) + T * (E + H))` bytes, of which the
/// experts' outputs `[R, H]` are the most, and besides, where the layer has these, `4 * R * H` for the norm of the outputs,
/// `4 * T * (H + S)` for a shared expert, another `4 * T * H` where some experts copy the token too, and what
/// [`surroundings::buffers`] says. It is never more than for the tokens whose parts of it fit a binding each: more tokens than
/// that go one piece after the other.
#[derive(Debug)]
pub struct Workspace {
    memory: Memory,
    /// Which cannot be part of the other one: that is written by the launches whose sizes lie here.
    arguments: Memory,
}

/// Bytes that a buffer begins at a multiple of.
const ALIGNMENT: usize = 256;

/// A buffer with room for elements of 4 bytes.
pub(crate) struct Buffer<'a>(Mut<'a>);

impl<'a> Buffer<'a> {
    pub(crate) fn view(&self, dtype: DType, shape: impl Into<Shape>) -> Result<View<Ref<'_>>> {
        Ok(View::new(self.0.share(), dtype, 0, shape)?)
    }

    pub(crate) fn buffer(&self) -> &'a wgpu::Buffer {
        self.0.buffer()
    }

    pub(crate) fn view_mut(&mut self, dtype: DType, shape: impl Into<Shape>) -> Result<View<Mut<'_>>> {
        Ok(View::new(self.0.reborrow(), dtype, 0, shape)?)
    }
}

/// The buffers of one call.
pub(crate) struct Scratch<'a> {
    pub(crate) routing: RoutingScratch<'a>,
    pub(crate) permutation: PermutationScratch<'a>,
    pub(crate) schedule: ScheduleScratch<'a>,
    /// `[T, H]`: what the experts read, where that is not x itself.
    pub(crate) tokens: Buffer<'a>,
    /// `[R, I]`.
    pub(crate) a: Buffer<'a>,
    /// `[R, H]`.
    pub(crate) y: Buffer<'a>,
    /// `[R, H]`: the experts' outputs after their norm.
    pub(crate) normed: Buffer<'a>,
    pub(crate) shared: SharedScratch<'a>,
    /// f32 `[T, H]`: the sums over the slots, where the layer [has them](has_sums).
    pub(crate) sums: Buffer<'a>,
}

/// What the surroundings of the experts take.
pub(crate) struct Around<'a>([Buffer<'a>; surroundings::BUFFERS]);

impl<'a> Around<'a> {
    /// As room for elements of any format.
    pub(crate) fn views(self) -> Result<[View<Mut<'a>>; surroundings::BUFFERS]> {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = self.0.map(|Buffer(storage)| {
            let elements = storage.bytes() / 4;
            View::new(storage, DType::F32, 0, [elements])
        });
        Ok([a?, b?, c?, d?, e?, f?, g?, h?, i?, j?, k?, l?, m?, n?, o?, p?])
    }
}

pub(crate) struct RoutingScratch<'a> {
    /// f32 `[T, E]`, experts without weights among the E.
    pub(crate) logits: Buffer<'a>,
    /// u32 `[T, K]`.
    pub(crate) experts: Buffer<'a>,
    /// f32 `[T, K]`.
    pub(crate) weights: Buffer<'a>,
}

pub(crate) struct PermutationScratch<'a> {
    /// u32 `[R]`.
    pub(crate) row_slot: Buffer<'a>,
    /// u32 `[R]`.
    pub(crate) slot_row: Buffer<'a>,
    /// u32 `[E+1]`, experts without weights among the E.
    pub(crate) offsets: Buffer<'a>,
}

pub(crate) struct ScheduleScratch<'a> {
    /// u32 `[M, 3]`, M the tiles that the rows make at most.
    pub(crate) tiles: Buffer<'a>,
    /// u32 `[1]`.
    pub(crate) count: Buffer<'a>,
    /// u32 `[2, 3]`, of gate_up and down; in a buffer of its own.
    pub(crate) arguments: Buffer<'a>,
}

pub(crate) struct SharedScratch<'a> {
    /// `[T, S]`.
    pub(crate) a: Buffer<'a>,
    /// `[T, H]`.
    pub(crate) y: Buffer<'a>,
    /// f32 `[T]`.
    pub(crate) logit: Buffer<'a>,
}

const BUFFERS: usize = 16 + surroundings::BUFFERS;

impl Workspace {
    /// Errors: `Workspace`, `Usage`, `OutOfMemory`, `DeviceLost`.
    pub(crate) fn new(device: &Device, memory: Memory, layer: &LayerProblem, max_tokens: usize) -> Result<Self> {
        if !memory.buffer().usage().contains(BufferUsages::STORAGE) {
            return Err(Error::Usage { operation: "workspace", missing: "STORAGE" });
        }
        let arguments = device.buffer(ALIGNMENT as u64, BufferUsages::STORAGE | BufferUsages::INDIRECT)?;
        let mut workspace = Self::of(memory, Memory::from_buffer(arguments));
        workspace.carve("workspace", layer, max_tokens.min(tokens_at_once(layer, &device.numbers)))?;
        Ok(workspace)
    }

    pub(crate) fn of(memory: Memory, arguments: Memory) -> Self {
        Self { memory, arguments }
    }

    /// How much `tokens` tokens need that go through the layer at once.
    ///
    /// Errors: `Value` when that is no number of bytes.
    pub(crate) fn bytes(layer: &LayerProblem, tokens: usize) -> Result<usize> {
        Ok(workspace_bytes(buffers(layer, tokens), tokens)?)
    }

    /// The buffers of a call with `tokens` tokens.
    ///
    /// Errors: `Workspace` when there is too little memory.
    pub(crate) fn carve(
        &mut self,
        operation: &'static str,
        layer: &LayerProblem,
        tokens: usize,
    ) -> Result<(Scratch<'_>, Around<'_>)> {
        let (expected, actual) = (Self::bytes(layer, tokens)?, self.memory.bytes());
        let sizes = buffers(layer, tokens).filter(|_| expected <= actual);
        let sizes = sizes.ok_or(Contract::Workspace { operation, tokens, expected, actual })?;
        let mut sizes = sizes.into_iter();
        let mut rest = self.memory.write();
        let mut buffer = || Buffer(rest.split_off_front(sizes.next().unwrap_or(0)));
        let arguments = Buffer(self.arguments.write());
        let stages = Scratch {
            routing: RoutingScratch { logits: buffer(), experts: buffer(), weights: buffer() },
            permutation: PermutationScratch { row_slot: buffer(), slot_row: buffer(), offsets: buffer() },
            schedule: ScheduleScratch { tiles: buffer(), count: buffer(), arguments },
            tokens: buffer(),
            a: buffer(),
            y: buffer(),
            normed: buffer(),
            shared: SharedScratch { a: buffer(), y: buffer(), logit: buffer() },
            sums: buffer(),
        };
        Ok((stages, Around(std::array::from_fn(|_| buffer()))))
    }
}

/// Whether combine may have more operands than a launch: those of copies and of a shared expert together.
pub(crate) fn has_sums(layer: &LayerProblem) -> bool {
    layer.has_copies() && layer.core.shared.is_some()
}

/// Bytes of the buffers, in the order that `carve` hands them out in.
pub(crate) fn buffers(layer: &LayerProblem, tokens: usize) -> Option<[usize; BUFFERS]> {
    let config = &layer.core;
    let (hidden, experts, choices) = (config.hidden, config.experts, config.choices());
    let rows = tokens.checked_mul(config.top_k)?;
    let tiles = tiles(rows, experts);
    let shared = config.shared.map_or([0; 3], |shared| [shared.intermediate, hidden, 1]);
    let normed = if config.norms.expert_out.is_some() { hidden } else { 0 };
    let sums = if has_sums(layer) { hidden } else { 0 };
    let stages = [
        tokens.checked_mul(choices)?,
        rows,
        rows,
        rows,
        rows,
        choices + 1,
        tiles.checked_mul(3)?,
        1,
        tokens.checked_mul(hidden)?,
        rows.checked_mul(config.intermediate)?,
        rows.checked_mul(hidden)?,
        rows.checked_mul(normed)?,
        tokens.checked_mul(shared[0])?,
        tokens.checked_mul(shared[1])?,
        tokens.checked_mul(shared[2])?,
        tokens.checked_mul(sums)?,
    ];
    let mut bytes = [0; BUFFERS];
    let around = surroundings::buffers(&layer.config, tokens)?;
    for (bytes, elements) in bytes.iter_mut().zip(stages.into_iter().chain(around)) {
        *bytes = elements.checked_mul(4)?.checked_next_multiple_of(ALIGNMENT)?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fused_moe_core::config::{LayerConfig, Norms, RmsNorm, SharedConfig, ZeroExperts, ZeroOutput};

    #[test]
    fn it_has_the_bytes_that_its_description_says() {
        let (h, i, e, k, s) = (2048, 768, 128, 8, 512);
        let plain = LayerConfig::new(h, i, e, k);
        let norm = RmsNorm { eps: 0.0, unit_offset: false, scaled_first: false };
        let shared = SharedConfig { intermediate: s, activation: Default::default(), gated: true, scale: 1.0 };
        let normed = LayerConfig { norms: Norms { expert_out: Some(norm), ..Norms::default() }, ..plain.clone() };
        let shared = LayerConfig { shared: Some(shared), ..plain.clone() };
        let copy = ZeroExperts { count: 2, output: ZeroOutput::Copy };
        let copies = LayerConfig { zero_experts: Some(copy), ..plain.clone() };
        let both = LayerConfig { zero_experts: Some(copy), ..shared.clone() };
        for (config, more) in [(plain, 0), (normed, k * h), (shared, h + s), (copies, 0), (both, h + s + h)] {
            let formats = (DType::BF16, DType::BF16);
            let layer = LayerProblem {
                core: config.core(),
                config,
                gate_up: formats.0,
                down: formats.1,
                router: None,
                shared: None,
                local: 0..e,
            };
            for tokens in [100, 1000] {
                let said = 4 * tokens * (k * (h + i + 4) + e + h + more);
                let is = Workspace::bytes(&layer, tokens).unwrap();
                assert!(is.abs_diff(said) < said / 500 + 10_000, "{tokens}: {is} {said}");
            }
        }
    }
}
