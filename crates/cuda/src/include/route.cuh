// Logits of one token to its experts and weights, by N threads: a warp or a block.
//
//   key[e] = score, logit or sum with the bias; groups masked
//   K (and one more for the witness) times: the largest key, equal ones by expert; those that are always chosen follow
//   value -> scale -> norm -> scale
//
// A key is kept as a word that sorts as it should: [not masked | the key's bits, made monotonic | lower expert first].
// experts [K] and weights [K] in global memory hold what is chosen and what its weight is so far.

#define SCORE_SOFTMAX 0
#define SCORE_SIGMOID 1
#define SCORE_SQRT_SOFTPLUS 2
#define SCORE_LOGIT 3
#define SELECT_TOP_K 0
#define SELECT_SPARSE_MIXER 1
#define SELECT_TABLE 2
#define NORMALIZE_NONE 0
#define NORMALIZE_SUM 1
#define NORMALIZE_SUM_AT_LEAST 2
#define NORMALIZE_LP 3
#define SCALE_BEFORE 1
#define SCALE_AFTER 2

#define TAKEN 0ull
#define PREFERRED (1ull << 63)

// The key's bits, made monotonic.
__device__ __forceinline__ u32 order_of_key(f32 key) {
    const u32 bits = __float_as_uint(key + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ f32 key_of_order(u32 order) { return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order); }

__device__ __forceinline__ u64 word_of_key(f32 key, u32 e) { return PREFERRED | (u64)order_of_key(key) << 31 | (0x7fffffffu - e); }
__device__ __forceinline__ u32 expert_of_word(u64 word) { return 0x7fffffffu - (u32)(word & 0x7fffffffu); }
__device__ __forceinline__ f32 key_of_word(u64 word) { return key_of_order((u32)(word >> 31)); }

// What the scores of a token are made from.
struct Scores {
    f32 max, sum;
    u32 kind;
    __device__ __forceinline__ f32 term(f32 logit) const {
        if (is_nan(logit) || logit == -INFINITE) return 0.0f;
        return logit == max ? 1.0f : expf(logit - max);
    }
    __device__ __forceinline__ f32 of(f32 logit) const {
        if (is_nan(logit)) return 0.0f;
        if (kind == SCORE_SOFTMAX) return sum == 0.0f ? 0.0f : term(logit) / sum;
        if (kind == SCORE_SIGMOID) return sigmoid(logit);
        // far below zero softplus is exp, and its root is there where it is not
        if (kind == SCORE_SQRT_SOFTPLUS && logit < -20.0f) return expf(0.5f * logit);
        if (kind == SCORE_SQRT_SOFTPLUS) return sqrtf(log1pf(expf(-fabsf(logit))) + (logit > 0.0f ? logit : 0.0f));
        return logit;
    }
};

// Shared memory of one token: E words, then a float for each group.
struct RouteScratch {
    u64* words;
    f32* worth;
    u64* parts;
};

template <int N>
__device__ void limit_to_groups(const ChoiceParams& p, u32 lane, const RouteScratch& s) {
    const u32 size = (p.experts_total - p.always) / p.groups;
    for (u32 g = lane; g < p.groups; g += N) {
        f32 best = -INFINITE, second = -INFINITE;
        for (u32 e = g * size; e < (g + 1) * size; e++) {
            const f32 key = key_of_word(s.words[e]);
            if (key > best) {
                second = best;
                best = key;
            } else if (key > second) {
                second = key;
            }
        }
        f32 worth = p.group_by_two && size > 1 ? best + second : best;
        s.worth[g] = is_nan(worth) ? -INFINITE : worth;
    }
    sync<N>();
    for (u32 g = lane; g < p.groups; g += N) {
        const f32 worth = s.worth[g];
        u32 before = 0;
        for (u32 other = 0; other < p.groups; other++)
            before += s.worth[other] > worth || (s.worth[other] == worth && other < g);
        if (before < p.groups_kept) continue;
        for (u32 e = g * size; e < (g + 1) * size; e++)
            s.words[e] = p.masked_to_zero ? word_of_key(0.0f, e) : word_of_key(-INFINITE, e) & ~PREFERRED;
    }
    sync<N>();
}

template <int N> __device__ __forceinline__ u64 largest(u64 word, u64* parts) {
    if (N != 32) return reduce<Max, N>(word, parts);
    const u32 high = __reduce_max_sync(0xffffffffu, (u32)(word >> 32));
    const u32 low = __reduce_max_sync(0xffffffffu, (u32)(word >> 32) == high ? (u32)word : 0);
    return (u64)high << 32 | low;
}

template <class L, int N>
__device__ void choose_top_k(const ChoiceParams& p, const L* logits, u64 t, u32 lane, const Scores& scores, bool by_logit,
                             const RouteScratch& s) {
    // the last experts, which are always chosen, do not compete
    const u32 competing = p.experts_total - p.always, chosen = p.top_k - p.always;
    for (u32 e = lane; e < competing; e += N) {
        const f32 logit = to_f32(logits[e]);
        f32 key = by_logit ? logit : scores.of(logit);
        if (p.bias.data) key += element(p.bias, 0, e);
        s.words[e] = word_of_key(is_nan(logit) || is_nan(key) ? -INFINITE : key, e);
    }
    sync<N>();
    if (p.groups) limit_to_groups<N>(p, lane, s);
    u64 mine = TAKEN;
    for (u32 e = lane; e < competing; e += N) mine = Max::of(mine, s.words[e]);
    u32* experts = row_of<u32>(p.experts, t);
    const bool witness = p.witness_keys.data != 0;
    const u32 rounds = chosen + (witness && chosen < competing ? 1 : 0);
    for (u32 k = 0; k < rounds; k++) {
        const u64 word = largest<N>(mine, s.parts);
        const u32 e = expert_of_word(word);
        if (lane == 0) {
            if (k < chosen) experts[k] = e;
            if (witness && k + 1 >= chosen) {
                row_of<f32>(p.witness_keys, t)[k + 1 - chosen] = key_of_word(word);
                row_of<u32>(p.witness_experts, t)[k + 1 - chosen] = e;
            }
        }
        if (e % N == lane) {
            s.words[e] = mine = TAKEN;
            for (u32 other = lane; other < competing; other += N) mine = Max::of(mine, s.words[other]);
        }
    }
    for (u32 a = lane; a < p.always; a += N) experts[chosen + a] = competing + a;
    if (witness && chosen == competing && lane == 0) {
        row_of<f32>(p.witness_keys, t)[1] = -INFINITE;
        row_of<u32>(p.witness_experts, t)[1] = NO_EXPERT;
    }
}

// The two masked passes; the experts are chosen already. Writes the values.
template <class L, int N>
__device__ void sparse_mixer_values(const ChoiceParams& p, const L* logits, u64 t, u32 lane, const RouteScratch& s) {
    const u32* experts = row_of<u32>(p.experts, t);
    f32* weights = row_of<f32>(p.weights, t);
    const u32 first = experts[0];
    for (u32 pass = 0; pass < p.top_k; pass++) {
        const f32 max = to_f32(logits[experts[pass]]);
        f32 sum = 0.0f;
        for (u32 e = lane; e < p.experts_total; e += N) {
            const f32 l = to_f32(logits[e]);
            const f32 larger = fabsf(l) > max ? fabsf(l) : max;
            const bool near = l == max || max - l <= 2.0f * p.jitter * larger;
            if (!near || l == -INFINITE || (pass == 1 && e == first)) continue;
            sum += l == max ? 1.0f : expf(l - max);
        }
        sum = reduce<Sum, N>(sum, s.parts);
        if (lane == 0) weights[pass] = max > -INFINITE ? 1.0f / sum : 0.0f;
    }
}

// The token's row of the table.
template <int N> __device__ u32 choose_by_table(const ChoiceParams& p, u64 t, u32 lane) {
    const u64 id = reinterpret_cast<const u32*>(p.token_ids.data)[t];
    u32* experts = row_of<u32>(p.experts, t);
    u32 status = id < p.vocabulary ? 0 : STATUS_TOKEN_OUT_OF_RANGE;
    for (u32 k = lane; k < p.top_k; k += N) {
        u32 e = status ? NO_EXPERT : row_of<const u32>(p.table, id)[k];
        if (e >= p.experts_total) {
            if (e != NO_EXPERT) status |= STATUS_EXPERT_OUT_OF_RANGE;
            e = NO_EXPERT;
        }
        experts[k] = e;
    }
    return status;
}

// values[k] in weights[k] become weights.
template <int N> __device__ void weigh(const ChoiceParams& p, u64 t, u32 lane, const RouteScratch& s) {
    const u32* experts = row_of<u32>(p.experts, t);
    f32* weights = row_of<f32>(p.weights, t);
    f32 sum = 0.0f;
    for (u32 k = lane; k < p.top_k; k += N) {
        f32 v = weights[k];
        if (p.scale_when == SCALE_BEFORE && experts[k] != NO_EXPERT) weights[k] = v *= element(p.scale, 0, experts[k]);
        sum += p.normalize == NORMALIZE_LP ? powf(fabsf(v), p.normalize_by) : v;
    }
    if (p.normalize != NORMALIZE_NONE) sum = reduce<Sum, N>(sum, s.parts);
    f32 divisor = 1.0f;
    if (p.normalize == NORMALIZE_SUM) divisor = sum + p.normalize_by;
    if (p.normalize == NORMALIZE_SUM_AT_LEAST) divisor = sum < p.normalize_by ? p.normalize_by : sum;
    if (p.normalize == NORMALIZE_LP) divisor = powf(sum, 1.0f / p.normalize_by);
    for (u32 k = lane; k < p.top_k; k += N) {
        f32 w = divisor == 0.0f ? 0.0f : weights[k] / divisor;
        if (p.scale_when == SCALE_AFTER && experts[k] != NO_EXPERT) w *= element(p.scale, 0, experts[k]);
        weights[k] = experts[k] == NO_EXPERT ? 0.0f : w * p.weight_scale;
    }
}

template <class L, int N>
__device__ void route_token(const ChoiceParams& p, const L* logits, u64 t, u32 lane, const RouteScratch& s) {
    u32* experts = row_of<u32>(p.experts, t);
    f32* weights = row_of<f32>(p.weights, t);
    Scores scores = {-INFINITE, 0.0f, p.score};
    u32 finite = 0;
    for (u32 e = lane; e < p.experts_total; e += N) {
        const f32 logit = to_f32(logits[e]);
        if (logit > scores.max) scores.max = logit;
        finite |= is_finite(logit);
    }
    finite = reduce<Or, N>(finite, s.parts);
    if (!finite) {
        for (u32 k = lane; k < p.top_k; k += N) {
            experts[k] = k;
            weights[k] = NOT_A_NUMBER;
        }
        if (lane < 2 && p.witness_keys.data) {
            row_of<f32>(p.witness_keys, t)[lane] = -INFINITE;
            row_of<u32>(p.witness_experts, t)[lane] = NO_EXPERT;
        }
        if (lane == 0) raise(p.status, STATUS_NO_FINITE_SCORE);
        return;
    }
    if (p.score == SCORE_SOFTMAX) {
        scores.max = reduce<Max, N>(scores.max, s.parts);
        for (u32 e = lane; e < p.experts_total; e += N) scores.sum += scores.term(to_f32(logits[e]));
        scores.sum = reduce<Sum, N>(scores.sum, s.parts);
    }
    if (p.selection == SELECT_TABLE) {
        raise(p.status, choose_by_table<N>(p, t, lane));
    } else {
        choose_top_k<L, N>(p, logits, t, lane, scores, p.by_logit != 0, s);
    }
    sync<N>();
    if (p.selection == SELECT_SPARSE_MIXER) {
        sparse_mixer_values<L, N>(p, logits, t, lane, s);
    } else if (p.softmax_of_chosen) {
        Scores chosen = {-INFINITE, 0.0f, SCORE_SOFTMAX};
        for (u32 k = lane; k < p.top_k; k += N) {
            const f32 l = experts[k] == NO_EXPERT ? -INFINITE : to_f32(logits[experts[k]]);
            if (l > chosen.max) chosen.max = l;
        }
        chosen.max = reduce<Max, N>(chosen.max, s.parts);
        for (u32 k = lane; k < p.top_k; k += N)
            if (experts[k] != NO_EXPERT) chosen.sum += chosen.term(to_f32(logits[experts[k]]));
        chosen.sum = reduce<Sum, N>(chosen.sum, s.parts);
        for (u32 k = lane; k < p.top_k; k += N)
            weights[k] = experts[k] == NO_EXPERT ? 0.0f : chosen.of(to_f32(logits[experts[k]]));
    } else {
        for (u32 k = lane; k < p.top_k; k += N)
            weights[k] = experts[k] == NO_EXPERT ? 0.0f : scores.of(to_f32(logits[experts[k]]));
    }
    sync<N>();
    weigh<N>(p, t, lane, s);
}

// The same by a warp for the most common rules: SELECT_TOP_K without groups, experts that are always chosen, and a witness, E
// at most 32 PER_LANE, K at most 32. Lane k has the k-th expert and its weight, of the same bits as `route_token`'s.
struct LaneRoute {
    u32 expert;
    f32 weight;
    bool finite;
    __device__ __forceinline__ void write(const ChoiceParams& p, u64 t, u32 lane) const {
        if (lane == 0 && !finite) raise(p.status, STATUS_NO_FINITE_SCORE);
        if (lane >= p.top_k) return;
        row_of<u32>(p.experts, t)[lane] = expert;
        row_of<f32>(p.weights, t)[lane] = weight;
    }
};

// What is chosen, and what the weights are made from: a lane's expert and the logits that it read.
template <int PER_LANE> struct LaneChoice {
    u32 expert;
    bool finite;
    f32 logit[PER_LANE];

    __device__ __forceinline__ Scores scores(const ChoiceParams& p) const {
        Scores scores = {-INFINITE, 0.0f, p.score};
        if (p.score != SCORE_SOFTMAX) return scores;
#pragma unroll
        for (u32 i = 0; i < PER_LANE; i++)
            if (logit[i] > scores.max) scores.max = logit[i];
        scores.max = key_of_order(__reduce_max_sync(0xffffffffu, order_of_key(scores.max)));
#pragma unroll
        for (u32 i = 0; i < PER_LANE; i++) scores.sum += scores.term(logit[i]);
        scores.sum = reduce_warp<Sum>(scores.sum);
        return scores;
    }
};

template <class L, int PER_LANE>
__device__ __forceinline__ LaneChoice<PER_LANE> choose_in_registers(const ChoiceParams& p, const L* logits, u32 lane) {
    LaneChoice<PER_LANE> choice;
    choice.expert = lane;
    u32 finite = 0;
    // past this multiprocessor's own cache: some launches read them before their turn
#pragma unroll
    for (u32 i = 0; i < PER_LANE; i++) {
        const u32 e = lane + 32 * i;
        choice.logit[i] = e < p.experts_total ? load_through(logits + e) : NOT_A_NUMBER;
    }
#pragma unroll
    for (u32 i = 0; i < PER_LANE; i++) finite |= is_finite(choice.logit[i]);
    choice.finite = __any_sync(0xffffffffu, finite);
    if (!choice.finite) return choice;
    Scores scores = {};
    if (!p.by_logit) scores = choice.scores(p);
    // 0 is below what any key has
    u32 order[PER_LANE], best = 0, at = 0;
#pragma unroll
    for (u32 i = 0; i < PER_LANE; i++) {
        const u32 e = lane + 32 * i;
        const f32 logit = choice.logit[i];
        order[i] = 0;
        if (e < p.experts_total) {
            f32 key = p.by_logit ? logit : scores.of(logit);
            if (p.bias.data) key += element(p.bias, 0, e);
            order[i] = order_of_key(is_nan(logit) || is_nan(key) ? -INFINITE : key);
        }
        if (order[i] > best) {
            best = order[i];
            at = e;
        }
    }
#pragma unroll 1
    for (u32 k = 0; k < p.top_k; k++) {
        const u32 most = __reduce_max_sync(0xffffffffu, best);
        const u32 e = __reduce_min_sync(0xffffffffu, best == most ? at : 0xffffffffu);
        if (lane == k) choice.expert = e;
        if (e % 32 != lane) continue;
        best = 0;
#pragma unroll
        for (u32 i = 0; i < PER_LANE; i++) {
            if (e == lane + 32 * i) order[i] = 0;
            if (order[i] > best) {
                best = order[i];
                at = lane + 32 * i;
            }
        }
    }
    return choice;
}

template <int PER_LANE>
__device__ __forceinline__ f32 weight_in_registers(const ChoiceParams& p, const LaneChoice<PER_LANE>& choice, u32 lane) {
    if (!choice.finite) return NOT_A_NUMBER;
    const bool chosen = lane < p.top_k;
    f32 value = 0.0f;
#pragma unroll
    for (u32 i = 0; i < PER_LANE; i++) {
        const f32 logit = __shfl_sync(0xffffffffu, choice.logit[i], choice.expert % 32);
        if (choice.expert / 32 == i && chosen) value = logit;
    }
    if (p.softmax_of_chosen) {
        Scores of_chosen = {-INFINITE, 0.0f, SCORE_SOFTMAX};
        if (chosen && value > of_chosen.max) of_chosen.max = value;
        of_chosen.max = reduce_warp<Max>(of_chosen.max);
        of_chosen.sum = reduce_warp<Sum>(chosen ? of_chosen.term(value) : 0.0f);
        value = of_chosen.of(value);
    } else {
        value = choice.scores(p).of(value);
    }
    if (p.scale_when == SCALE_BEFORE && chosen) value *= element(p.scale, 0, choice.expert);
    f32 divisor = 1.0f;
    if (p.normalize != NORMALIZE_NONE) {
        const f32 sum = reduce_warp<Sum>(!chosen ? 0.0f : p.normalize == NORMALIZE_LP ? powf(fabsf(value), p.normalize_by) : value);
        if (p.normalize == NORMALIZE_SUM) divisor = sum + p.normalize_by;
        if (p.normalize == NORMALIZE_SUM_AT_LEAST) divisor = sum < p.normalize_by ? p.normalize_by : sum;
        if (p.normalize == NORMALIZE_LP) divisor = powf(sum, 1.0f / p.normalize_by);
    }
    f32 weight = divisor == 0.0f ? 0.0f : value / divisor;
    if (p.scale_when == SCALE_AFTER && chosen) weight *= element(p.scale, 0, choice.expert);
    return weight * p.weight_scale;
}

template <class L, int PER_LANE>
__device__ __forceinline__ LaneRoute route_in_registers(const ChoiceParams& p, const L* logits, u32 lane) {
    const LaneChoice<PER_LANE> choice = choose_in_registers<L, PER_LANE>(p, logits, lane);
    return {choice.expert, weight_in_registers(p, choice, lane), choice.finite};
}
