// out = from, rows of 4-byte elements.

extern "C" __global__ void __launch_bounds__(256) copy(const __grid_constant__ CopyParams p) {
    for (u64 r = blockIdx.y; r < p.rows; r += gridDim.y)
        for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < p.width; i += (u64)gridDim.x * 256)
            row_of<u32>(p.out, r)[i] = row_of<const u32>(p.from, r)[i];
}
