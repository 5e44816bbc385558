// A ring of STAGES stages in shared memory, each with a barrier that says it is full and one that says it is free.

struct Ring {
    u32 stages, full, empty;
};

// A stage of the ring and the parity of its use.
struct Place {
    u32 stage, parity;

    __device__ __forceinline__ void skip(u32 n) {
        const u32 to = stage + n;
        parity ^= to / STAGES & 1;
        stage = to % STAGES;
    }
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// Stages that are of no use to the warp pass; `free` tells that it is done with one.
template <class Free> __device__ __forceinline__ void pass_stages(const Ring& ring, Place& at, u32 stages, const Free& free) {
#pragma unroll 1
    for (u32 i = 0; i < stages; i++, at.next()) {
        barrier_wait(ring.full + at.stage * 8, at.parity);
        free(at.stage);
    }
}
