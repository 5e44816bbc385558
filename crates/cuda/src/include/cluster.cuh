// The blocks of a cluster, which write to each other's shared memory. Before sm_90 a cluster is one block.

// All threads of the cluster have come here.
__device__ __forceinline__ void meet_cluster() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// What a block is sent: it has come when all bytes have that the block expects.
struct Inbox {
    u64 barrier;

    // By one thread, before the cluster meets.
    __device__ __forceinline__ void expect(u32 bytes) {
#if __CUDA_ARCH__ >= 900
        const u32 at = (u32)__cvta_generic_to_shared(&barrier);
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(at) : "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
#endif
    }

    // A word to the same place in a block, whose inbox is at the same place as this one.
    __device__ __forceinline__ void send(u32* here, u32 word, u32 block) {
#if __CUDA_ARCH__ >= 900
        u32 to, told;
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"((u32)__cvta_generic_to_shared(here)), "r"(block));
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(told) : "r"((u32)__cvta_generic_to_shared(&barrier)), "r"(block));
        asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(to), "r"(word), "r"(told) : "memory");
#endif
    }

    __device__ __forceinline__ void wait() {
#if __CUDA_ARCH__ >= 900
        const u32 at = (u32)__cvta_generic_to_shared(&barrier);
        u32 there = 0;
        while (!there)
            asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p;}" : "=r"(there) : "r"(at) : "memory");
#endif
    }
};
