//! Matrices as the tensor copy engine of sm_90 knows them.

use crate::device::driver_error;
use crate::error::Result;
use crate::launch::Tensor;
use cudarc::driver::DriverError;
use cudarc::driver::sys::{
    CUresult, CUtensorMap, CUtensorMapDataType_enum as DataType, CUtensorMapFloatOOBfill_enum as Outside,
    CUtensorMapInterleave_enum as Interleave, CUtensorMapL2promotion_enum as Promotion,
    CUtensorMapSwizzle_enum as Swizzle, cuTensorMapEncodeTiled,
};
use fused_moe_core::DType;
use std::ffi::c_void;

/// What the copy engine is told of a matrix: the driver's 128 bytes.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct TensorMap([u64; 16]);

const _: () = assert!(size_of::<TensorMap>() == size_of::<CUtensorMap>());

/// Elements of 2 bytes in a box's row: what one swizzled line of shared memory holds.
pub(crate) const BOX_COLUMNS: u32 = 64;

impl TensorMap {
    /// A matrix of 2-byte elements, from which boxes of so many rows and 64 columns are copied: in shared memory rows of
    /// 128 bytes, whose pieces of 16 are stored at `piece ^ (row % 8)`; zeros for what lies outside.
    ///
    /// Address and row stride are multiples of 16 bytes. Errors: `Driver`.
    pub(crate) fn of_rows(
        matrix: Tensor,
        dtype: DType,
        [rows, columns]: [u64; 2],
        box_rows: u32,
        during: &'static str,
    ) -> Result<Self> {
        let (sizes, distances) = ([columns, rows], [matrix.stride]);
        encode(matrix.data, dtype, (sizes, distances, [BOX_COLUMNS, box_rows]), during)
    }

    /// So many matrices of so many rows and columns, `distance` elements from one to the next; a box is of one of them alone.
    ///
    /// Address, row stride and distance are multiples of 16 bytes. Errors: `Driver`.
    pub(crate) fn of_stack(
        (matrix, distance): (Tensor, u64),
        dtype: DType,
        [matrices, rows, columns]: [u64; 3],
        box_rows: u32,
        during: &'static str,
    ) -> Result<Self> {
        let (sizes, distances) = ([columns, rows, matrices], [matrix.stride, distance]);
        encode(matrix.data, dtype, (sizes, distances, [BOX_COLUMNS, box_rows, 1]), during)
    }

    /// The same, from which boxes of 64 columns and four groups of `8 N` rows are copied, of each group first every Nth row,
    /// then the rows after those, and so on: so a lane of the tensor cores has N neighbours. Rows come in whole groups.
    ///
    /// Errors: as [`of_stack`](Self::of_stack).
    pub(crate) fn of_groups(
        (matrix, distance): (Tensor, u64),
        dtype: DType,
        [matrices, rows, columns]: [u64; 3],
        neighbours: u64,
        during: &'static str,
    ) -> Result<Self> {
        let (sizes, row) = ([columns, 8, neighbours, rows / (8 * neighbours), matrices], matrix.stride);
        let distances = [row * neighbours, row, row * 8 * neighbours, distance];
        encode(matrix.data, dtype, (sizes, distances, [BOX_COLUMNS, 8, neighbours as u32, 4, 1]), during)
    }
}

/// N sizes, the innermost first; from the second on, the distance in elements of what lies side by side; a box.
fn encode<const N: usize, const M: usize>(
    address: u64,
    dtype: DType,
    (sizes, distances, part): ([u64; N], [u64; M], [u32; N]),
    during: &'static str,
) -> Result<TensorMap> {
    const { assert!(M + 1 == N) }
    let format = match dtype {
        DType::F16 => DataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        _ => DataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    };
    let (distances, steps) = (distances.map(|elements| elements * 2), [1; N]);
    let mut map = TensorMap::default();
    // SAFETY: writes 128 bytes to a place aligned to 64, from arrays of the lengths that this rank calls for; the address is
    // noted, not read.
    let code = unsafe {
        cuTensorMapEncodeTiled(
            (&raw mut map).cast::<CUtensorMap>(),
            format,
            N as u32,
            address as *mut c_void,
            sizes.as_ptr(),
            distances.as_ptr(),
            part.as_ptr(),
            steps.as_ptr(),
            Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            Outside::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    match code {
        CUresult::CUDA_SUCCESS => Ok(map),
        code => Err(driver_error(during, DriverError(code))),
    }
}
