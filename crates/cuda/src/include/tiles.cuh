// 64 x 64 sums by 256 threads, 4 x 4 each, in f32 multiply-adds: STEP products at a time from shared memory.
#define TILE 64
#define STEP 16

struct Tiles {
    f32 a[STEP][TILE + 4];
    f32 b[STEP][TILE + 4];
};

// Four neighbours of a row, zeros outside.
template <class T> __device__ __forceinline__ void load_four(const T* row, bool inside, u64 col, u64 width, f32 (&to)[4]) {
    if (VEC == 4 && inside && col + 4 <= width) {
        load<4>(row + col, to);
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) to[i] = inside && col + i < width ? to_f32(row[col + i]) : 0.0f;
}

// sum[m][n] += sum_i a[i][4 * (thread / 16) + m] * b[i][4 * (thread % 16) + n]
__device__ __forceinline__ void add_products(const Tiles& tiles, f32 (&sum)[4][4]) {
#pragma unroll
    for (int i = 0; i < STEP; i++) {
        f32 u[4], v[4];
        load<4>(&tiles.a[i][threadIdx.x / 16 * 4], u);
        load<4>(&tiles.b[i][threadIdx.x % 16 * 4], v);
#pragma unroll
        for (int m = 0; m < 4; m++)
#pragma unroll
            for (int n = 0; n < 4; n++) sum[m][n] = fmaf(u[m], v[n], sum[m][n]);
    }
}
