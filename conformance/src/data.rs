//! Deterministic data, rounded to the stored format first, so that the reference sees exactly what a backend sees.

use fused_moe_core::{DType, HostView, NO_EXPERT, Result, Shape};
use half::{bf16, f16};

/// An operand on the host: its numbers after rounding, and its bytes.
#[derive(Clone, Debug)]
pub struct Tensor {
    dtype: DType,
    shape: Shape,
    values: Values,
    // u64 elements keep the bytes aligned for any format
    storage: Vec<u64>,
}

/// Numbers of a [`Tensor`].
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    /// Of a floating-point format.
    Floats(Vec<f64>),
    /// Of u32.
    Ids(Vec<u32>),
}

impl Tensor {
    /// Numbers rounded to `dtype`; as many as the shape says.
    pub fn floats(dtype: DType, shape: impl Into<Shape>, values: impl IntoIterator<Item = f64>) -> Self {
        let values = values.into_iter().map(|x| round(dtype, x)).collect();
        Self::new(dtype, shape.into(), Values::Floats(values))
    }

    /// u32 numbers; as many as the shape says.
    pub fn ids(shape: impl Into<Shape>, values: Vec<u32>) -> Self {
        Self::new(DType::U32, shape.into(), Values::Ids(values))
    }

    fn new(dtype: DType, shape: Shape, values: Values) -> Self {
        let bytes = encode(dtype, &values);
        let mut storage = vec![0u64; bytes.len().div_ceil(8)];
        bytemuck::cast_slice_mut::<u64, u8>(&mut storage)[..bytes.len()].copy_from_slice(&bytes);
        Self { dtype, shape, values, storage }
    }

    /// Its format.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Its shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Its numbers; empty for u32.
    pub fn as_floats(&self) -> &[f64] {
        match &self.values {
            Values::Floats(values) => values,
            Values::Ids(_) => &[],
        }
    }

    /// Its numbers; empty for a floating-point format.
    pub fn as_ids(&self) -> &[u32] {
        match &self.values {
            Values::Floats(_) => &[],
            Values::Ids(values) => values,
        }
    }

    /// Its elements as they are stored, without gaps.
    pub fn bytes(&self) -> &[u8] {
        let count = match &self.values {
            Values::Floats(values) => values.len(),
            Values::Ids(values) => values.len(),
        };
        &bytemuck::cast_slice::<u64, u8>(&self.storage)[..count * self.dtype.size()]
    }

    /// A view of it.
    ///
    /// Errors: `OutOfBounds` when it has fewer numbers than its shape says.
    pub fn view(&self) -> Result<HostView<'_>> {
        HostView::new(self.bytes(), self.dtype, 0, self.shape)
    }
}

/// The nearest number of a format.
pub fn round(dtype: DType, x: f64) -> f64 {
    match dtype {
        DType::F16 => f16::from_f32(x as f32).to_f64(),
        DType::BF16 => bf16::from_f32(x as f32).to_f64(),
        _ => f64::from(x as f32),
    }
}

/// Numbers to the bytes of a format.
pub fn encode(dtype: DType, values: &Values) -> Vec<u8> {
    match values {
        Values::Ids(ids) => bytemuck::cast_slice(ids).to_vec(),
        Values::Floats(values) => values
            .iter()
            .flat_map(|&x| {
                let bytes = match dtype {
                    DType::F16 => u32::from(f16::from_f32(x as f32).to_bits()),
                    DType::BF16 => u32::from(bf16::from_f32(x as f32).to_bits()),
                    _ => (x as f32).to_bits(),
                };
                bytes.to_ne_bytes().into_iter().take(dtype.size())
            })
            .collect(),
    }
}

/// The bytes of a format to numbers.
pub fn decode(dtype: DType, bytes: &[u8]) -> Values {
    let half = |b: &[u8]| u16::from_ne_bytes([b[0], b[1]]);
    let word = |b: &[u8]| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]);
    let elements = bytes.chunks_exact(dtype.size());
    match dtype {
        DType::U32 => Values::Ids(elements.map(word).collect()),
        DType::F16 => Values::Floats(elements.map(|b| f16::from_bits(half(b)).to_f64()).collect()),
        DType::BF16 => Values::Floats(elements.map(|b| bf16::from_bits(half(b)).to_f64()).collect()),
        _ => Values::Floats(elements.map(|b| f64::from(f32::from_bits(word(b)))).collect()),
    }
}

/// A source of numbers: the same name gives the same numbers, everywhere and in any order of asking.
#[derive(Clone, Copy, Debug)]
pub struct Data {
    seed: u64,
}

/// How slots spread over the experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spread {
    /// Distinct experts of a token, evenly drawn.
    Even,
    /// Low experts drawn far more often; some get no token.
    Skewed,
    /// Every token to the same K experts, from this one on.
    Same(usize),
    /// Every slot to this one expert.
    One(usize),
    /// Even, every third slot going nowhere.
    Holes,
    /// Even, every fifth id naming no expert that exists.
    Bad,
    /// No slot goes anywhere.
    Nowhere,
}

impl Data {
    /// The numbers of this name.
    pub fn new(name: &str) -> Self {
        Self { seed: 0xcbf2_9ce4_8422_2325 }.of(name)
    }

    /// The numbers of one operand under this name (FNV-1a).
    pub fn of(self, operand: &str) -> Self {
        let seed = operand.bytes().fold(self.seed, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3));
        Self { seed }
    }

    /// 64 bits for index `i` (SplitMix64: Steele, Lea, Flood, OOPSLA 2014).
    pub fn bits(self, i: u64) -> u64 {
        let mut z = self.seed.wrapping_add(i.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A whole number below `n`.
    pub fn below(self, i: u64, n: usize) -> usize {
        ((u128::from(self.bits(i)) * n as u128) >> 64) as usize
    }

    /// From 0 to 1.
    pub fn uniform(self, i: u64) -> f64 {
        (self.bits(i) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Nearly normal, mean 0, variance 1, below 3.5 in magnitude: four uniform numbers added.
    pub fn gauss(self, i: u64) -> f64 {
        let bits = self.bits(i);
        let sum: u64 = (0..4).map(|part| (bits >> (16 * part)) & 0xffff).sum();
        (sum as f64 / 65536.0 - 2.0) * 3f64.sqrt()
    }

    /// Nearly normal numbers of a standard deviation, none of them zero.
    pub fn normal(self, dtype: DType, shape: impl Into<Shape>, deviation: f64) -> Tensor {
        self.shaped(dtype, shape, |data, i| data.gauss(i) * deviation, deviation)
    }

    /// Like hidden states: normal, a few channels several times larger.
    pub fn tokens(self, dtype: DType, shape: impl Into<Shape>) -> Tensor {
        let shape = shape.into();
        let cols = shape.cols().max(1) as u64;
        self.shaped(dtype, shape, |data, i| data.gauss(i) * if i % cols % 61 == 5 { 5.0 } else { 1.0 }, 1.0)
    }

    /// Like norm weights, expert scales and routing weights: evenly from `low` to `high`, both positive.
    pub fn between(self, dtype: DType, shape: impl Into<Shape>, low: f64, high: f64) -> Tensor {
        self.shaped(dtype, shape, |data, i| low + (high - low) * data.uniform(i), low)
    }

    fn shaped(self, dtype: DType, shape: impl Into<Shape>, value: impl Fn(Self, u64) -> f64, unit: f64) -> Tensor {
        let shape = shape.into();
        let count = shape.rows() as u64 * shape.cols() as u64;
        let nonzero = |x: f64| if round(dtype, x) == 0.0 { unit / 64.0 } else { x };
        Tensor::floats(dtype, shape, (0..count).map(|i| nonzero(value(self, i))))
    }

    /// Expert ids `[T, K]`.
    pub fn routes(self, [tokens, top_k, experts]: [usize; 3], spread: Spread) -> Tensor {
        let mut ids = Vec::with_capacity(tokens * top_k);
        for token in 0..tokens {
            let first = ids.len();
            for k in 0..top_k {
                let slot = (token * top_k + k) as u64;
                let mut id = match spread {
                    Spread::Same(expert) => (expert + k) % experts,
                    Spread::One(expert) => expert % experts,
                    Spread::Skewed => ((self.uniform(slot).powi(3)) * experts as f64) as usize,
                    _ => self.below(slot, experts),
                };
                let distinct = !matches!(spread, Spread::One(_)) && top_k <= experts;
                while distinct && ids[first..].contains(&(id as u32)) {
                    id = (id + 1) % experts;
                }
                ids.push(id as u32);
            }
        }
        for (slot, id) in ids.iter_mut().enumerate() {
            match spread {
                Spread::Holes if slot % 3 == 1 => *id = NO_EXPERT,
                Spread::Bad if slot % 5 == 2 => *id = (experts + slot) as u32,
                Spread::Bad if slot % 5 == 3 => *id = NO_EXPERT - 1,
                Spread::Nowhere => *id = NO_EXPERT,
                _ => {}
            }
        }
        Tensor::ids([tokens, top_k], ids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_name_gives_the_same_numbers() {
        let a = Data::new("gate").of("x").normal(DType::F32, [3, 5], 1.0);
        assert_eq!(a.bytes(), Data::new("gate").of("x").normal(DType::F32, [3, 5], 1.0).bytes());
        assert_ne!(a.bytes(), Data::new("gate").of("y").normal(DType::F32, [3, 5], 1.0).bytes());
    }

    #[test]
    fn normal_is_normal_and_never_zero() {
        let x = Data::new("n").normal(DType::F16, [100, 100], 2.0);
        let mean = x.as_floats().iter().sum::<f64>() / 1e4;
        let square = x.as_floats().iter().map(|x| x * x).sum::<f64>() / 1e4;
        assert!(mean.abs() < 0.1 && (square / 4.0 - 1.0).abs() < 0.05, "{mean} {square}");
        assert!(x.as_floats().iter().all(|&x| x != 0.0));
    }

    #[test]
    fn values_are_those_of_the_bytes() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let x = Data::new("r").tokens(dtype, [7, 64]);
            assert_eq!(decode(dtype, x.bytes()), Values::Floats(x.as_floats().to_vec()));
            assert!(x.view().is_ok());
        }
        let ids = Tensor::ids([2], vec![1, u32::MAX]);
        assert_eq!(decode(DType::U32, ids.bytes()), Values::Ids(vec![1, u32::MAX]));
    }

    #[test]
    fn routes_are_distinct_in_a_token() {
        let routes = Data::new("routes").routes([50, 7, 8], Spread::Skewed);
        for row in routes.as_ids().chunks(7) {
            let mut row = row.to_vec();
            row.sort_unstable();
            row.dedup();
            assert_eq!(row.len(), 7);
        }
        assert!(Data::new("b").routes([50, 2, 8], Spread::Bad).as_ids().iter().any(|&id| id >= 8 && id != NO_EXPERT));
        assert_eq!(Data::new("o").routes([2, 2, 8], Spread::One(3)).as_ids(), [3; 4]);
    }
}
