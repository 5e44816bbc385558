//! Launches that are noted and not made: which kernels a call needs, and how it would be carried out.

use crate::kernel::Kernel;
use crate::launch::Grid;
use std::fmt::Write;
use std::sync::{Mutex, PoisonError};

/// What was launched, in order.
#[derive(Debug, Default)]
pub(crate) struct Recorder {
    launches: Mutex<Vec<Launch>>,
}

#[derive(Clone, Copy, Debug)]
enum Launch {
    Kernel(Kernel, Grid),
    /// Why the next one is as it is.
    Reason(&'static str),
}

impl Recorder {
    fn push(&self, launch: Launch) {
        self.launches.lock().unwrap_or_else(PoisonError::into_inner).push(launch);
    }

    pub(crate) fn note(&self, kernel: Kernel, grid: Grid) {
        self.push(Launch::Kernel(kernel, grid));
    }

    pub(crate) fn explain(&self, why: &'static str) {
        self.push(Launch::Reason(why));
    }

    /// The kernels, each once.
    pub(crate) fn kernels(&self) -> Vec<Kernel> {
        let mut seen = std::collections::HashSet::new();
        let launches = self.launches.lock().unwrap_or_else(PoisonError::into_inner);
        let kernels = launches.iter().filter_map(|launch| match *launch {
            Launch::Kernel(kernel, _) => seen.insert(kernel).then_some(kernel),
            Launch::Reason(_) => None,
        });
        kernels.collect()
    }

    /// A line a launch.
    pub(crate) fn lines(&self) -> String {
        let (mut text, mut reason) = (String::new(), "");
        for launch in self.launches.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            match launch {
                Launch::Reason(why) => reason = why,
                Launch::Kernel(kernel, Grid { blocks: [x, y, _], threads, shared }) => {
                    let _ = write!(text, "\n{}: {x} x {y} blocks of {threads} threads", kernel.entry());
                    if *shared > 0 {
                        let _ = write!(text, ", {} KiB shared", shared.div_ceil(1024));
                    }
                    if !reason.is_empty() {
                        let _ = write!(text, "; {reason}");
                    }
                    reason = "";
                }
            }
        }
        text
    }
}
