// VEC neighbours of an operand as they lie in memory, of format X_T; MIXED: whatever its format is, they are held as X_T.

typedef Pack<X_T, VEC> Piece;

__device__ __forceinline__ Piece piece_of(const Tensor& t, u64 row, u64 col) {
    if (!MIXED) return *reinterpret_cast<const Piece*>(row_of<const X_T>(t, row) + col);
    f32 x[VEC];
    load<VEC>(t, row, col, x);
    Piece piece;
#pragma unroll
    for (int j = 0; j < VEC; j++) put(&piece.v[j], x[j]);
    return piece;
}

__device__ __forceinline__ void put_piece(const Tensor& t, u64 row, u64 col, const f32 (&x)[VEC]) {
    if (MIXED) store<VEC>(t, row, col, x);
    else store<VEC>(row_of<X_T>(t, row) + col, x);
}
