// The rows of each expert in tiles of at most tile_rows, in one block.

extern "C" __global__ void __launch_bounds__(1024) tile_schedule(const __grid_constant__ TileScheduleParams p) {
    extern __shared__ u32 first_tile[];
    __shared__ u32 parts[32];
    const u32* offsets = reinterpret_cast<const u32*>(p.offsets.data);
    for (u32 e = threadIdx.x; e < p.experts_total; e += 1024) {
        const u32 rows = offsets[e + 1] > offsets[e] ? offsets[e + 1] - offsets[e] : 0;
        first_tile[e] = rows / p.tile_rows + (rows % p.tile_rows != 0);
    }
    __syncthreads();
    scan_block(first_tile, p.experts_total, parts);
    const u32 all = first_tile[p.experts_total];
    const u32 count = all < p.capacity ? all : (u32)p.capacity;
    if (threadIdx.x == 0) *reinterpret_cast<u32*>(p.count.data) = count;
    for (u64 i = threadIdx.x; i < count; i += 1024) {
        u32 low = 0, high = p.experts_total;
        while (high - low > 1) {
            const u32 middle = (low + high) / 2;
            if (first_tile[middle] <= i) low = middle;
            else high = middle;
        }
        const u32 row = offsets[low] + ((u32)i - first_tile[low]) * p.tile_rows;
        const u32 left = offsets[low + 1] - row;
        u32* tile = row_of<u32>(p.tiles, i);
        tile[0] = low;
        tile[1] = row;
        tile[2] = left < p.tile_rows ? left : p.tile_rows;
    }
}
