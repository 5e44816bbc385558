// out = 0, elements of whatever format by their size.

extern "C" __global__ void __launch_bounds__(256) zero(const __grid_constant__ ZeroParams p) {
    for (u64 r = blockIdx.y; r < p.rows; r += gridDim.y)
        for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < p.width; i += (u64)gridDim.x * 256) {
            if (p.out.dtype == DTYPE_F16 || p.out.dtype == DTYPE_BF16) row_of<u16>(p.out, r)[i] = 0;
            else row_of<u32>(p.out, r)[i] = 0;
        }
}
