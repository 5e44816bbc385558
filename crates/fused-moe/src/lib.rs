//! The Mixture-of-Experts layer: router, experts, combine, in one call, straight from a checkpoint.
//!
//! ```
//! use fused_moe::{Backend, Layer, Options, View, checkpoint::Checkpoint, cpu::Cpu};
//!
//! let device = Cpu::new()?;
//! # let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/qwen3_moe");
//! let checkpoint = Checkpoint::open(directory)?;                       // memory-mapped
//! let layer = checkpoint.layer(1)?.prepare(&device, &Options::default())?; // weights laid out for this device
//! let mut workspace = layer.workspace(16)?;                            // the only allocation
//! let stream = device.stream()?;
//!
//! let hidden = layer.config().hidden;
//! let (x, mut y) = (vec![0.5f32; 2 * hidden], vec![0.0f32; 2 * hidden]);
//! layer.forward(&stream, View::of(&x, [2, hidden])?, View::of_mut(&mut y, [2, hidden])?, &mut workspace)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A program that chooses at run time where to run goes through [`Device`]; one that is written over
//! [`Backend`] takes any.
#![deny(unsafe_code)]

#[cfg(any(feature = "cpu", feature = "cuda", feature = "wgpu"))]
mod auto;
pub mod checkpoint;

#[cfg(any(feature = "cpu", feature = "cuda", feature = "wgpu"))]
pub use auto::{Device, DeviceError, DeviceInfo, Visitor};
pub use fused_moe_core::*;

#[cfg(feature = "cpu")]
pub use fused_moe_cpu as cpu;
#[cfg(feature = "cuda")]
pub use fused_moe_cuda as cuda;
#[cfg(feature = "wgpu")]
pub use fused_moe_wgpu as wgpu;

/// The examples of the README, compiled.
#[cfg(all(doctest, feature = "cpu"))]
#[doc = include_str!("../../../README.md")]
pub struct Readme;
