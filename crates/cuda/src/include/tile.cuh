// A 64 x 64 tile of x . weight^T by SLICES groups of 256 threads, each with a slice of the columns, 4 x 4 sums a thread,
// f32 multiply-adds.
//
//   each group, for each 16 of its columns: x tile and weight tile to shared memory (the next ones are on their way)
//                                           sums += outer products
//   the groups' sums, in their order
#define TILE 64
#define TILE_K 16
#define SLICES 4

struct Tiles {
    f32 x[TILE_K][TILE + 4];
    f32 w[TILE_K][TILE + 4];
};

union Shared {
    Tiles tiles[SLICES];
    f32 part[17][256];
};

// Four neighbours of a row, zeros outside.
template <class T, int WIDE>
__device__ __forceinline__ void load_four(const T* row, bool inside, u64 col, u64 width, f32 (&to)[4]) {
    if (WIDE == 4 && inside && col + 4 <= width) {
        load<4>(row + col, to);
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) to[i] = inside && col + i < width ? to_f32(row[col + i]) : 0.0f;
}

// Of the first group, thread t: sum[i][j] is row first_row + 4 * (t / 16) + i, column first_col + 4 * (t % 16) + j;
// squares: of the row first_row + t / 4, complete in each of its four threads.
template <class X, class W, int WIDE>
__device__ __forceinline__ void multiply_tile(const Tensor& x, u64 first_row, u64 rows, const Tensor& weight, u64 first_col,
                                              u64 cols, const Tensor& norm_weight, u64 width, Shared& shared,
                                              f32 (&sum)[4][4], f32& squares) {
    const u32 thread = threadIdx.x % 256, slice = threadIdx.x / 256, r = thread / 4;
    const u64 length = (width + SLICES * TILE_K - 1) / (SLICES * TILE_K) * TILE_K, c = slice * length + thread % 4 * 4;
    Tiles& tiles = shared.tiles[slice];
    const bool x_inside = first_row + r < rows, w_inside = first_col + r < cols;
    const X* x_row = row_of<const X>(x, x_inside ? first_row + r : 0);
    const W* w_row = row_of<const W>(weight, w_inside ? first_col + r : 0);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) sum[i][j] = 0.0f;
    squares = 0.0f;
    f32 a[4], b[4];
    load_four<X, WIDE>(x_row, x_inside, c, width, a);
    load_four<W, WIDE>(w_row, w_inside, c, width, b);
    for (u64 k = 0; k < length; k += TILE_K) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            squares = fmaf(a[i], a[i], squares);
            if (norm_weight.data && k + c + i < width) a[i] *= element(norm_weight, 0, k + c + i);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            tiles.x[thread % 4 * 4 + i][r] = a[i];
            tiles.w[thread % 4 * 4 + i][r] = b[i];
        }
        __syncthreads();
        if (k + TILE_K < length) {
            load_four<X, WIDE>(x_row, x_inside, k + TILE_K + c, width, a);
            load_four<W, WIDE>(w_row, w_inside, k + TILE_K + c, width, b);
        }
#pragma unroll
        for (int i = 0; i < TILE_K; i++) {
            f32 u[4], v[4];
            load<4>(&tiles.x[i][thread / 16 * 4], u);
            load<4>(&tiles.w[i][thread % 16 * 4], v);
#pragma unroll
            for (int m = 0; m < 4; m++)
#pragma unroll
                for (int n = 0; n < 4; n++) sum[m][n] = fmaf(u[m], v[n], sum[m][n]);
        }
    }
    squares += __shfl_xor_sync(0xffffffffu, squares, 1);
    squares += __shfl_xor_sync(0xffffffffu, squares, 2);
    for (u32 group = 1; group < SLICES; group++) {
        __syncthreads();
        if (slice == group) {
#pragma unroll
            for (int i = 0; i < 16; i++) shared.part[i][thread] = sum[i / 4][i % 4];
            shared.part[16][thread] = squares;
        }
        __syncthreads();
        if (slice == 0) {
#pragma unroll
            for (int i = 0; i < 16; i++) sum[i / 4][i % 4] += shared.part[i][thread];
            squares += shared.part[16][thread];
        }
    }
}
