// out[t] = residual[t] + routed_scale * sum_k w[t,k] * y[t,k] + shared, slots in order; then its norm.
//
// Without norm a row is cut into pieces for several blocks. With it a block has the row: it sums the squares, keeping the
// values in shared memory if STASH (else they are formed again), and then writes.
//
// COPIES: a slot whose expert is one of copies_first .. copies_end has the token itself in place of its row.

__device__ __forceinline__ void value_of(const CombineParams& p, u64 t, u64 h, f32 shared_factor, f32 (&value)[VEC]) {
#pragma unroll
    for (int j = 0; j < VEC; j++) value[j] = 0.0f;
#pragma unroll 4
    for (u32 k = 0; k < p.top_k; k++) {
        u64 row = t * p.top_k + k;
        bool copied = false;
        if (COPIES) {
            const u32 e = row_of<const u32>(p.experts, t)[k];
            copied = e >= p.copies_first && e < p.copies_end;
        }
        if (p.slot_row.data && !copied) {
            row = reinterpret_cast<const u32*>(p.slot_row.data)[row];
            if (row >= p.rows) continue;
        }
        const f32 w = p.weights.data ? row_of<const f32>(p.weights, t)[k] : 1.0f;
        f32 y[VEC];
        if (copied) load<VEC>(p.copied, t, h, y);
        else load<VEC>(row_of<const Y_T>(p.y, row) + h, y);
#pragma unroll
        for (int j = 0; j < VEC; j++) value[j] = fmaf(w, y[j], value[j]);
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
    take_turn();
    extern __shared__ f32 stash[];
    __shared__ u64 parts[8];
    for (u64 t = blockIdx.x; t < p.tokens; t += gridDim.x) {
        f32 factor = p.shared_scale;
        if (p.factor.data) factor *= element(p.factor, t, 0);
        if (p.logit.data) factor *= sigmoid(element(p.logit, t, 0));
        const u64 first = ((u64)blockIdx.y * 256 + threadIdx.x) * VEC, step = (u64)gridDim.y * 256 * VEC;
        f32 scale = 1.0f;
        if (NORM) {
            f32 squares = 0.0f;
            for (u64 h = first; h < p.hidden; h += step) {
                f32 value[VEC];
                value_of(p, t, h, factor, value);
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
            else value_of(p, t, h, factor, value);
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
