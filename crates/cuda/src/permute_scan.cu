// Second of three: the first row of each expert, and of each expert in each block. `parts` threads an expert share its blocks.

extern "C" __global__ void __launch_bounds__(1024) permute_scan(const __grid_constant__ PermuteParams p) {
    take_turn();
    extern __shared__ u32 rows[];
    __shared__ u32 scratch[32];
    const u32 parts = p.parts;
    const u32 experts = p.experts_total;
    u32* kept = reinterpret_cast<u32*>(p.slot_row.data);
    // sums [parts][E]: slots of an expert in a part of the blocks
    u32* sums = rows + experts + 1;
    const u64 share = (p.blocks + parts - 1) / parts;
    for (u32 i = threadIdx.x; i < parts * experts; i += 1024) {
        const u32 e = i % experts;
        const u64 first = i / experts * share, end = first + share < p.blocks ? first + share : p.blocks;
        u32 sum = 0;
#pragma unroll 8
        for (u64 b = first; b < end; b++) sum += kept[b * p.slots_per_block + e];
        sums[i] = sum;
    }
    __syncthreads();
    for (u32 e = threadIdx.x; e < experts; e += 1024) {
        u32 before = 0;
        for (u32 i = e; i < parts * experts; i += experts) {
            const u32 n = sums[i];
            sums[i] = before;
            before += n;
        }
        rows[e] = before;
    }
    __syncthreads();
    scan_block(rows, experts, scratch);
    if (p.counters && threadIdx.x < COUNTERS) reinterpret_cast<u32*>(p.counters)[threadIdx.x] = 0;
    u32* offsets = reinterpret_cast<u32*>(p.offsets.data);
    for (u32 e = threadIdx.x; e <= experts; e += 1024) offsets[e] = rows[e];
    for (u32 i = threadIdx.x; i < parts * experts; i += 1024) {
        const u32 e = i % experts;
        const u64 first = i / experts * share, end = first + share < p.blocks ? first + share : p.blocks;
        u32 row = rows[e] + sums[i];
#pragma unroll 8
        for (u64 b = first; b < end; b++) {
            const u32 n = kept[b * p.slots_per_block + e];
            kept[b * p.slots_per_block + e] = row;
            row += n;
        }
    }
}
