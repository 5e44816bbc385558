//! The cases that every backend is held to, against the f64 reference of `fused-moe-core`.
//!
//! The same list of [`cases()`] feeds a backend's tests, `fmoe check` and `fmoe bench`. Each stage is fed the reference's
//! inputs, so that a failure names its stage; whole layers follow.
//!
//! ```
//! use fused_moe_conformance::{Options, run};
//! use fused_moe_cpu::Cpu;
//! let options = Options { filter: Some("permute/Even T=5".into()), ..Options::default() };
//! let report = run(&Cpu::new()?, &options, &mut |_| {})?;
//! println!("{report}");
//! # Ok::<(), fused_moe_cpu::Error>(())
//! ```
#![forbid(unsafe_code)]

pub mod backward;
pub mod cases;
pub mod compare;
pub mod data;
pub mod golden;
pub mod image;
pub mod operands;
mod report;
pub mod rows;
mod run;
pub mod shapes;
pub mod stage;
pub mod tolerance;

pub use backward::run_backward;
pub use cases::{Case, Scale, Stage, cases};
pub use compare::Comparison;
pub use report::{CaseResult, Outcome, Report, Summary};
pub use run::{Options, Progress, run};
