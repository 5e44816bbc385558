//! Dense products that cost as much arithmetic as a layer call: what a layer is compared with.

use crate::cublas::Cublas;
use crate::device::repeat;
use crate::down::{Manner, down_of};
use crate::error::Result;
use crate::grouped::Groups;
use crate::measure::{noise, time_replays};
use crate::memory::Memory;
use crate::stream::CudaStream;
use crate::{Cuda, Error};
use fused_moe_core::operation::{Down, Matrices};
use fused_moe_core::{DType, View};

/// Dense products on a device: cuBLAS's where its library is found, else this crate's own kernel with one expert.
#[derive(Debug)]
pub struct Dense {
    cuda: Cuda,
    cublas: Option<Cublas>,
}

/// Sizes of the two products of a layer call: `[rows, hidden] . [gate_up, hidden]^T` and
/// `[rows, intermediate] . [hidden, intermediate]^T`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DenseSizes {
    /// R.
    pub rows: usize,
    /// H.
    pub hidden: usize,
    /// Rows of an expert's gate_up: 2I, or I without gate.
    pub gate_up: usize,
    /// I.
    pub intermediate: usize,
    /// Format of all matrices; sums are f32.
    pub dtype: DType,
}

impl DenseSizes {
    /// Multiplications and additions.
    pub fn flops(&self) -> f64 {
        2.0 * self.rows as f64 * self.hidden as f64 * (self.gate_up as f64 + self.intermediate as f64)
    }
}

/// Pairs of products in a graph.
const PAIRS: usize = 8;

impl Dense {
    /// Looks for cuBLAS.
    pub fn new(cuda: &Cuda) -> Self {
        Self { cuda: cuda.clone(), cublas: Cublas::load(cuda) }
    }

    /// Whose products they are, in words.
    pub fn by(&self) -> String {
        match &self.cublas {
            Some(Cublas { version: (major, minor), .. }) => format!("cuBLAS {major}.{minor}"),
            None => "this crate's grouped kernel with one expert".into(),
        }
    }

    /// Microseconds of the two products together, in each of `repeats` replays of a graph of several. Waits.
    ///
    /// Errors: `OutOfMemory`, `NoCompiler`, `Driver`, `DeviceLost`.
    pub fn time(&self, stream: &CudaStream, sizes: DenseSizes, repeats: usize) -> Result<Vec<f64>> {
        let DenseSizes { rows, hidden, gate_up, intermediate, .. } = sizes;
        let mut products = [
            self.operands(sizes.dtype, [rows, gate_up, hidden])?,
            self.operands(sizes.dtype, [rows, hidden, intermediate])?,
        ];
        let mut pairs = |count: usize| -> Result<()> {
            for _ in 0..count {
                products.iter_mut().try_for_each(|product| self.enqueue(stream, product))?;
            }
            Ok(())
        };
        pairs(1)?;
        stream.synchronize()?;
        let times = time_replays(stream, repeats, || pairs(PAIRS))?;
        Ok(times.into_iter().map(|time| time / PAIRS as f64).collect())
    }

    fn operands(&self, dtype: DType, [rows, outputs, inner]: [usize; 3]) -> Result<Operands> {
        let device = self.cuda.device();
        let matrix = |rows: usize, cols: usize| -> Result<Memory> {
            let bytes = rows.checked_mul(cols).and_then(|elements| elements.checked_mul(dtype.size()));
            let Some(bytes) = bytes else {
                return Err(Error::OutOfMemory { needed: usize::MAX, free: self.cuda.free_bytes()? });
            };
            let memory = Memory::new(device, bytes)?;
            repeat(device, &noise(), memory.address(), bytes)?;
            Ok(memory)
        };
        Ok(Operands {
            dtype,
            sizes: [rows, outputs, inner],
            x: matrix(rows, inner)?,
            weight: matrix(outputs, inner)?,
            out: matrix(rows, outputs)?,
            ends: Memory::new(device, 8)?,
        })
    }

    fn enqueue(&self, stream: &CudaStream, operands: &mut Operands) -> Result<()> {
        let Operands { dtype, sizes: [rows, outputs, inner], x, weight, out, ends } = operands;
        let (dtype, rows, outputs, inner) = (*dtype, *rows, *outputs, *inner);
        let x = View::new(x.read(), dtype, 0, [rows, inner])?;
        let out = View::new(out.write(), dtype, 0, [rows, outputs])?;
        if let Some(cublas) = &self.cublas {
            return cublas.linear(stream, &x, &View::new(weight.read(), dtype, 0, [outputs, inner])?, &out);
        }
        let matrices = Matrices::Stack(View::new(weight.read(), dtype, 0, [1, outputs, inner])?);
        // two numbers that nobody reads: all rows are the one expert's
        let offsets = View::new(ends.read(), DType::U32, 0, [2])?;
        down_of(&self.cuda, stream, &Down { a: x, offsets, matrices, bias: None, out }, Groups::One, Manner::default())
    }
}

/// Memory of one product.
struct Operands {
    dtype: DType,
    /// Rows, outputs, inner.
    sizes: [usize; 3],
    x: Memory,
    weight: Memory,
    out: Memory,
    ends: Memory,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flops_of_a_call() {
        let sizes = DenseSizes { rows: 8, hidden: 10, gate_up: 6, intermediate: 3, dtype: DType::BF16 };
        assert_eq!(sizes.flops(), 2.0 * 8.0 * (10.0 * 6.0 + 3.0 * 10.0));
    }
}
