//! What of a measurement is a device's own: its clock, its memory, its ceilings.

use super::machine::Ceilings;
use crate::args::{Origin, Spread};
use crate::output::bytes;
use anyhow::Result;
use fused_moe::config::LayerConfig;
use fused_moe::{Backend, DType};
use std::time::Duration;

/// A stream of a meter's backend.
pub(crate) type StreamOf<M> = <<M as Meter>::Backend as Backend>::Stream;
/// An error of a meter's backend.
pub(crate) type ErrorOf<M> = <<M as Meter>::Backend as Backend>::Error;

/// How a backend's calls are timed, and what they are compared with.
pub(crate) trait Meter {
    /// The backend.
    type Backend: Backend;
    /// Where routes come from unless the command line says.
    const ORIGIN: Origin;
    /// Batch sizes unless the command line gives some.
    const TOKENS: &'static [usize];
    /// The same, of training steps.
    const TRAINED: &'static [usize];

    fn backend(&self) -> &Self::Backend;

    /// The device's name, as in records.
    fn device(&self) -> String;

    /// Threads that work, where they are the processor's.
    fn threads(&self) -> Option<usize>;

    /// The instruction set in use, where it is the processor's.
    fn isa(&self) -> Option<String>;

    /// Bytes of the largest cache.
    fn cache(&self) -> u64;

    /// How large it is, in words.
    fn describe_cache(&self) -> String {
        format!("the largest cache has {}", bytes(self.cache()))
    }

    /// The memory that layers and tokens may take, beside `source` bytes on the host.
    fn room(&self, source: u64) -> Result<Room>;

    /// How many layers must take turns for calls to find no weights in the cache; two at least.
    fn turns(&self, sizes: LayerSizes, routing: Spread) -> u64;

    /// The most layers that take turns.
    fn most_layers(&self) -> usize;

    /// Batches of so many tokens that calls go through in turn.
    fn batches(&self, tokens: usize) -> usize;

    /// The device's own rates, measured.
    fn ceilings(&self) -> Result<Ceilings>;

    /// The rate of arithmetic for calls of this size, where it is measured apart: in operations a second.
    fn rate(&self, stream: &StreamOf<Self>, config: &LayerConfig, tokens: usize, dtype: DType) -> Result<Option<f64>>;

    /// Times calls: `call` enqueues the one of a number, from which its layer and its batch follow; the first `batches`
    /// are of different batches. Also says which calls' outputs are there in the end. An error where a call raises a
    /// status.
    fn time(&self, stream: &StreamOf<Self>, batches: usize, call: Calls<'_, Self>, tick: &dyn Fn()) -> Result<Times>;

    /// Times the passes of a training step, of the same batches: `call` enqueues a pass of the call of a number. Every batch
    /// has been through all passes once.
    fn time_passes(
        &self,
        stream: &StreamOf<Self>,
        batches: usize,
        call: Passes<'_, Self>,
        tick: &dyn Fn(),
    ) -> Result<[Times; 3]> {
        let mut times = |pass| self.time(stream, batches, &mut |number| call(pass, number), tick);
        Ok([times(Pass::Forward)?, times(Pass::Saving)?, times(Pass::Backward)?])
    }

    /// The clock, in words.
    fn clock(&self) -> &'static str;

    /// What the read bandwidth is, in words.
    fn describe(&self, ceilings: &Ceilings) -> String;

    /// Whose arithmetic the rate is, in a few words.
    fn arithmetic(&self) -> String;

    /// What the rate of arithmetic is, in words.
    fn describe_arithmetic(&self, ceilings: &Ceilings) -> String;
}

/// Memory, and what is to lie in it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    /// Bytes that can be had.
    pub(crate) had: u64,
    /// Bytes of them that random weights take, from which the layers' are copied.
    pub(crate) source: u64,
}

impl Room {
    /// Bytes that are left.
    pub(crate) fn left(self) -> u64 {
        self.had.saturating_sub(self.source)
    }

    /// What there is and what takes it already, in words.
    pub(crate) fn describe(self, layers: u64) -> String {
        let taken = [(self.source, "the random weights"), (layers, "the layers")].into_iter().filter(|(n, _)| *n > 0);
        let taken: Vec<String> = taken.map(|(n, what)| format!("{} for {what}", bytes(n))).collect();
        let had = bytes(self.had);
        if taken.is_empty() {
            return format!("{had} of memory can be had");
        }
        format!("{had} of memory can be had, less {}", taken.join(" and "))
    }
}

/// Enqueues the call of a number.
pub(crate) type Calls<'a, M> = &'a mut dyn FnMut(usize) -> Result<(), ErrorOf<M>>;

/// What of a training step is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pass {
    /// A call of the prepared layer, which keeps nothing.
    Forward,
    /// The forward pass over weights where an optimizer updates them, keeping what the backward pass needs.
    Saving,
    /// The backward pass.
    Backward,
}

impl Pass {
    /// In the order of a step.
    pub(crate) const ALL: [Self; 3] = [Self::Forward, Self::Saving, Self::Backward];
}

/// Enqueues a pass of the call of a number.
pub(crate) type Passes<'a, M> = &'a mut dyn FnMut(Pass, usize) -> Result<(), ErrorOf<M>>;

/// Bytes of a layer, at most what it takes as a backend packs it, and of the K experts of a token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerSizes {
    pub(crate) layer: u64,
    pub(crate) packed: u64,
    pub(crate) chosen: u64,
}

/// What a clock showed.
#[derive(Clone, Debug)]
pub(crate) struct Times {
    /// Of a run, divided by its calls.
    pub(crate) samples: Vec<Duration>,
    /// Calls of a run.
    pub(crate) calls: usize,
    /// Numbers of calls that were the last to write their batch's output.
    pub(crate) finished: Vec<usize>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_in_words() {
        let room = |source| Room { had: 3_000_000_000, source };
        assert_eq!(room(0).describe(0), "3.0 GB of memory can be had");
        assert_eq!(room(2_000_000_000).describe(0), "3.0 GB of memory can be had, less 2.0 GB for the random weights");
        let both = "3.0 GB of memory can be had, less 2.0 GB for the random weights and 1.5 MB for the layers";
        assert_eq!(room(2_000_000_000).describe(1_500_000), both);
        assert_eq!((room(2_000_000_000).left(), room(u64::MAX).left()), (1_000_000_000, 0));
    }
}
