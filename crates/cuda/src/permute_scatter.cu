// Third of three: each block sorts its slots to their rows.

extern "C" __global__ void __launch_bounds__(1024) permute_scatter(const __grid_constant__ PermuteParams p) {
    take_turn();
    extern __shared__ u32 counts[];
    const u32 experts = p.experts_total;
    const u64 begin = blockIdx.x * p.slots_per_block;
    const Slots block = {begin, blockIdx.x + 1 == gridDim.x ? p.slots : begin + p.slots_per_block};
    const u32* rows = reinterpret_cast<const u32*>(p.slot_row.data) + begin;
    count_block(p, block, counts, [](u64, u32) {});
    for (u64 i = threadIdx.x; i < (blockDim.x / 32) * (u64)experts; i += blockDim.x) counts[i] += rows[i % experts];
    __syncthreads();
    scatter_block(p, block, counts);
    u32* row_slot = reinterpret_cast<u32*>(p.row_slot.data);
    const u64 end = reinterpret_cast<const u32*>(p.offsets.data)[experts];
    for (u64 r = end + (u64)blockIdx.x * blockDim.x + threadIdx.x; r < p.slots; r += (u64)gridDim.x * blockDim.x)
        row_slot[r] = NO_ROW;
}
