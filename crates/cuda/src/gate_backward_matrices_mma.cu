// d_router = scale * d_logits^T . n on tensor cores: a block has TILE_M experts by TILE_N columns, a warp every WARPS-th 16
// tokens of them; the warps' sums are added in their order.
//
//   each warp: d_logits (f32) and n (bf16) of its tokens by asynchronous copies into a ring of its own
//              d_logits in three terms, smallest first; both transposed where they are read
//
// With CLUSTER 2 the warps of two blocks share a tile of twice the columns, for which d_logits are read half as often; each
// block adds up half of it.
#define TILE_M 64
#define TILE_N (32 * CLUSTER)
#define WARPS 8
#define PAIRED (CLUSTER == 2 && __CUDA_ARCH__ >= 900)
#if PAIRED
#define IN_CLUSTERS __cluster_dims__(1, 1, 2)
#else
#define IN_CLUSTERS
#endif
#define STEP 16
#define STAGES 3
// elements of a line, so that fragments are read without bank conflicts
#define D_LINE (TILE_M + 4)
#define D_BYTES (STEP * D_LINE * 4)
#define N_LINE (TILE_N + 8)
#define STAGE_BYTES (D_BYTES + STEP * N_LINE * 2)

__device__ __forceinline__ void copy_tokens(const GroupedBackwardParams& p, u64 t, u64 first_row, u64 first_col, u32 stage) {
    const u32 lane = threadIdx.x % 32;
    if (t < p.grouped.rows) {
#pragma unroll
        for (u32 i = lane; i < STEP * TILE_M / 4; i += 32) {
            const u32 k = i / (TILE_M / 4), c = i % (TILE_M / 4) * 4;
            const bool inside = t + k < p.grouped.rows && first_row + c < p.outputs;
            copy_async(stage + (k * D_LINE + c) * 4, row_of<const f32>(p.d, inside ? t + k : 0) + (inside ? first_row + c : 0), inside);
        }
#pragma unroll
        for (u32 i = lane; i < STEP * TILE_N / 8; i += 32) {
            const u32 k = i / (TILE_N / 8), c = i % (TILE_N / 8) * 8;
            const bool inside = t + k < p.grouped.rows && first_col + c < p.inputs;
            copy_async(stage + D_BYTES + (k * N_LINE + c) * 2, row_of<const u16>(p.x, inside ? t + k : 0) + (inside ? first_col + c : 0), inside);
        }
    }
    commit_copies();
}

// All threads of the cluster have come here, and what they wrote to shared memory is there.
__device__ __forceinline__ void wait_blocks() {
#if PAIRED
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

// A number of the same place in the shared memory of a block of the cluster.
__device__ __forceinline__ f32 load_of(const f32* at, u32 block) {
#if PAIRED
    u32 there;
    f32 x;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(at)), "r"(block));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(there) : "memory");
    return x;
#else
    return *at;
#endif
}

extern "C" __global__ void IN_CLUSTERS __launch_bounds__(32 * WARPS, 1) gate_backward_matrices_mma(const __grid_constant__ GroupedBackwardParams p) {
    extern __shared__ __align__(128) u8 memory[];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = blockIdx.z * WARPS + warp, parts = CLUSTER * WARPS;
    const u64 first_row = (u64)blockIdx.x * TILE_M, first_col = (u64)blockIdx.y * TILE_N;
    u8* own = memory + warp * STAGES * STAGE_BYTES;
    const u32 ring = shared_address(own);
    f32 sum[TILE_M / 16][TILE_N / 8][4] = {};
    for (u32 i = 0; i < STAGES - 1; i++) copy_tokens(p, (u64)(part + i * parts) * STEP, first_row, first_col, ring + i * STAGE_BYTES);
    u32 read = 0, write = STAGES - 1;
    for (u64 t = (u64)part * STEP; t < p.grouped.rows; t += parts * STEP) {
        wait_copies<STAGES - 2>();
        __syncwarp();
        copy_tokens(p, t + (STAGES - 1) * parts * STEP, first_row, first_col, ring + write * STAGE_BYTES);
        const f32* d = reinterpret_cast<const f32*>(own + read * STAGE_BYTES);
        u32 b[TILE_N / 16][4];
#pragma unroll
        for (u32 j = 0; j < TILE_N / 16; j++)
            load_transposed(b[j], ring + read * STAGE_BYTES + D_BYTES + ((lane / 8 % 2 * 8 + lane % 8) * N_LINE + j * 16 + lane / 16 * 8) * 2);
#pragma unroll
        for (u32 i = 0; i < TILE_M / 16; i++) {
            u32 a[4][TERMS];
#pragma unroll
            for (u32 q = 0; q < 4; q++) {
                const f32* at = d + (q / 2 * 8 + lane % 4 * 2) * D_LINE + i * 16 + q % 2 * 8 + lane / 4;
                split_pair(at[0], at[D_LINE], a[q]);
            }
#pragma unroll
            for (int term = TERMS - 1; term >= 0; term--) {
                const u32 terms[4] = {a[0][term], a[1][term], a[2][term], a[3][term]};
#pragma unroll
                for (u32 j = 0; j < TILE_N / 16; j++) {
                    mma(bf16(), sum[i][2 * j], terms, b[j][0], b[j][1]);
                    mma(bf16(), sum[i][2 * j + 1], terms, b[j][2], b[j][3]);
                }
            }
        }
        __syncwarp();
        read = read + 1 == STAGES ? 0 : read + 1;
        write = write + 1 == STAGES ? 0 : write + 1;
    }
    wait_copies<0>();
    __syncthreads();
    // the rings are not read any more: all warps' sums [WARPS][TILE_M][TILE_N]
    f32* sums = reinterpret_cast<f32*>(memory);
#pragma unroll
    for (u32 i = 0; i < TILE_M / 8; i++)
#pragma unroll
        for (u32 j = 0; j < TILE_N / 8; j++)
#pragma unroll
            for (u32 n = 0; n < 2; n++)
                sums[(warp * TILE_M + i * 8 + lane / 4) * TILE_N + j * 8 + lane % 4 * 2 + n] = sum[i / 2][j][i % 2 * 2 + n];
    wait_blocks();
    for (u32 i = blockIdx.z * 32 * WARPS + threadIdx.x; i < TILE_M * TILE_N; i += CLUSTER * 32 * WARPS) {
        f32 d[1] = {0.0f};
#pragma unroll
        for (u32 w = 0; w < CLUSTER * WARPS; w++) d[0] += load_of(sums + w % WARPS * TILE_M * TILE_N + i, w / WARPS);
        d[0] *= p.scale;
        const u64 row = first_row + i / TILE_N, col = first_col + i % TILE_N;
        if (row < p.outputs && col < p.inputs) store_gradient<1>(p.grouped.out, p.accumulate, row, col, d);
    }
    // neither may end while the other reads its memory
    if (PAIRED) wait_blocks();
}
