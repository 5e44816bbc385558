//! What the processor is: instruction set, caches, name.

use crate::arch::{Isa, Kernels};
use crate::error::{Error, Result};
use std::fs;

/// The variable that forces an instruction set.
const ISA_VARIABLE: &str = "FMOE_CPU_ISA";

/// Sizes of one core's caches, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Caches {
    pub(crate) l2: usize,
}

impl Caches {
    /// What the system tells, or what every processor of the last ten years has.
    pub(crate) fn read() -> Self {
        Self { l2: cache(2).unwrap_or(256 << 10) }
    }
}

/// Size of cache `index`, as the system counts: 2 is the cache of level 2.
fn cache(index: usize) -> Option<usize> {
    let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size");
    cache_size(fs::read_to_string(path).ok()?.trim())
}

/// `48K` or `2M`.
fn cache_size(text: &str) -> Option<usize> {
    let (digits, unit) = match text.strip_suffix('K') {
        Some(digits) => (digits, 1 << 10),
        None => (text.strip_suffix('M')?, 1 << 20),
    };
    digits.parse::<usize>().ok()?.checked_mul(unit).filter(|&bytes| bytes > 0)
}

/// The name that the system knows the processor by.
pub(crate) fn model_name() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// The fastest kernels here, or those that `FMOE_CPU_ISA` names; empty, it names none.
///
/// Errors: `Isa` when it names none, or some that the processor has not.
pub(crate) fn kernels() -> Result<Kernels> {
    kernels_named(&std::env::var_os(ISA_VARIABLE).unwrap_or_default().to_string_lossy())
}

/// The kernels of what the variable says.
fn kernels_named(name: &str) -> Result<Kernels> {
    if name.is_empty() {
        return Ok(Kernels::best());
    }
    name.parse().ok().and_then(Kernels::new).ok_or_else(|| unavailable(format!("{ISA_VARIABLE}={name}")))
}

/// The kernels of an instruction set.
///
/// Errors: `Isa` when the processor has it not.
pub(crate) fn kernels_of(isa: Isa) -> Result<Kernels> {
    Kernels::new(isa).ok_or_else(|| unavailable(isa.to_string()))
}

fn unavailable(name: String) -> Error {
    let names: Vec<_> = Isa::available().iter().map(Isa::to_string).collect();
    Error::Isa { name, available: names.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_as_the_system_writes_them() {
        assert_eq!(cache_size("48K"), Some(48 << 10));
        assert_eq!(cache_size("2M"), Some(2 << 20));
        for text in ["", "K", "48", "0K", "-1K", "99999999999999999999M"] {
            assert_eq!(cache_size(text), None, "{text}");
        }
        assert!(Caches::read().l2 > 0);
    }

    #[test]
    fn instruction_sets_by_name() {
        assert_eq!(kernels_named("scalar").unwrap().isa(), Isa::Scalar);
        let error = kernels_named("mmx").unwrap_err().to_string();
        assert!(error.contains("FMOE_CPU_ISA=mmx: expected one of scalar"), "{error}");
        assert_eq!(kernels_named("").unwrap(), Kernels::best());
        for isa in Isa::ALL {
            assert_eq!(kernels_of(isa).is_ok(), isa.is_available());
        }
    }
}
