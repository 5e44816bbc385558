//! The vector kernels of the CPU backend, and all of its unsafe code.
//!
//! An algorithm is written once, as a `Task` over the `Simd` trait; an instruction set is one file that implements the
//! trait and has one function with the instruction set enabled, into which everything is inlined. Only panels have a second
//! form, of AMX's tiles. [`Kernels`] is the proof that the CPU has an instruction set, and offers the tasks as safe functions
//! on slices.
//!
//! Slices that should have equal lengths are cut to the shortest of them.
//! For the same inputs and the same [`Isa`] the results have the same bits, wherever the slices lie.

mod activation;
mod activation_backward;
#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod dot;
mod elementwise;
mod math;
#[cfg(target_arch = "aarch64")]
mod neon;
mod outer;
mod panel;
mod peak;
mod scalar;
mod shared;
mod simd;
#[cfg(test)]
mod tests;

pub(crate) use outer::{OUTER_COLUMNS, Outer, Place};
pub(crate) use panel::{PAIR_STEPS, PANEL, PANEL_BLOCK, PanelGroup, PanelSums, group};
pub(crate) use shared::SharedSlice;

use activation::{Activate, Buffers};
use activation_backward::ActivateBackward;
use dot::{Dot, PairDot};
use elementwise::{Axpy, Convert, ExpSum, Scale, ScaleBy, SumSquares};
use fused_moe_core::DType;
use fused_moe_core::config::Activation;
use fused_moe_core::dtype::Float;
use half::bf16;
use outer::{Interleave, PairOuter, Settle};
use peak::Peak;
use shared::Store;
use simd::Task;
use std::fmt;
use std::str::FromStr;

/// An instruction set that there are kernels for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// The target's baseline; on every CPU.
    Scalar,
    /// NEON, on every 64-bit ARM processor.
    Neon,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL and DQ.
    Avx512,
    /// The same with AVX-512 BF16.
    Avx512Bf16,
    /// The same with AMX tiles of bf16, which Linux lets a process use that asks for them: [`is_available`](Self::is_available)
    /// does. From then on the system wants signal stacks with room for the tiles.
    Amx,
}

impl Isa {
    /// All of them, the fastest last.
    pub const ALL: [Self; 6] = [Self::Scalar, Self::Neon, Self::Avx2, Self::Avx512, Self::Avx512Bf16, Self::Amx];

    /// Those that this CPU has, the fastest last.
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// The fastest that this CPU has.
    pub fn best() -> Self {
        Self::ALL.into_iter().rev().find(|isa| isa.is_available()).unwrap_or(Self::Scalar)
    }

    /// Whether products of bf16 numbers have an instruction of their own, which takes both operands in that format and
    /// counts numbers below 2^-126 as zeros.
    pub fn has_bf16_products(self) -> bool {
        matches!(self, Self::Avx512Bf16 | Self::Amx)
    }

    /// Whether it multiplies tiles of rows and of weights.
    pub(crate) fn has_tiles(self) -> bool {
        self == Self::Amx
    }

    /// Whether this CPU has it and, of [`Amx`](Self::Amx), the system lets this process use it, which is asked of it once.
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            Self::Neon => cfg!(all(target_arch = "aarch64", target_feature = "neon")),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => Self::Avx512.is_available() && is_x86_feature_detected!("avx512bf16"),
            #[cfg(target_arch = "x86_64")]
            Self::Amx => Self::Avx512Bf16.is_available() && amx::is_available(),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 | Self::Avx512Bf16 | Self::Amx => false,
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Scalar => "scalar",
            Self::Neon => "neon",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Amx => "amx",
        })
    }
}

/// A name that is no [`Isa`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("isa: expected scalar, neon, avx2, avx512, avx512bf16 or amx, got {name:?}")]
pub struct UnknownIsa {
    /// The name.
    pub name: String,
}

impl FromStr for Isa {
    type Err = UnknownIsa;

    fn from_str(name: &str) -> Result<Self, UnknownIsa> {
        let known = Self::ALL.into_iter().find(|isa| isa.to_string() == name);
        known.ok_or_else(|| UnknownIsa { name: name.to_owned() })
    }
}

/// The kernels of one instruction set; a value proves that the CPU has it.
///
/// ```
/// use fused_moe_cpu::arch::Kernels;
/// let (row, token, mut out) = ([1.0f32, 2.0, 3.0], [1.0f32, 1.0, 2.0], [0.0]);
/// Kernels::best().dot_tile(&[&row], &[&token], &mut out);
/// assert_eq!(out, [9.0]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernels {
    isa: Isa,
}

impl Kernels {
    /// The kernels of an instruction set, if this CPU has it.
    pub fn new(isa: Isa) -> Option<Self> {
        isa.is_available().then_some(Self { isa })
    }

    /// The kernels of [`Isa::best`].
    pub fn best() -> Self {
        Self { isa: Isa::best() }
    }

    /// Whose they are.
    pub fn isa(self) -> Isa {
        self.isa
    }

    /// `out[m * tokens.len() + n] = sum_k weights[m][k] * tokens[n][k]`, summed in f32.
    ///
    /// - `weights`: `[M][k]`, `tokens`: `[N][k]`; any M and N. All have the same length; otherwise the shortest counts.
    /// - `out`: `[M, N]`; what lies beyond M N elements is not written, and what it is too short for is left out.
    ///
    /// The bits of an element of `out` depend on its row, its token and the instruction set only.
    pub fn dot_tile<W: Float, X: Float>(self, weights: &[&[W]], tokens: &[&[X]], out: &mut [f32]) {
        self.run(Dot { weights, tokens, out });
    }

    /// The same where both formats are bf16, by the instruction set's own products of pairs where it has them; else
    /// [`dot_tile`](Self::dot_tile).
    pub(crate) fn pair_dot_tile<W: Float, X: Float>(self, weights: &[&[W]], tokens: &[&[X]], out: &mut [f32]) {
        match (self.isa, W::DTYPE, X::DTYPE) {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `isa` is private and only set to what is_available() confirmed.
            (Isa::Avx512Bf16 | Isa::Amx, DType::BF16, DType::BF16) => unsafe {
                avx512::run_bf16(PairDot(Dot { weights, tokens, out }));
            },
            #[cfg(not(target_arch = "x86_64"))]
            (Isa::Avx512Bf16 | Isa::Amx, DType::BF16, DType::BF16) => {
                scalar::run(PairDot(Dot { weights, tokens, out }))
            }
            _ => self.dot_tile(weights, tokens, out),
        }
    }

    /// Parts of panels times rows of f32, added to sums; see [`PanelGroup`].
    pub(crate) fn panels<W: Float>(self, group: PanelGroup<'_, W>) {
        self.run(group);
    }

    /// The same with rows of bf16; nothing where the instruction set does not form products of such numbers. Lines may be cut
    /// into calls at multiples of [`PAIR_STEPS`].
    pub(crate) fn pair_panels(self, group: PanelGroup<'_, bf16>) {
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `isa` is private and only set to what is_available() confirmed.
            Isa::Avx512Bf16 => unsafe { avx512::run_bf16(panel::PairPanelGroup(group)) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: likewise.
            Isa::Amx => unsafe { amx::panels(group) },
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx512Bf16 | Isa::Amx => scalar::run(panel::PairPanelGroup(group)),
            _ => {}
        }
    }

    /// Products of numbers of a format, added up in f32, in registers alone: nothing that multiplies such numbers is faster.
    /// `rounds` times as many as the registers hold sums; returns how many they were.
    ///
    /// ```
    /// # use fused_moe_core::DType;
    /// let kernels = fused_moe_cpu::arch::Kernels::best();
    /// assert_eq!(kernels.multiply_adds(DType::F32, 20), 10 * kernels.multiply_adds(DType::F32, 2));
    /// ```
    pub fn multiply_adds(self, format: DType, rounds: usize) -> usize {
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `isa` is private and only set to what is_available() confirmed.
            Isa::Avx512Bf16 if format == DType::BF16 => unsafe { avx512::run_bf16(Peak::<true> { rounds }) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: likewise.
            Isa::Amx if format == DType::BF16 => unsafe { amx::multiply_adds(rounds) },
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx512Bf16 | Isa::Amx if format == DType::BF16 => scalar::run(Peak::<true> { rounds }),
            _ => self.run(Peak::<false> { rounds }),
        }
    }

    /// `to = from` in f32; exact.
    pub fn to_f32<X: Float>(self, from: &[X], to: &mut [f32]) {
        self.run(Convert { from, to });
    }

    /// `to = from`, each the nearest number of Y, ties to even; NaN stays NaN.
    pub fn from_f32<Y: Float>(self, from: &[f32], to: &mut [Y]) {
        self.run(Convert { from, to });
    }

    /// `acc += w * x`, rounded once where the instruction set can.
    pub fn axpy<X: Float>(self, w: f32, x: &[X], acc: &mut [f32]) {
        self.run(Axpy { w, x, acc });
    }

    /// `sum x^2`.
    pub fn sum_squares<X: Float>(self, x: &[X]) -> f32 {
        self.run(SumSquares { x })
    }

    /// `out = (x * factor) * weight`; without the last factor where `weight` is `None`.
    pub fn scale<X: Float>(self, x: &[X], factor: f32, weight: Option<&[f32]>, out: &mut [f32]) {
        match weight {
            None => self.run(Scale { x, factor, out }),
            Some(weight) => self.run(ScaleBy { x, factor, weight, out }),
        }
    }

    /// `gate = act(gate, up)`. A plain activation does not depend on what was there.
    ///
    /// NaN in gives NaN out, and infinities give what the formula gives, so `silu(-inf) = -inf * 0 = NaN`.
    pub fn activation_into_gate(self, activation: Activation, gate: &mut [f32], up: &[f32]) {
        self.run(Activate { activation, buffers: Buffers::IntoGate { gate, up } });
    }

    /// `up = act(gate, up)`, with the bits of [`activation_into_gate`](Self::activation_into_gate). A plain activation does
    /// not read `gate`, which may then be empty.
    pub fn activation_into_up(self, activation: Activation, gate: &[f32], up: &mut [f32]) {
        self.run(Activate { activation, buffers: Buffers::IntoUp { gate, up } });
    }

    /// `gate = weight * d_a * da/dg`, `up = weight * d_a * da/du` and `d_a = act(gate, up)`, all from what was there before.
    /// A plain activation does not touch `gate`, which may then be empty.
    pub(crate) fn activation_backward(self, activation: Activation, [gate, up, d_a]: [&mut [f32]; 3], weight: f32) {
        self.run(ActivateBackward { activation, gate, up, d_a, weight });
    }

    /// `c[m][n] += sum_k a[m * steps[0] + k * steps[1]] * b[k][n]` for the first `columns` columns, ascending in k, where
    /// words are f32; nothing where `a` is too short for the rows of c and b, or `to` has no room for them.
    ///
    /// The bits of an element depend on its row, its column and the instruction set only, and not on how k is cut into
    /// calls. Results that are to go past the caches are there for other threads after [`settle`](Self::settle).
    pub(crate) fn outer<Y: Float>(self, outer: Outer<'_, Y>) {
        self.run(outer);
    }

    /// The same where words are pairs of bf16; nothing where the instruction set does not form products of such numbers.
    pub(crate) fn pair_outer<Y: Float>(self, outer: Outer<'_, Y>) {
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `isa` is private and only set to what is_available() confirmed.
            Isa::Avx512Bf16 | Isa::Amx => unsafe { avx512::run_bf16(PairOuter(outer)) },
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx512Bf16 | Isa::Amx => scalar::run(PairOuter(outer)),
            _ => {}
        }
    }

    /// `cells[start..] = values`, each the nearest number of Y; what does not fit is left out. What is streamed goes past the
    /// caches, and is there for other threads after [`settle`](Self::settle).
    pub(crate) fn store<Y: Float>(self, values: &[f32], (cells, start): (SharedSlice<'_, Y>, usize), stream: bool) {
        self.run(Store { values, cells, start, stream });
    }

    /// Waits until what [`outer`](Self::outer) and [`store`](Self::store) sent past the caches is there for other threads.
    pub(crate) fn settle(self) {
        self.run(Settle);
    }

    /// `to[n]` = the pair `first[n], second[n]`.
    pub(crate) fn interleave(self, first: &[bf16], second: &[bf16], to: &mut [u32]) {
        self.run(Interleave { first, second, to });
    }

    /// `x = exp(x - max)`; returns the sum of the new x.
    pub fn exp_sum(self, x: &mut [f32], max: f32) -> f32 {
        self.run(ExpSum { x, max })
    }

    /// Runs a task with the instruction set.
    fn run<T: Task>(self, task: T) -> T::Output {
        match self.isa {
            Isa::Scalar => scalar::run(task),
            #[cfg(target_arch = "aarch64")]
            // SAFETY: `isa` is private and only set to what is_available() confirmed.
            Isa::Neon => unsafe { neon::run(task) },
            #[cfg(not(target_arch = "aarch64"))]
            Isa::Neon => scalar::run(task),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `isa` is private and only set to what is_available() confirmed.
            Isa::Avx2 => unsafe { avx2::run(task) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `isa` is private and only set to what is_available() confirmed.
            Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => unsafe { avx512::run(task) },
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => scalar::run(task),
        }
    }
}
