// out[t] = residual[t] + routed_scale * sum_k w[t,k] * y[t,k] + shared, slots in order; then its norm.
//
// Without norm a row is cut into pieces for several blocks. With it a block has the row: it sums the squares, keeping the
// values in shared memory if STASH (else they are formed again), and then writes.
//
// SLOTS slots' rows are asked for at once, and before that where these are: `early`, before this launch's turn. STREAMS: they
// are not in the second-level cache, and what is there is not to make room for them.
// COPIES: a slot whose expert is one of copies_first .. copies_end has the token itself in place of its row.

#define COPIED 0xfffffffeu

// A slot's row: NO_ROW if it has none, COPIED if the token itself is in its place.
struct Source {
    u32 row;
    f32 weight;
};

// Of slots k .. k + SLOTS of a token, past this multiprocessor's own cache.
__device__ __forceinline__ void sources_of(const CombineParams& p, u64 t, u32 k, Source (&s)[SLOTS]) {
    const u64 slot = t * p.top_k + k;
    const u32 count = p.top_k - k;
#pragma unroll
    for (u32 i = 0; i < SLOTS; i++) s[i] = {i < count ? (u32)slot + i : NO_ROW, 1.0f};
    if (p.weights.data) {
        const f32* weights = row_of<const f32>(p.weights, t) + k;
#pragma unroll
        for (u32 i = 0; i < SLOTS; i++)
            if (i < count) s[i].weight = __ldcg(weights + i);
    }
    if (p.slot_row.data) {
        const u32* rows = reinterpret_cast<const u32*>(p.slot_row.data) + slot;
#pragma unroll
        for (u32 i = 0; i < SLOTS; i++)
            if (i < count) s[i].row = __ldcg(rows + i);
#pragma unroll
        for (u32 i = 0; i < SLOTS; i++)
            if (s[i].row >= p.rows) s[i].row = NO_ROW;
    }
    if (COPIES) {
        const u32* experts = row_of<const u32>(p.experts, t) + k;
#pragma unroll
        for (u32 i = 0; i < SLOTS; i++) {
            const u32 e = i < count ? __ldcg(experts + i) : NO_EXPERT;
            if (e >= p.copies_first && e < p.copies_end) s[i].row = COPIED;
        }
    }
}

template <class T, int N> __device__ __forceinline__ Pack<T, N> load_row(const T* from) {
    if (STREAMS && sizeof(Pack<T, N>) == 16) {
        uint4 v;
        asm volatile(
            "{.reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0;"
            "ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], policy;}"
            : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
            : "l"(from));
        Pack<T, N> pack;
        memcpy(&pack, &v, sizeof(v));
        return pack;
    }
    return *reinterpret_cast<const Pack<T, N>*>(from);
}

__device__ __forceinline__ void value_of(const CombineParams& p, u64 t, u64 h, f32 shared_factor, const Source (&first)[SLOTS],
                                         f32 (&value)[VEC]) {
    Source s[SLOTS];
#pragma unroll
    for (u32 i = 0; i < SLOTS; i++) s[i] = first[i];
#pragma unroll
    for (int j = 0; j < VEC; j++) value[j] = 0.0f;
    for (u32 k = 0;;) {
        Pack<Y_T, VEC> rows[SLOTS];
#pragma unroll
        for (u32 i = 0; i < SLOTS; i++)
            if (s[i].row < COPIED) rows[i] = load_row<Y_T, VEC>(row_of<const Y_T>(p.y, s[i].row) + h);
#pragma unroll
        for (u32 i = 0; i < SLOTS; i++) {
            if (s[i].row == NO_ROW) continue;
            f32 y[VEC];
            if (COPIES && s[i].row == COPIED) {
                load<VEC>(p.copied, t, h, y);
            } else {
#pragma unroll
                for (int j = 0; j < VEC; j++) y[j] = to_f32(rows[i].v[j]);
            }
#pragma unroll
            for (int j = 0; j < VEC; j++) value[j] = fmaf(s[i].weight, y[j], value[j]);
        }
        k += SLOTS;
        if (k >= p.top_k) break;
        sources_of(p, t, k, s);
    }
    f32 x[VEC];
#pragma unroll
    for (int j = 0; j < VEC; j++) value[j] *= p.routed_scale;
    if (p.shared.data) {
        load<VEC>(p.shared, t, h, x);
#pragma unroll
        for (int j = 0; j < VEC; j++) value[j] = fmaf(shared_factor, x[j], value[j]);
    }
    if (p.residual.data) {
        load<VEC>(p.residual, t, h, x);
#pragma unroll
        for (int j = 0; j < VEC; j++) value[j] += x[j];
    }
}

extern "C" __global__ void __launch_bounds__(256) combine(const __grid_constant__ CombineParams p) {
    extern __shared__ f32 stash[];
    __shared__ u64 parts[8];
    Source sources[SLOTS];
    if (p.early) sources_of(p, blockIdx.x, 0, sources);
    take_turn();
    for (u64 t = blockIdx.x; t < p.tokens; t += gridDim.x) {
        if (!p.early || t != blockIdx.x) sources_of(p, t, 0, sources);
        f32 factor = p.shared_scale;
        if (p.factor.data) factor *= element(p.factor, t, 0);
        if (p.logit.data) factor *= sigmoid(element(p.logit, t, 0));
        const u64 first = ((u64)blockIdx.y * blockDim.x + threadIdx.x) * VEC, step = (u64)gridDim.y * blockDim.x * VEC;
        f32 scale = 1.0f;
        if (NORM) {
            f32 squares = 0.0f;
            for (u64 h = first; h < p.hidden; h += step) {
                f32 value[VEC];
                value_of(p, t, h, factor, sources, value);
#pragma unroll
                for (int j = 0; j < VEC; j++) squares = fmaf(value[j], value[j], squares);
                if (STASH) store<VEC>(stash + h, value);
            }
            squares = reduce<Sum, 256>(squares, parts);
            scale = 1.0f / sqrtf(squares / (f32)p.hidden + p.eps);
        }
        for (u64 h = first; h < p.hidden; h += step) {
            f32 value[VEC];
            if (NORM && STASH) load<VEC>(stash + h, value);
            else value_of(p, t, h, factor, sources, value);
            store<VEC>(p.out, t, h, value);
            if (NORM) {
                f32 weight[VEC];
                if (p.norm_weight.data) load<VEC>(p.norm_weight, 0, h, weight);
#pragma unroll
                for (int j = 0; j < VEC; j++) value[j] *= p.norm_weight.data ? scale * weight[j] : scale;
                store<VEC>(p.normed, t, h, value);
            }
        }
    }
}
