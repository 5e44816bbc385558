// The grouped product: every row times its expert's matrix. What all its kernels share: where rows, experts and weights
// are found, and what becomes of the sums.
//
//   out[r] = epilogue( input_weight[r] * matrix[expert of r] . x[row of r] + bias[expert of r] )
//
// GATHER: row r reads x[row_slot[r] / top_k], else x[r].   GATED: matrices are I gate rows, then I up rows.
// ACTIVATE: act(gate, up) is stored, I columns; else the sums are, the up ones I columns after the gate ones.

// An entry of the table of experts; without a table the experts are a stack.
struct Expert {
    u64 matrix, bias;
};

// Where an expert's matrix and bias lie; no matrix: it is elsewhere.
template <class W> __device__ __forceinline__ Expert expert_at(const GroupedParams& p, u32 e) {
    if (p.table) return reinterpret_cast<const Expert*>(p.table)[e];
    const u32 place = e - p.first;
    if (place >= p.here) return {0, 0};
    const u64 size = p.bias.dtype == DTYPE_F32 ? 4 : 2;
    return {p.weights + place * p.expert_stride * sizeof(W), p.bias.data ? p.bias.data + place * p.bias.stride * size : 0};
}

struct RowRange {
    u32 begin, end;
};

__device__ __forceinline__ RowRange rows_of(const GroupedParams& p, u32 e) {
    if (!p.offsets) return {0, (u32)p.rows};
    const u32* offsets = reinterpret_cast<const u32*>(p.offsets);
    // past this multiprocessor's own cache: some launches read them before their turn
    const u32 rows = (u32)p.rows, begin = __ldcg(offsets + e), last = __ldcg(offsets + e + 1);
    const u32 end = last < rows ? last : rows;
    return {begin, end > begin ? end : begin};
}

// The slot of a row, which names its token and its input weight; NO_ROW: there is none.
__device__ __forceinline__ u32 slot_of(const GroupedParams& p, u32 row) {
    if (!p.row_slot) return row;
    const u32 slot = reinterpret_cast<const u32*>(p.row_slot)[row];
    return slot < p.rows ? slot : NO_ROW;
}

template <class X> __device__ __forceinline__ const X* x_row(const GroupedParams& p, u32 slot) {
    return row_of<const X>(p.x, GATHER ? slot / p.top_k : slot);
}

__device__ __forceinline__ f32 input_weight(const GroupedParams& p, u32 slot) {
    if (!p.input_weights.data) return 1.0f;
    return row_of<const f32>(p.input_weights, slot / p.input_columns)[slot % p.input_columns];
}

__device__ __forceinline__ f32 bias_at(const GroupedParams& p, u64 bias, u64 i) {
    return bias ? element(Tensor{bias, 0, p.bias.dtype, 0}, 0, i) : 0.0f;
}

__device__ __forceinline__ f32 finish(const GroupedParams& p, u64 bias, f32 weight, f32 sum, u64 i) {
    return fmaf(weight, sum, bias_at(p, bias, i));
}

// N neighbouring outputs of a row, from the sums of gate and up (of up alone without a gate).
template <int N>
__device__ __forceinline__ void store_outputs(const GroupedParams& p, u64 bias, f32 weight, u64 row, u64 i, const f32 (&gate)[N],
                                              const f32 (&up)[N]) {
    f32 g[N], u[N];
#pragma unroll
    for (int j = 0; j < N; j++) {
        const bool inside = i + j < p.outputs;
        g[j] = GATED && inside ? finish(p, bias, weight, gate[j], i + j) : 0.0f;
        u[j] = inside ? finish(p, bias, weight, up[j], (GATED ? p.outputs : 0) + i + j) : 0.0f;
        if (ACTIVATE) u[j] = activate<FORM, FUNCTION>(g[j], u[j], p.limit, p.alpha);
    }
    const u64 up_column = GATED && !ACTIVATE ? p.outputs + i : i;
    if (N > 1 && p.neighbours && i + N <= p.outputs) {
        if (GATED && !ACTIVATE) store<N>(p.out, row, i, g);
        store<N>(p.out, row, up_column, u);
        return;
    }
#pragma unroll
    for (int j = 0; j < N; j++) {
        if (i + j >= p.outputs) continue;
        const f32 one_g[1] = {g[j]}, one_u[1] = {u[j]};
        if (GATED && !ACTIVATE) store<1>(p.out, row, i + j, one_g);
        store<1>(p.out, row, up_column + j, one_u);
    }
}

// Where the experts' rows begin, and where the last one's end: [E + 1], by N threads.
template <int N> __device__ __forceinline__ void find_first_rows(const GroupedParams& p, u32* first_row) {
    for (u32 e = threadIdx.x; e <= p.experts; e += N) {
        const u32 begin = e < p.experts ? rows_of(p, e).begin : rows_of(p, p.experts - 1).end;
        first_row[e] = begin < p.rows ? begin : (u32)p.rows;
    }
}

// Which tile of which expert is whose: tiles of M rows and some outputs, expert by expert, rows before columns, so
// that blocks that run together read the same weights. Every block makes the list of first tiles for itself.
struct Tile {
    u64 item;
    u32 expert, first_row, rows, column;
};

// Numbers to the sums of those before each: [n + 1], by all threads of a block. Returns the sum of all.
__device__ __forceinline__ u32 add_up(u32* numbers, u32 n) {
    __syncthreads();
    if (threadIdx.x < 32) {
        const u32 lane = threadIdx.x;
        u32 before = 0;
        for (u32 base = 0; base < n; base += 32) {
            const u32 own = base + lane < n ? numbers[base + lane] : 0;
            u32 sum = own;
#pragma unroll
            for (int d = 1; d < 32; d <<= 1) {
                const u32 left = __shfl_up_sync(0xffffffffu, sum, d);
                if (lane >= d) sum += left;
            }
            if (base + lane < n) numbers[base + lane] = before + sum - own;
            before += __shfl_sync(0xffffffffu, sum, 31);
        }
        if (lane == 0) numbers[n] = before;
    }
    __syncthreads();
    return numbers[n];
}

struct Schedule {
    // [E + 1]: row tiles of the experts before
    u32* first_tile;
    u32 experts, columns;
    u64 items;

    template <int N, int M> __device__ __forceinline__ void make(const GroupedParams& p, u32* memory, u32 column_tiles) {
        first_tile = memory;
        experts = p.experts;
        columns = column_tiles;
        for (u32 e = threadIdx.x; e < experts; e += N) {
            const RowRange range = rows_of(p, e);
            first_tile[e] = (range.end - range.begin + M - 1) / M;
        }
        items = (u64)add_up(first_tile, experts) * columns;
    }

    // The tile of `item`, which is not before `tile`'s; false when there is none.
    template <int M> __device__ __forceinline__ bool find(const GroupedParams& p, u64 item, Tile& tile) const {
        tile.item = item;
        if (item >= items) return false;
        u32 e = tile.expert;
        while ((u64)first_tile[e + 1] * columns <= item) e++;
        tile.expert = e;
        const u32 local = (u32)(item - (u64)first_tile[e] * columns), row_tiles = first_tile[e + 1] - first_tile[e];
        const RowRange range = rows_of(p, e);
        tile.column = local / row_tiles;
        tile.first_row = range.begin + local % row_tiles * M;
        tile.rows = range.end - tile.first_row < M ? range.end - tile.first_row : M;
        return true;
    }
};
