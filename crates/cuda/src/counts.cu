// counts[e] = offsets[e + 1] - offsets[e]

extern "C" __global__ void __launch_bounds__(256) counts(const __grid_constant__ CountsParams p) {
    const u32 e = blockIdx.x * 256 + threadIdx.x;
    if (e >= p.experts_total) return;
    const u32* offsets = reinterpret_cast<const u32*>(p.offsets.data);
    row_of<u32>(p.counts, 0)[e] = offsets[e + 1] - offsets[e];
}
