// A stable counting sort of a block's slots: warp by warp in slot order, so that no order of arrival shows.
//
// counts [warps][E] in shared memory: first how many slots of each expert a warp has, then where its next one goes.

struct Slots {
    u64 begin, end;
};

// The expert of a slot; NO_EXPERT where it gets no row.
__device__ __forceinline__ u32 expert_of(const PermuteParams& p, u64 slot, u32& status) {
    const u32 e = row_of<const u32>(p.experts, (u32)slot / p.top_k)[(u32)slot % p.top_k];
    if (e >= p.experts_total && e != NO_EXPERT) status = STATUS_EXPERT_OUT_OF_RANGE;
    return e >= p.first && e < p.end ? e : NO_EXPERT;
}

__device__ __forceinline__ Slots slots_of_warp(Slots block) {
    const u64 rounds = (block.end - block.begin + blockDim.x - 1) / blockDim.x;
    Slots s = {block.begin + threadIdx.x / 32 * rounds * 32, 0};
    s.end = s.begin + rounds * 32 < block.end ? s.begin + rounds * 32 : block.end;
    return s;
}

// Calls visit(slot, expert, rank among the 32, how many of the 32 have the expert, whether it is the last of them).
template <class Visit> __device__ __forceinline__ u32 for_each_slot(const PermuteParams& p, Slots s, Visit visit) {
    const u32 lane = threadIdx.x % 32;
    u32 status = 0;
    for (u64 base = s.begin; base < s.end; base += 32) {
        const u64 slot = base + lane;
        const u32 e = slot < s.end ? expert_of(p, slot, status) : NO_EXPERT;
        const u32 peers = __match_any_sync(0xffffffffu, e);
        const u32 rank = __popc(peers & ((1u << lane) - 1));
        visit(slot, e, rank, __popc(peers));
        __syncwarp();
    }
    return status;
}

// counts[w][e] = slots of expert e in warps before w; totals of the block through `total(e, n)`.
template <class Total> __device__ __forceinline__ void count_block(const PermuteParams& p, Slots block, u32* counts, Total total) {
    const u64 experts = p.experts_total;
    for (u64 i = threadIdx.x; i < blockDim.x / 32 * experts; i += blockDim.x) counts[i] = 0;
    __syncthreads();
    u32* mine = counts + threadIdx.x / 32 * experts;
    const u32 status = for_each_slot(p, slots_of_warp(block), [&](u64, u32 e, u32 rank, u32 n) {
        if (e != NO_EXPERT && rank == 0) mine[e] += n;
    });
    raise(p.status, status);
    __syncthreads();
    for (u64 e = threadIdx.x; e < experts; e += blockDim.x) {
        u32 before = 0;
        for (u32 w = 0; w < blockDim.x / 32; w++) {
            const u32 n = counts[w * experts + e];
            counts[w * experts + e] = before;
            before += n;
        }
        total(e, before);
    }
    __syncthreads();
}

// Writes row_slot and slot_row of the block's slots; counts[w][e] holds the row of the warp's next slot of e.
__device__ __forceinline__ void scatter_block(const PermuteParams& p, Slots block, u32* counts) {
    u32* row_slot = reinterpret_cast<u32*>(p.row_slot.data);
    u32* slot_row = reinterpret_cast<u32*>(p.slot_row.data);
    u32* mine = counts + threadIdx.x / 32 * (u64)p.experts_total;
    const Slots s = slots_of_warp(block);
    for_each_slot(p, s, [&](u64 slot, u32 e, u32 rank, u32 n) {
        u32 row = NO_ROW;
        if (e != NO_EXPERT) {
            row = mine[e] + rank;
            row_slot[row] = (u32)slot;
        }
        __syncwarp();
        if (e != NO_EXPERT && rank == 0) mine[e] += n;
        if (slot < s.end) slot_row[slot] = row;
    });
}

// Exclusive sums of values[0 .. n] in shared memory, by the whole block; the last entry becomes the total.
__device__ __forceinline__ void scan_block(u32* values, u32 n, u32* parts) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 carry = 0;
    for (u32 base = 0; base < n; base += blockDim.x) {
        const u32 i = base + threadIdx.x;
        const u32 own = i < n ? values[i] : 0;
        u32 sum = own;
#pragma unroll
        for (int d = 1; d < 32; d <<= 1) {
            const u32 left = __shfl_up_sync(0xffffffffu, sum, d);
            if (lane >= d) sum += left;
        }
        if (lane == 31) parts[warp] = sum;
        __syncthreads();
        u32 before = carry, all = carry;
        for (u32 w = 0; w < blockDim.x / 32; w++) {
            if (w < warp) before += parts[w];
            all += parts[w];
        }
        if (i < n) values[i] = before + sum - own;
        carry = all;
        __syncthreads();
    }
    if (threadIdx.x == 0) values[n] = carry;
    __syncthreads();
}
