// Reads `count` groups of 16 bytes, each once.

#define THREADS 512
#define AT_ONCE 4

extern "C" __global__ void __launch_bounds__(THREADS) read_all(const __grid_constant__ ReadAllParams p) {
    const uint4* from = reinterpret_cast<const uint4*>(p.from);
    const u64 step = (u64)gridDim.x * THREADS;
    u32 sum = 0;
    u64 i = (u64)blockIdx.x * THREADS + threadIdx.x;
    for (; i + (AT_ONCE - 1) * step < p.count; i += AT_ONCE * step) {
        uint4 v[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) v[k] = from[i + k * step];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) sum += v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
    }
    for (; i < p.count; i += step) sum += from[i].x ^ from[i].y ^ from[i].z ^ from[i].w;
    // without a use of the sum the loads would be left out
    if (sum == 0x9e3779b9u) *reinterpret_cast<u32*>(p.sink) = sum;
}
