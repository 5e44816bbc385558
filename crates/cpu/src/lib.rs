//! The CPU backend.

pub mod arch;
