// sm_90a: barriers in shared memory, the tensor copy engine, and products of a warpgroup.

// What the copy engine knows of a matrix; the host fills it in.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives; the phase also waits for so many bytes of the copy engine.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Arrives once the thread's asynchronous copies have.
__device__ __forceinline__ void barrier_arrive_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// The address of the same place in the shared memory of a block of the cluster.
__device__ __forceinline__ u32 address_in(u32 address, u32 block) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
    return there;
}
// Arrives at the barrier of a block of the cluster. Nothing is released: what would be makes the thread wait for all it wrote.
__device__ __forceinline__ void barrier_arrive_there(u32 barrier) {
    asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// A word to the shared memory of a block of the cluster, whose barrier waits for its 4 bytes.
__device__ __forceinline__ void send_word(u32 to, u32 barrier, u32 word) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(to), "r"(word), "r"(barrier) : "memory");
}
// All threads of the cluster.
__device__ __forceinline__ void wait_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Waits until the phase of this parity is over, which is the present one or the one before.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile("{\n"
                 ".reg .pred over;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
                 "@!over bra again;\n"
                 "}\n" ::"r"(barrier), "r"(parity)
                 : "memory");
}

// A box of a matrix to shared memory, in rows of 128 bytes whose pieces of 16 are stored at piece ^ (row % 8).
__device__ __forceinline__ void copy_box(u32 to, const TensorMap& map, u32 barrier, u32 column, u32 row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
                 "l"(&map), "r"(barrier), "r"(column), "r"(row)
                 : "memory");
}
// The same of one of many matrices.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap& map, u32 barrier, u32 column, u32 row, u32 matrix) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
                 "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(matrix)
                 : "memory");
}
// The same to the same place in both blocks of a cluster, whose barriers at the same place are told.
__device__ __forceinline__ void copy_box_to_both(u32 to, const TensorMap& map, u32 barrier, u32 column, u32 row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
                 "l"(&map), "r"(barrier), "r"(column), "r"(row), "h"((u16)3)
                 : "memory");
}
// The same of one of many matrices.
__device__ __forceinline__ void copy_box_to_both(u32 to, const TensorMap& map, u32 barrier, u32 column, u32 row, u32 matrix) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
                 "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(matrix), "h"((u16)3)
                 : "memory");
}
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// One lane of a warp that is all there; what only it does needs no loop over lanes that might differ.
__device__ __forceinline__ bool elected() {
    u32 is;
    asm volatile("{\n.reg .pred is;\nelect.sync _|is, 0xffffffff;\nselp.u32 %0, 1, 0, is;\n}\n" : "=r"(is));
    return is != 0;
}

// What threads wrote to shared memory comes before what tensor cores and the copy engine then read.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

template <int N> __device__ __forceinline__ void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __device__ __forceinline__ void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

// Barriers of the block by number, for so many threads.
template <int N> __device__ __forceinline__ void wait_threads(u32 number) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(N) : "memory");
}
template <int N> __device__ __forceinline__ void tell_threads(u32 number) {
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "n"(N) : "memory");
}

__device__ __forceinline__ void store_matrices(u32 address, const u32 (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
}
__device__ __forceinline__ uint4 load_shared(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
    return v;
}

// 16 bytes at once; said so, since the compiler makes four stores of some.
__device__ __forceinline__ void store_global(u16* to, uint4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Two neighbours in 32 bits, the first one low.
__device__ __forceinline__ u32 pair_of(bf16, f32 first, f32 second) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
__device__ __forceinline__ u32 pair_of(f16, f32 first, f32 second) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

// A matrix in shared memory whose rows of 128 bytes lie as `copy_box` leaves them; it begins at a multiple of 1024.
__device__ __forceinline__ u64 operand_at(u32 address) { return (u64)(address >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62; }
// The transpose of such a matrix of 64 rows; 64 columns after 64 columns, each a matrix as above.
__device__ __forceinline__ u64 transposed_at(u32 address) { return operand_at(address) & ~(0x3fffull << 16) | 512ull << 16; }

// Sums in registers are the products' from begin to wait.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
template <int N> __device__ __forceinline__ void hold(f32 (&sum)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(sum[i])::"memory");
}

#define NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NAMES_1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define NAMES_3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define NAMES_5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define NAMES_7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define NAMES_9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define NAMES_10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define NAMES_11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define NAMES_13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define NAMES_14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define NAMES_15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define NAMES_OF_128 NAMES_0 ", " NAMES_1 ", " NAMES_2 ", " NAMES_3 ", " NAMES_4 ", " NAMES_5 ", " NAMES_6 ", " NAMES_7
#define NAMES_OF_192 NAMES_OF_128 ", " NAMES_8 ", " NAMES_9 ", " NAMES_10 ", " NAMES_11
#define NAMES_OF_240 NAMES_OF_192 ", " NAMES_12 ", " NAMES_13 ", " NAMES_14
#define NAMES_OF_256 NAMES_OF_240 ", " NAMES_15
#define SUMS_4(i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])
#define SUMS_8(i) SUMS_4(i), SUMS_4(i + 4)
#define SUMS_32(i) SUMS_8(i), SUMS_8(i + 8), SUMS_8(i + 16), SUMS_8(i + 24)
#define SUMS_OF_128 SUMS_32(0), SUMS_32(32)
#define SUMS_OF_192 SUMS_OF_128, SUMS_32(64)
#define SUMS_OF_240 SUMS_OF_192, SUMS_8(96), SUMS_8(104), SUMS_8(112)
#define SUMS_OF_256 SUMS_OF_240, SUMS_8(120)

// sum (+)= x . w^T, x [64, 16], w [N, 16]; thread t of the warpgroup has rows t / 32 * 16 + t % 32 / 4 (+ 8) and, of each 8
// columns, t % 4 * 2 (+ 1). ACROSS: w is there by its transpose. Without `keep` the sums begin at 0.
#define WARPGROUP_PRODUCT(N, T, FORMAT, X, W, KEEP, W_ACROSS)                                                              \
    template <bool ACROSS> __device__ __forceinline__ void multiply(T, f32(&sum)[N / 2], u64 x, u64 w, u32 keep) {         \
        asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, " KEEP ", 0;\n"                                              \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." FORMAT "." FORMAT " {" NAMES_OF_##N "}, " X ", " W \
                     ", keep, 1, 1, 0, " W_ACROSS ";\n}\n"                                                                \
                     : SUMS_OF_##N                                                                                        \
                     : "l"(x), "l"(w), "r"(keep), "n"(ACROSS));                                                           \
    }
#define WARPGROUP_PRODUCTS(N, X, W, KEEP, W_ACROSS)                                                                       \
    WARPGROUP_PRODUCT(N, bf16, "bf16", X, W, KEEP, W_ACROSS)                                                              \
    WARPGROUP_PRODUCT(N, f16, "f16", X, W, KEEP, W_ACROSS)
WARPGROUP_PRODUCTS(128, "%64", "%65", "%66", "%67")
WARPGROUP_PRODUCTS(192, "%96", "%97", "%98", "%99")
WARPGROUP_PRODUCTS(240, "%120", "%121", "%122", "%123")
WARPGROUP_PRODUCTS(256, "%128", "%129", "%130", "%131")
