//! One buffer that several threads write at once.

use super::simd::{MAX_LANES, Simd, Task};
use bytemuck::{cast, try_cast_slice_mut};
use fused_moe_core::dtype::{Element, Float};
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering::Relaxed};

const _: () = assert!(align_of::<AtomicU16>() == align_of::<u16>() && align_of::<AtomicU32>() == align_of::<u32>());

/// A mutable slice that several threads may store to, each its own elements.
///
/// Two threads that store to one element are a mistake, but not undefined behaviour: one of the values stays.
/// The elements can be read when the borrow ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SharedSlice<'a, T> {
    cells: Cells<'a>,
    element: PhantomData<&'a [T]>,
}

/// The elements' bits.
#[derive(Clone, Copy, Debug)]
enum Cells<'a> {
    Two(&'a [AtomicU16]),
    Four(&'a [AtomicU32]),
}

impl<'a, T: Element> SharedSlice<'a, T> {
    /// Shares a slice for as long as it is borrowed.
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        // An element has as many bits as the integer that it is cast to, so neither cast fails.
        let cells = match size_of::<T>() {
            2 => {
                let bits: &'a mut [u16] = try_cast_slice_mut(slice).unwrap_or_default();
                // SAFETY: an atomic integer has the size, the bits and (as asserted above) the alignment of the integer,
                // and nothing else reaches the elements while this borrow of them lasts.
                Cells::Two(unsafe { &*(std::ptr::from_mut(bits) as *const [AtomicU16]) })
            }
            _ => {
                let bits: &'a mut [u32] = try_cast_slice_mut(slice).unwrap_or_default();
                // SAFETY: as above.
                Cells::Four(unsafe { &*(std::ptr::from_mut(bits) as *const [AtomicU32]) })
            }
        };
        Self { cells, element: PhantomData }
    }

    /// Where `rows` rows of `columns` elements lie, `stride` apart, the first from `start` on; none where they do not fit.
    pub(super) fn place(self, start: usize, [rows, columns, stride]: [usize; 3]) -> Option<*mut T> {
        let (from, len): (*const T, usize) = match self.cells {
            Cells::Two(cells) => (cells.as_ptr().cast(), cells.len()),
            Cells::Four(cells) => (cells.as_ptr().cast(), cells.len()),
        };
        let last = rows.saturating_sub(1).checked_mul(stride)?.checked_add(columns)?.checked_add(start)?;
        (last <= len).then(|| from.wrapping_add(start).cast_mut())
    }

    /// `slice[index] = value`; nothing where the index is out of range.
    pub(crate) fn store(self, index: usize, value: T) {
        self.store_slice(index, &[value]);
    }

    /// `slice[start..][..values.len()] = values`; what does not fit is left out.
    pub(crate) fn store_slice(self, start: usize, values: &[T]) {
        match self.cells {
            Cells::Two(cells) => {
                let (cells, values) = common(cells.get(start..).unwrap_or_default(), values);
                for (cell, value) in cells.iter().zip(values) {
                    cell.store(cast(*value), Relaxed);
                }
            }
            Cells::Four(cells) => {
                let (cells, values) = common(cells.get(start..).unwrap_or_default(), values);
                for (cell, value) in cells.iter().zip(values) {
                    cell.store(cast(*value), Relaxed);
                }
            }
        }
    }

    /// `to = slice[start..][..to.len()]`; what does not exist is left as it is. What another thread stores meanwhile may or
    /// may not be seen.
    pub(crate) fn load_slice(self, start: usize, to: &mut [T]) {
        match self.cells {
            Cells::Two(cells) => {
                for (cell, value) in cells.get(start..).unwrap_or_default().iter().zip(to) {
                    *value = cast(cell.load(Relaxed));
                }
            }
            Cells::Four(cells) => {
                for (cell, value) in cells.get(start..).unwrap_or_default().iter().zip(to) {
                    *value = cast(cell.load(Relaxed));
                }
            }
        }
    }
}

/// Both cut to the shorter length.
fn common<'a, C, T>(cells: &'a [C], values: &'a [T]) -> (&'a [C], &'a [T]) {
    let n = cells.len().min(values.len());
    (&cells[..n], &values[..n])
}

/// `cells[start..] = values`, each the nearest to its value; what does not fit is left out.
pub(super) struct Store<'a, Y> {
    pub(super) values: &'a [f32],
    pub(super) cells: SharedSlice<'a, Y>,
    pub(super) start: usize,
    /// Past the caches, where whole vectors are aligned: then they count as stored after [`Simd::settle`].
    pub(super) stream: bool,
}

impl<Y: Float> Task for Store<'_, Y> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { values, cells, start, stream } = self;
        let whole = &values[..values.len() / S::LANES * S::LANES];
        let mut done = 0;
        if let Some(to) = cells.place(start, [1, whole.len(), whole.len()]) {
            let stream = stream && to.addr().is_multiple_of(S::LANES * size_of::<Y>());
            for (i, values) in whole.chunks_exact(S::LANES).enumerate() {
                // SAFETY: all elements of `whole` have room at `to`, as `place` says, and the elements of a shared slice are
                // atomics; where they are streamed the first vector is aligned, and so are those that follow it.
                unsafe {
                    let to = to.add(i * S::LANES);
                    if stream {
                        s.store_shared::<Y, true>(s.load(values), to);
                    } else {
                        s.store_shared::<Y, false>(s.load(values), to);
                    }
                }
            }
            done = whole.len();
        }
        for (n, values) in values[done..].chunks(S::LANES).enumerate() {
            let mut lanes = [Y::from_f32(0.0); MAX_LANES];
            s.store(s.load(values), &mut lanes[..values.len()]);
            cells.store_slice(start.saturating_add(done + n * S::LANES), &lanes[..values.len()]);
        }
    }
}
