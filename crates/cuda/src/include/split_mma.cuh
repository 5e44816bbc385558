// A TILE_M x TILE_N tile of x . weight^T on tensor cores, where tiles are few and rows long: each warp takes every WARPS-th
// 32 columns straight from memory, and the warps' sums are added in a fixed order. x and weights of one 2-byte format T,
// rows of both in 16-byte pieces.
//
// A thread has columns lane % 4 * 8 .. + 8 of each 32, in rows lane / 4, + 8, ...: tensor cores would have its columns
// elsewhere, but the order of columns is no matter as long as both operands have the same.
#define WARPS 8
#define PARTS 4
#define X_PIECES (TILE_M / 8)
#define W_PIECES (TILE_N / 8)
// pieces that a thread has on their way
#define AHEAD (24 / (X_PIECES + W_PIECES))

typedef Pack<u32, 4> Piece;

struct Split {
    f32 part[PARTS][TILE_M][TILE_N + 8];
    f32 squares[WARPS][TILE_M];
};

template <class T> __device__ __forceinline__ Piece load_piece(const T* row, u64 col, bool inside) {
    if (inside) return *reinterpret_cast<const Piece*>(row + col);
    return Piece{};
}

#if WEIGHTED
// x * norm_weight in three pieces whose sum it is to 24 bits: an infinite x stays in the first.
template <class T> __device__ __forceinline__ void weigh(const Piece& x, const Tensor& norm_weight, u64 col, bool inside, Piece (&to)[3]) {
    f32 v[8], n[8] = {};
    load<8>(reinterpret_cast<const T*>(&x), v);
    if (inside) load<8>(norm_weight, 0, col, n);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        f32 rest = v[i] * n[i];
#pragma unroll
        for (int j = 0; j < 3; j++) {
            T* part = reinterpret_cast<T*>(&to[j]) + i;
            put(part, rest);
            rest = is_finite(to_f32(*part)) ? rest - to_f32(*part) : 0.0f;
        }
    }
}
#define TERMS 3
#else
#define TERMS 1
#endif

// to.part: the tile's sums in PARTS parts; to.squares: sums of x^2 by warp, if asked for. Complete after a barrier.
template <class T>
__device__ __forceinline__ void split_mma(const Tensor& x, u64 first_row, u64 rows, const Tensor& weight, u64 first_col,
                                          u64 cols, const Tensor& norm_weight, u64 width, bool norm, Split& to) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4;
    const T* x_rows[X_PIECES];
    const T* w_rows[W_PIECES];
#pragma unroll
    for (int i = 0; i < X_PIECES; i++) x_rows[i] = row_of<const T>(x, first_row + i * 8 + r < rows ? first_row + i * 8 + r : rows - 1);
#pragma unroll
    for (int j = 0; j < W_PIECES; j++) w_rows[j] = row_of<const T>(weight, first_col + j * 8 + r < cols ? first_col + j * 8 + r : cols - 1);
    f32 sum[X_PIECES / 2][W_PIECES][4] = {}, squares[X_PIECES] = {};

    for (u64 k = warp * 32 + lane % 4 * 8; k / 32 * 32 < width; k += WARPS * AHEAD * 32) {
        Piece a[AHEAD][X_PIECES], b[AHEAD][W_PIECES];
#pragma unroll
        for (int s = 0; s < AHEAD; s++) {
            const u64 col = k + s * WARPS * 32;
#pragma unroll
            for (int i = 0; i < X_PIECES; i++) a[s][i] = load_piece(x_rows[i], col, col < width);
#pragma unroll
            for (int j = 0; j < W_PIECES; j++) b[s][j] = load_piece(w_rows[j], col, col < width);
        }
#pragma unroll
        for (int s = 0; s < AHEAD; s++) {
            if (norm) {
#pragma unroll
                for (int i = 0; i < X_PIECES; i++) {
                    f32 v[8];
                    load<8>(reinterpret_cast<const T*>(&a[s][i]), v);
#pragma unroll
                    for (int n = 0; n < 8; n++) squares[i] = fmaf(v[n], v[n], squares[i]);
                }
            }
#pragma unroll
            for (int i = 0; i < X_PIECES; i += 2) {
                Piece upper[TERMS], lower[TERMS];
#if WEIGHTED
                const u64 col = k + s * WARPS * 32;
                weigh<T>(a[s][i], norm_weight, col, col < width, upper);
                weigh<T>(a[s][i + 1], norm_weight, col, col < width, lower);
#else
                upper[0] = a[s][i];
                lower[0] = a[s][i + 1];
#endif
#pragma unroll
                for (int term = TERMS - 1; term >= 0; term--)
#pragma unroll
                    for (int h = 0; h < 4; h += 2) {
                        const u32 v[4] = {upper[term].v[h], lower[term].v[h], upper[term].v[h + 1], lower[term].v[h + 1]};
#pragma unroll
                        for (int j = 0; j < W_PIECES; j++) mma(T(), sum[i / 2][j], v, b[s][j].v[h], b[s][j].v[h + 1]);
                    }
            }
        }
    }

    // warps PARTS and up first, then those below add theirs
#pragma unroll
    for (u32 turn = WARPS / PARTS; turn-- > 0;) {
        if (warp / PARTS == turn) {
#pragma unroll
            for (int i = 0; i < X_PIECES; i++)
#pragma unroll
                for (int j = 0; j < W_PIECES; j++)
#pragma unroll
                    for (int n = 0; n < 2; n++) {
                        f32& part = to.part[warp % PARTS][i * 8 + r][j * 8 + lane % 4 * 2 + n];
                        const f32 own = sum[i / 2][j][i % 2 * 2 + n];
                        part = turn + 1 == WARPS / PARTS ? own : own + part;
                    }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < X_PIECES; i++) {
        f32 all = squares[i];
        all += __shfl_xor_sync(0xffffffffu, all, 1);
        all += __shfl_xor_sync(0xffffffffu, all, 2);
        if (lane % 4 == 0) to.squares[warp][i * 8 + r] = all;
    }
}

__device__ __forceinline__ f32 sum_of(const Split& split, u32 row, u32 col) {
    f32 sum = split.part[0][row][col];
#pragma unroll
    for (int i = 1; i < PARTS; i++) sum += split.part[i][row][col];
    return sum;
}

__device__ __forceinline__ f32 squares_of(const Split& split, u32 row) {
    f32 sum = split.squares[0][row];
#pragma unroll
    for (int i = 1; i < WARPS; i++) sum += split.squares[i][row];
    return sum;
}
