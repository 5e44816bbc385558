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
        const f32 below = expf(logit - max), some = logit == max ? 1.0f : below;
        return is_nan(logit) || logit == -INFINITE ? 0.0f : some;
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

// Not inlined: what few rules need is not to lie between the instructions of the others.
__device__ __noinline__ f32 score_of(f32 max, f32 sum, u32 kind, f32 logit) { return Scores{max, sum, kind}.of(logit); }
__device__ __noinline__ f32 power(f32 x, f32 y) { return powf(x, y); }

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
        sum += p.normalize == NORMALIZE_LP ? power(fabsf(v), p.normalize_by) : v;
    }
    if (p.normalize != NORMALIZE_NONE) sum = reduce<Sum, N>(sum, s.parts);
    f32 divisor = 1.0f;
    if (p.normalize == NORMALIZE_SUM) divisor = sum + p.normalize_by;
    if (p.normalize == NORMALIZE_SUM_AT_LEAST) divisor = sum < p.normalize_by ? p.normalize_by : sum;
    if (p.normalize == NORMALIZE_LP) divisor = power(sum, 1.0f / p.normalize_by);
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

    // Past this multiprocessor's own cache: some launches read logits before their turn.
    template <class L> __device__ __forceinline__ void read(const ChoiceParams& p, const L* logits, u32 lane) {
        u32 some = 0;
#pragma unroll
        for (u32 i = 0; i < PER_LANE; i++) {
            const u32 e = lane + 32 * i;
            logit[i] = e < p.experts_total ? load_through(logits + e) : NOT_A_NUMBER;
        }
#pragma unroll
        for (u32 i = 0; i < PER_LANE; i++) some |= is_finite(logit[i]);
        finite = __any_sync(0xffffffffu, some);
    }
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

// By odd-even merges of MERGED words with as many: N is a power of two.
template <int N, int MERGED = 1, int APART = 1> __device__ __forceinline__ void sort_descending(u64 (&words)[N]) {
    if constexpr (MERGED < N) {
#pragma unroll
        for (int i = APART % MERGED; i + APART < N; i++) {
            if ((i - APART % MERGED) / APART % 2 != 0 || i / (2 * MERGED) != (i + APART) / (2 * MERGED)) continue;
            const u64 a = words[i], b = words[i + APART];
            words[i] = a > b ? a : b;
            words[i + APART] = a > b ? b : a;
        }
        if constexpr (APART > 1) sort_descending<N, MERGED, APART / 2>(words);
        else sort_descending<N, 2 * MERGED, 2 * MERGED>(words);
    }
}

// Words of shared memory of its own by which a warp may choose, and the most that are compared all with all.
#define CHOICE_SCRATCH 64
#define MOST_CANDIDATES 32

// The largest words of a warp, as many as `count`: the k-th to lane k. By places: a word's place is how many are larger. Only lanes
// whose own largest word has one of the first places have any of them. Words differ, but for 0, which is none.
template <int PER_LANE> __device__ __forceinline__ u64 largest_by_places(const u64 (&words)[PER_LANE], u32 count, u32 lane, u64* scratch) {
    u64 *heads = scratch, *candidates = scratch + 32;
    u64 head = words[0];
#pragma unroll
    for (int i = 1; i < PER_LANE; i++) head = Max::of(head, words[i]);
    heads[lane] = head;
    candidates[lane] = 0;
    __syncwarp();
    u32 place = 0;
#pragma unroll
    for (int j = 0; j < 32; j++) place += heads[j] > head;
    if (place < count) {
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) candidates[place * PER_LANE + i] = words[i];
    }
    __syncwarp();
    const u64 own = candidates[lane];
    place = 0;
#pragma unroll
    for (int j = 0; j < 32; j++) place += candidates[j] > own;
    if (place < count) heads[place] = own;
    __syncwarp();
    return heads[lane];
}

// `scratch`: CHOICE_SCRATCH words of shared memory for this warp alone, aligned to 16 bytes, or none.
template <class L, int PER_LANE>
__device__ __forceinline__ LaneChoice<PER_LANE> choose_in_registers(const ChoiceParams& p, const L* logits, u32 lane,
                                                                    u64* scratch = nullptr) {
    LaneChoice<PER_LANE> choice;
    choice.expert = lane;
    choice.read(p, logits, lane);
    if (!choice.finite) return choice;
    Scores scores = {};
    if (!p.by_logit) scores = choice.scores(p);
    // a key and, below it, its expert's complement: no two are equal, and 0 is below them all
    u64 words[PER_LANE];
    const bool plain = p.by_logit && !p.bias.data;
#pragma unroll
    for (u32 i = 0; i < PER_LANE; i++) {
        const u32 e = lane + 32 * i;
        const f32 key = is_nan(choice.logit[i]) ? -INFINITE : choice.logit[i];
        words[i] = e < p.experts_total ? (u64)order_of_key(key) << 32 | ~e : 0;
    }
#pragma unroll
    for (u32 i = 0; i < PER_LANE && !plain; i++) {
        const u32 e = lane + 32 * i;
        if (e >= p.experts_total) break;
        const f32 logit = choice.logit[i];
        f32 key = p.by_logit ? logit : score_of(scores.max, scores.sum, scores.kind, logit);
        if (p.bias.data) key += element(p.bias, 0, e);
        words[i] = (u64)order_of_key(is_nan(logit) || is_nan(key) ? -INFINITE : key) << 32 | ~e;
    }
    if (scratch && p.top_k * PER_LANE <= MOST_CANDIDATES) {
        const u64 word = largest_by_places(words, p.top_k, lane, scratch);
        if (lane < p.top_k) choice.expert = ~(u32)word;
        return choice;
    }
    sort_descending(words);
    u32 low[PER_LANE];
#pragma unroll
    for (u32 i = 0; i < PER_LANE; i++) low[i] = (u32)words[i];
    // the rounds that this lane's words win, and who wins the round of this lane's number
    u32 won = 0, winner = 0;
#pragma unroll 1
    for (u32 k = 0; k < p.top_k; k++) {
        const u32 order = (u32)(words[0] >> 32), next = (u32)words[0];
        bool mine = order == __reduce_max_sync(0xffffffffu, order);
        u32 lanes = __ballot_sync(0xffffffffu, mine);
        if (lanes & (lanes - 1)) {
            const u32 lowest = __reduce_max_sync(0xffffffffu, mine ? next : 0);
            mine = mine && next == lowest;
            lanes = __ballot_sync(0xffffffffu, mine);
        }
        if (lane == k) winner = lanes;
        if (mine) won |= 1u << k;
#pragma unroll
        for (u32 i = 0; i < PER_LANE; i++)
            if (mine) words[i] = i + 1 < PER_LANE ? words[i + 1] : 0;
    }
    winner = (u32)(__ffs(winner) - 1) % 32;
    const u32 before = __popc(__shfl_sync(0xffffffffu, won, winner) & ((1u << lane) - 1));
#pragma unroll
    for (u32 i = 0; i < PER_LANE; i++) {
        const u32 e = ~__shfl_sync(0xffffffffu, low[i], winner);
        if (lane < p.top_k && i == before) choice.expert = e;
    }
    return choice;
}

// Over the first lanes, `count` of them; the others' x changes nothing.
template <class Op, class T> __device__ __forceinline__ T reduce_first(T x, u32 count) {
#pragma unroll
    for (u32 mask = 16; mask > 0; mask >>= 1)
        if (mask < count) x = Op::of(x, __shfl_xor_sync(0xffffffffu, x, mask));
    return x;
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
        of_chosen.max = reduce_first<Max>(of_chosen.max, p.top_k);
        of_chosen.sum = reduce_first<Sum>(chosen ? of_chosen.term(value) : 0.0f, p.top_k);
        value = of_chosen.of(value);
    } else {
        value = choice.scores(p).of(value);
    }
    if (p.scale_when == SCALE_BEFORE && chosen) value *= element(p.scale, 0, choice.expert);
    f32 divisor = 1.0f;
    if (p.normalize != NORMALIZE_NONE) {
        const f32 term = p.normalize == NORMALIZE_LP ? power(fabsf(value), p.normalize_by) : value;
        const f32 sum = reduce_first<Sum>(chosen ? term : 0.0f, p.top_k);
        if (p.normalize == NORMALIZE_SUM) divisor = sum + p.normalize_by;
        if (p.normalize == NORMALIZE_SUM_AT_LEAST) divisor = sum < p.normalize_by ? p.normalize_by : sum;
        if (p.normalize == NORMALIZE_LP) divisor = power(sum, 1.0f / p.normalize_by);
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
