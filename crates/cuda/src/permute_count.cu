// First of three: the experts' slots of each block. They are left where the block later writes slot_row, so that the sort
// needs no memory of its own: a block has E slots at least.

extern "C" __global__ void __launch_bounds__(1024) permute_count(const __grid_constant__ PermuteParams p) {
    take_turn();
    extern __shared__ u32 counts[];
    const u64 begin = blockIdx.x * p.slots_per_block;
    const Slots block = {begin, blockIdx.x + 1 == gridDim.x ? p.slots : begin + p.slots_per_block};
    u32* kept = reinterpret_cast<u32*>(p.slot_row.data) + begin;
    count_block(p, block, counts, [&](u64 e, u32 n) { kept[e] = n; });
}
