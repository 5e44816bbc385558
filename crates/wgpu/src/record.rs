//! Launches that are noted and not made: which kernels a call needs, and how it would be carried out.

use crate::kernel::Variant;
use std::fmt::Write;
use std::sync::{Mutex, PoisonError};

/// What was launched, in order.
#[derive(Debug, Default)]
pub(crate) struct Recorder {
    launches: Mutex<Vec<Launch>>,
}

#[derive(Clone, Copy, Debug)]
enum Launch {
    /// Workgroups, where the host knows how many.
    Kernel(Variant, Option<u64>),
    /// Why the next one is as it is.
    Reason(&'static str),
}

impl Recorder {
    fn push(&self, launch: Launch) {
        self.launches.lock().unwrap_or_else(PoisonError::into_inner).push(launch);
    }

    pub(crate) fn note(&self, variant: Variant, groups: Option<u64>) {
        self.push(Launch::Kernel(variant, groups));
    }

    pub(crate) fn explain(&self, why: &'static str) {
        self.push(Launch::Reason(why));
    }

    /// The kernels, each once.
    pub(crate) fn variants(&self) -> Vec<Variant> {
        let mut seen = std::collections::HashSet::new();
        let launches = self.launches.lock().unwrap_or_else(PoisonError::into_inner);
        let variants = launches.iter().filter_map(|launch| match *launch {
            Launch::Kernel(variant, _) => seen.insert(variant).then_some(variant),
            Launch::Reason(_) => None,
        });
        variants.collect()
    }

    /// A line a launch.
    pub(crate) fn lines(&self) -> String {
        let (mut text, mut reason) = (String::new(), "");
        for launch in self.launches.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            match launch {
                Launch::Reason(why) => reason = why,
                Launch::Kernel(variant, groups) => {
                    let _ = match groups {
                        Some(groups) => write!(text, "\n{}: {groups} workgroups", variant.kernel.entry()),
                        None => write!(text, "\n{}: as many workgroups as there are tiles", variant.kernel.entry()),
                    };
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
