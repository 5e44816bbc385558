// Groups the slots by expert, in one block: for few slots.

extern "C" __global__ void __launch_bounds__(1024) permute(const __grid_constant__ PermuteParams p) {
    take_turn();
    extern __shared__ u32 counts[];
    __shared__ u32 parts[32];
    const u32 experts = p.experts_total;
    u32* rows = counts + (blockDim.x / 32) * (u64)experts;
    const Slots block = {0, p.slots};
    count_block(p, block, counts, [&](u64 e, u32 n) { rows[e] = n; });
    scan_block(rows, experts, parts);
    for (u64 i = threadIdx.x; i < (blockDim.x / 32) * (u64)experts; i += blockDim.x) counts[i] += rows[i % experts];
    u32* offsets = reinterpret_cast<u32*>(p.offsets.data);
    for (u32 e = threadIdx.x; e <= experts; e += blockDim.x) offsets[e] = rows[e];
    if (p.counters && threadIdx.x < COUNTERS) reinterpret_cast<u32*>(p.counters)[threadIdx.x] = 0;
    __syncthreads();
    scatter_block(p, block, counts);
    u32* row_slot = reinterpret_cast<u32*>(p.row_slot.data);
    for (u64 r = rows[experts] + threadIdx.x; r < p.slots; r += blockDim.x) row_slot[r] = NO_ROW;
}
