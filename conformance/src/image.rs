//! A buffer around an operand: sentinels on all sides and between the rows, poison where results are to come.

use fused_moe_core::{DType, Shape};

/// What surrounds an operand; no format's ordinary number.
const SENTINEL: u8 = 0xc3;
/// Bytes on either side of an operand.
const MARGIN: usize = 256;

/// How operands lie in their buffers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Placement {
    /// Rows without gaps, at an aligned offset.
    #[default]
    Plain,
    /// Rows apart, at an offset that is a multiple of the element alone.
    Strided,
    /// All of the buffer, nothing around it.
    Tight,
}

/// Where the elements of an operand lie in its buffer.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Format of the elements.
    pub dtype: DType,
    /// Shape of the operand.
    pub shape: Shape,
    /// Bytes of sentinels, before and after.
    pub margin: usize,
    /// First element, in bytes.
    pub offset: usize,
    /// Distance of rows, in elements.
    pub row_stride: usize,
}

impl Window {
    /// The `index`-th operand of a call: no two lie alike.
    pub fn new(dtype: DType, shape: Shape, placement: Placement, index: usize) -> Self {
        let (margin, shift, gap) = match placement {
            Placement::Plain => (MARGIN, 0, 0),
            Placement::Strided => (MARGIN, 2 * index + 1, 1 + 2 * index),
            Placement::Tight => (0, 0, 0),
        };
        Self { dtype, shape, margin, offset: margin + shift * dtype.size(), row_stride: shape.cols() + gap }
    }

    /// Bytes of the buffer.
    pub fn bytes(&self) -> usize {
        let elements = self.shape.rows().saturating_mul(self.row_stride);
        self.offset + elements * self.dtype.size() + self.margin
    }

    fn row(&self, row: usize) -> std::ops::Range<usize> {
        let first = self.offset + row * self.row_stride * self.dtype.size();
        first..first + self.shape.cols() * self.dtype.size()
    }

    /// The buffer with these elements in it.
    pub fn image(&self, elements: &[u8]) -> Vec<u8> {
        let mut image = vec![SENTINEL; self.bytes()];
        let width = self.shape.cols() * self.dtype.size();
        for row in 0..self.shape.rows() {
            image[self.row(row)].copy_from_slice(&elements[row * width..(row + 1) * width]);
        }
        image
    }

    /// The buffer with nothing but this byte in the operand.
    pub fn poisoned(&self, poison: u8) -> Vec<u8> {
        self.image(&vec![poison; self.shape.rows() * self.shape.cols() * self.dtype.size()])
    }

    /// The elements in a buffer, without gaps.
    pub fn elements(&self, image: &[u8]) -> Vec<u8> {
        (0..self.shape.rows()).flat_map(|row| image[self.row(row)].iter().copied()).collect()
    }

    /// The first byte outside the operand's first `written` rows that has changed, in words.
    pub fn trespass(&self, written: usize, before: &[u8], after: &[u8]) -> Option<String> {
        let mut at = 0;
        let rows = (0..written.min(self.shape.rows())).map(|row| self.row(row));
        for inside in rows.chain(std::iter::once(before.len()..before.len())) {
            if let Some(byte) = (at..inside.start).find(|&byte| before[byte] != after[byte]) {
                return Some(self.describe(byte));
            }
            at = inside.end;
        }
        None
    }

    fn describe(&self, byte: usize) -> String {
        let size = self.dtype.size() as isize;
        let relative = (byte as isize - self.offset as isize).div_euclid(size);
        let stride = self.row_stride.max(1) as isize;
        let (row, column) = (relative.div_euclid(stride), relative.rem_euclid(stride));
        let (rows, cols) = (self.shape.rows() as isize, self.shape.cols() as isize);
        let past =
            if rows == 0 || cols == 0 { relative } else { relative - (rows - 1) * self.row_stride as isize - cols };
        if relative < 0 {
            format!("{} elements before the operand were overwritten", -relative)
        } else if past >= 0 {
            format!("{} elements past the operand were overwritten", past + 1)
        } else if column >= cols {
            format!("the gap after row {row} was overwritten")
        } else {
            format!("row {row}, column {column} is to be left alone and was overwritten")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(placement: Placement) -> Window {
        Window::new(DType::F16, [3, 5].into(), placement, 2)
    }

    #[test]
    fn elements_go_in_and_come_out() {
        for placement in [Placement::Plain, Placement::Strided, Placement::Tight] {
            let elements: Vec<u8> = (0..30).collect();
            let image = window(placement).image(&elements);
            assert_eq!(window(placement).elements(&image), elements);
        }
        assert!(Window::new(DType::F32, [0, 5].into(), Placement::Strided, 1).elements(&[0; 600]).is_empty());
    }

    #[test]
    fn every_byte_outside_is_guarded() {
        for placement in [Placement::Plain, Placement::Strided] {
            let window = window(placement);
            let before = window.poisoned(0xff);
            for byte in 0..before.len() {
                let mut after = before.clone();
                after[byte] ^= 1;
                let inside = (0..3).any(|row| window.row(row).contains(&byte));
                assert_eq!(window.trespass(3, &before, &after).is_none(), inside, "byte {byte}");
                let written = (0..2).any(|row| window.row(row).contains(&byte));
                assert_eq!(window.trespass(2, &before, &after).is_none(), written, "byte {byte}");
            }
        }
    }

    #[test]
    fn says_where() {
        let window = window(Placement::Strided);
        let before = window.poisoned(0xff);
        let touched = |byte: usize, written| {
            let mut after = before.clone();
            after[byte] ^= 1;
            window.trespass(written, &before, &after).unwrap_or_default()
        };
        assert_eq!(touched(window.offset - 1, 3), "1 elements before the operand were overwritten");
        assert_eq!(touched(window.row(1).end, 3), "the gap after row 1 was overwritten");
        assert_eq!(touched(window.row(2).end + 1, 3), "1 elements past the operand were overwritten");
        assert_eq!(touched(window.row(2).start, 2), "row 2, column 0 is to be left alone and was overwritten");
    }
}
