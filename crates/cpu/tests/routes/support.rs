//! Buffers with sentinels, random numbers, and the comparison of runs.

use fused_moe_core::{Backend, DType, HostView, HostViewMut, Shape, Status, Stream, View};
use fused_moe_cpu::arch::Isa;
use fused_moe_cpu::{Cpu, CpuStream};
use half::{bf16, f16};
use std::sync::OnceLock;

pub(crate) const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// What no operation writes.
const SENTINEL: u8 = 0xa5;

/// Numbers that look random, the same in every run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 33) as usize) % n.max(1)
    }

    /// Between -1 and 1.
    pub(crate) fn unit(&mut self) -> f64 {
        self.below(1 << 24) as f64 / (1 << 23) as f64 - 1.0
    }

    pub(crate) fn flip(&mut self) -> bool {
        self.below(2) == 1
    }

    pub(crate) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    pub(crate) fn units(&mut self, n: usize, scale: f64) -> Vec<f64> {
        (0..n).map(|_| scale * self.unit()).collect()
    }
}

/// Rows in memory with sentinels before, between and behind them.
#[derive(Clone, PartialEq)]
pub(crate) struct Buffer {
    memory: Vec<u32>,
    dtype: DType,
    shape: Shape,
    offset: usize,
    stride: usize,
}

impl Buffer {
    pub(crate) fn new(dtype: DType, shape: impl Into<Shape>, gap: usize) -> Self {
        let shape = shape.into();
        let (offset, stride) = (4 * gap * dtype.size(), shape.cols() + gap);
        let bytes = offset + (shape.rows() * stride + 8) * dtype.size();
        let memory = vec![u32::from_ne_bytes([SENTINEL; 4]); bytes.div_ceil(4)];
        Self { memory, dtype, shape, offset, stride }
    }

    pub(crate) fn floats(dtype: DType, shape: impl Into<Shape>, gap: usize, values: &[f64]) -> Self {
        let mut buffer = Self::new(dtype, shape, gap);
        buffer.fill(|i, cell| match dtype {
            DType::F16 => cell.copy_from_slice(&f16::from_f64(values[i]).to_ne_bytes()),
            DType::BF16 => cell.copy_from_slice(&bf16::from_f64(values[i]).to_ne_bytes()),
            _ => cell.copy_from_slice(&(values[i] as f32).to_ne_bytes()),
        });
        buffer
    }

    pub(crate) fn ids(shape: impl Into<Shape>, gap: usize, values: &[u32]) -> Self {
        let mut buffer = Self::new(DType::U32, shape, gap);
        buffer.fill(|i, cell| cell.copy_from_slice(&values[i].to_ne_bytes()));
        buffer
    }

    fn start(&self, i: usize) -> usize {
        let cols = self.shape.cols();
        self.offset + (i / cols * self.stride + i % cols) * self.dtype.size()
    }

    fn len(&self) -> usize {
        self.shape.rows() * self.shape.cols()
    }

    fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.memory)
    }

    fn fill(&mut self, write: impl Fn(usize, &mut [u8])) {
        for i in 0..self.len() {
            let start = self.start(i);
            write(i, &mut bytemuck::cast_slice_mut(&mut self.memory)[start..start + self.dtype.size()]);
        }
    }

    pub(crate) fn view(&self) -> HostView<'_> {
        let view = View::new(self.bytes(), self.dtype, self.offset, self.shape).unwrap();
        view.with_row_stride(self.stride).unwrap()
    }

    pub(crate) fn view_mut(&mut self) -> HostViewMut<'_> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.memory);
        View::new(bytes, self.dtype, self.offset, self.shape).unwrap().with_row_stride(self.stride).unwrap()
    }

    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    /// The numbers; panics where a sentinel was written over.
    pub(crate) fn values(&self) -> Vec<f64> {
        self.check_sentinels();
        let cell = |i| &self.bytes()[self.start(i)..self.start(i) + self.dtype.size()];
        let value = |i| match self.dtype {
            DType::F16 => f16::from_ne_bytes(cell(i).try_into().unwrap()).to_f64(),
            DType::BF16 => bf16::from_ne_bytes(cell(i).try_into().unwrap()).to_f64(),
            DType::F32 => f64::from(f32::from_ne_bytes(cell(i).try_into().unwrap())),
            _ => f64::from(u32::from_ne_bytes(cell(i).try_into().unwrap())),
        };
        (0..self.len()).map(value).collect()
    }

    pub(crate) fn numbers(&self) -> Vec<u32> {
        assert_eq!(self.dtype, DType::U32);
        self.values().iter().map(|&x| x as u32).collect()
    }

    fn check_sentinels(&self) {
        let mut untouched = self.bytes().to_vec();
        for i in 0..self.len() {
            let start = self.start(i);
            untouched[start..start + self.dtype.size()].fill(SENTINEL);
        }
        assert!(untouched.iter().all(|&byte| byte == SENTINEL), "an operation wrote outside its rows");
    }
}

fn cpus() -> &'static [[Cpu; 3]] {
    static CPUS: OnceLock<Vec<[Cpu; 3]>> = OnceLock::new();
    CPUS.get_or_init(|| {
        let with = |threads, isa| Cpu::with_threads(threads).unwrap().with_isa(isa).unwrap();
        Isa::available().into_iter().map(|isa| [1, 2, 3].map(|threads| with(threads, isa))).collect()
    })
}

/// Runs with every instruction set; the bits must not depend on the run or the number of threads.
pub(crate) fn check(run: impl Fn(&Cpu, &CpuStream) -> Vec<Buffer>, verify: impl Fn(&[Buffer], Status)) {
    for cpus in cpus() {
        let with = |cpu: &Cpu| {
            let stream = cpu.stream().unwrap();
            let outputs = run(cpu, &stream);
            (outputs, stream.status().unwrap())
        };
        let (first, status) = with(&cpus[0]);
        for cpu in [&cpus[0], &cpus[1], &cpus[2]] {
            let (again, status_again) = with(cpu);
            assert!(again == first && status_again == status, "{} threads, {}", cpu.threads(), cpu.isa());
        }
        verify(&first, status);
    }
}

/// Equal up to `tolerance(i)` and the rounding of the format.
pub(crate) fn close(found: &Buffer, expected: &[f64], tolerance: impl Fn(usize) -> f64) {
    let values = found.values();
    assert_eq!(values.len(), expected.len());
    for (i, (&found_value, &expected)) in values.iter().zip(expected).enumerate() {
        let smallest = if found.dtype() == DType::F16 { 6e-8 } else { 1e-38 };
        let allowed = tolerance(i) + 1.01 * found.dtype().epsilon() * expected.abs() + smallest;
        let same = found_value == expected || (found_value.is_nan() && expected.is_nan());
        assert!(
            same || (found_value - expected).abs() <= allowed,
            "{i}: {found_value} is not {expected}, {allowed} allowed"
        );
    }
}
