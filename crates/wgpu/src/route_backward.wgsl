// From the gradient of a token's routing weights to that of its logits, and what each slot adds to its expert's scale: a
// workgroup a token; thread i has the slots i, i + THREADS, ... too.
//
// Differences of gradients are taken before anything is multiplied by them: what cancels, as all of it does in a norm of one
// slot, leaves nothing.

var<private> experts: array<u32, KEYS>;
// What the weights started as, and that times the expert's scale where it comes before the norm.
var<private> values: array<f32, KEYS>;
var<private> scaled: array<f32, KEYS>;
// Of the weights, then of what was normalised, then of the values.
var<private> d_values: array<f32, KEYS>;
// Of each pass of the sparse mixer: the sum of all terms but that of its expert, which is 1; -1: it has no softmax.
var<private> others: array<f32, 2>;

fn has_slot(thread: u32, i: u32) -> bool {
    return thread + i * THREADS < p.top_k && experts[i] != NO_EXPERT;
}

fn expert_of(token: u32, k: u32) -> u32 {
    let e = load_experts(at(p.experts, token, k));
    return select(NO_EXPERT, e, e < p.experts_total);
}

fn scale_of(i: u32) -> f32 { return load_scale(p.scale.offset + experts[i]); }

@compute @workgroup_size(THREADS)
fn route_backward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let token = number(group);
    if (token >= p.tokens) { return; }
    let most = read_logits(token, thread);
    for (var i = 0u; i < KEYS; i++) {
        let k = thread + i * THREADS;
        experts[i] = NO_EXPERT;
        if (k < p.top_k) { experts[i] = expert_of(token, k); }
        d_scores[i] = 0.0;
    }
    if (most.finite) {
        let whole = start_values(token, thread, most.word);
        through_weights(token, thread);
        if (SELECTION == SELECT_SPARSE_MIXER) {
            through_passes(token, thread);
        } else {
            if (OF_CHOSEN) { through_softmax_of_chosen(thread); }
            to_experts(thread);
            if (!OF_CHOSEN) { through_scores(thread, whole); }
        }
    } else {
        no_shares(token, thread);
    }
    put_d_logits(token, thread);
}

// As route has them.
fn start_values(token: u32, thread: u32, most: u32) -> Softmax {
    var whole = Softmax(most, 0.0);
    if (SELECTION == SELECT_SPARSE_MIXER) {
        for (var turn = 0u; turn < 2u; turn++) { start_pass(token, thread, turn); }
        return whole;
    }
    if (OF_CHOSEN) {
        var mine = MINUS_INFINITY;
        for (var i = 0u; i < KEYS; i++) {
            if (!has_slot(thread, i)) { continue; }
            values[i] = load_logits(at(p.logits, token, experts[i]));
            if (!is_nan(values[i])) { mine = max(mine, word_of(values[i])); }
        }
        workgroupBarrier();
        whole = Softmax(largest(thread, vec2(mine, 0u)).x, 0.0);
        for (var i = 0u; i < KEYS; i++) {
            if (has_slot(thread, i)) { whole.sum += term(values[i], whole.most); }
        }
        workgroupBarrier();
        whole.sum = total(thread, whole.sum);
    } else if (SCORE == SCORE_SOFTMAX) {
        whole = whole_of(thread, most);
    }
    for (var i = 0u; i < KEYS; i++) {
        if (!has_slot(thread, i)) { continue; }
        let logit = load_logits(at(p.logits, token, experts[i]));
        if (OF_CHOSEN) { values[i] = softmax(logit, whole); } else { values[i] = score(logit, whole); }
    }
    return whole;
}

// Whether an expert is in the softmax of a pass beside the pass's own.
fn is_beside(token: u32, e: u32, logit: f32, turn: u32) -> bool {
    let own = expert_of(token, turn);
    let taken = turn == 1u && e == expert_of(token, 0u);
    return e != own && !taken && is_near(logit, load_logits(at(p.logits, token, own)), p.jitter);
}

fn start_pass(token: u32, thread: u32, turn: u32) {
    others[turn] = -1.0;
    let own = expert_of(token, turn);
    if (turn >= p.top_k || own == NO_EXPERT) { return; }
    let most = load_logits(at(p.logits, token, own));
    if (is_nan(most) || word_of(most) == MINUS_INFINITY) { return; }
    var sum = 0.0;
    for (var i = 0u; i < KEYS; i++) {
        let e = thread + i * THREADS;
        if (e < p.experts_total && is_beside(token, e, logits[i], turn)) { sum += term(logits[i], word_of(most)); }
    }
    workgroupBarrier();
    others[turn] = total(thread, sum);
    if (thread == turn) { values[0] = 1.0 / (1.0 + others[turn]); }
}

// A sum over the token's slots, for each of the thread's own.
var<private> along: array<f32, KEYS>;

// Puts two numbers of some slots on the board, of those from `base` on.
fn show(thread: u32, base: u32, i: u32, both: vec2<u32>) {
    let k = thread + i * THREADS;
    if (k >= base && k - base < CAPACITY) { board[k - base] = both; }
}

fn words(a: f32, b: f32) -> vec2<u32> { return bitcast<vec2<u32>>(vec2<f32>(a, b)); }

fn shown(j: u32) -> vec2<f32> { return bitcast<vec2<f32>>(board[j]); }

fn through_weights(token: u32, thread: u32) {
    var sum = 0.0;
    for (var i = 0u; i < KEYS; i++) {
        scaled[i] = 0.0;
        d_values[i] = 0.0;
        if (!has_slot(thread, i)) { continue; }
        scaled[i] = values[i];
        if (SCALE_WHEN == SCALE_BEFORE) { scaled[i] *= scale_of(i); }
        if (NORMALIZE == NORMALIZE_LP) { sum += power(abs(scaled[i]), p.normalize_by); } else { sum += scaled[i]; }
        d_values[i] = p.weight_scale * load_d_weights(at(p.d_weights, token, thread + i * THREADS));
    }
    var divisor = 1.0;
    var fixed = NORMALIZE == NORMALIZE_NONE;
    var beside = 0.0;
    if (NORMALIZE != NORMALIZE_NONE) {
        workgroupBarrier();
        divisor = total(thread, sum);
        if (NORMALIZE == NORMALIZE_SUM) {
            beside = p.normalize_by;
            divisor += beside;
        }
        if (NORMALIZE == NORMALIZE_SUM_AT_LEAST && !is_nan(divisor) && divisor < p.normalize_by) {
            divisor = p.normalize_by;
            fixed = true;
        }
        if (NORMALIZE == NORMALIZE_LP) { divisor = power(divisor, 1.0 / p.normalize_by); }
    }
    let none = is_zero(divisor);
    for (var i = 0u; i < KEYS; i++) {
        if (none) { d_values[i] = 0.0; }
        if (none || !has_slot(thread, i)) { continue; }
        if (SCALE_WHEN == SCALE_AFTER) {
            share(token, thread, i, d_values[i] * (scaled[i] / divisor));
            d_values[i] *= scale_of(i);
        }
    }
    if (none) {
        no_shares(token, thread);
        return;
    }
    through_norm(thread, divisor, fixed, beside);
    for (var i = 0u; i < KEYS; i++) {
        if (has_slot(thread, i) && SCALE_WHEN == SCALE_BEFORE) {
            share(token, thread, i, d_values[i] * values[i]);
            d_values[i] *= scale_of(i);
        }
        if (experts[i] == NO_EXPERT && SCALE_WHEN != SCALE_NEVER) { share(token, thread, i, 0.0); }
    }
}

// `fixed`: the divisor is a constant. `beside` is the part of it that is.
fn through_norm(thread: u32, divisor: f32, fixed: bool, beside: f32) {
    if (fixed) {
        for (var i = 0u; i < KEYS; i++) { d_values[i] /= divisor; }
        return;
    }
    if (NORMALIZE == NORMALIZE_LP) {
        through_power(thread, divisor);
        return;
    }
    differences(thread, false);
    for (var i = 0u; i < KEYS; i++) { d_values[i] = fma(d_values[i], beside, along[i]) / divisor / divisor; }
}

// along[k] = sum_j (d[k] - d[j]) * v[j], v being the values or the scaled ones.
fn differences(thread: u32, of_values: bool) {
    for (var i = 0u; i < KEYS; i++) { along[i] = 0.0; }
    for (var base = 0u; base < p.top_k; base += CAPACITY) {
        workgroupBarrier();
        for (var i = 0u; i < KEYS; i++) {
            if (thread + i * THREADS >= p.top_k) { break; }
            var v = 0.0;
            if (has_slot(thread, i)) { v = select(scaled[i], values[i], of_values); }
            show(thread, base, i, words(v, d_values[i]));
        }
        workgroupBarrier();
        for (var i = 0u; i < KEYS; i++) {
            if (!has_slot(thread, i)) { continue; }
            for (var j = 0u; j < min(CAPACITY, p.top_k - base); j++) {
                let other = shown(j);
                along[i] = fma(d_values[i] - other.y, other.x, along[i]);
            }
        }
    }
}

// With r = abs(v) / n: d_v[k] = 1/n * sum_{j != k} (g[k] r[j]^p - g[j] sign(v[j]) r[j] * sign(v[k]) r[k]^(p-1)).
fn through_power(thread: u32, divisor: f32) {
    for (var i = 0u; i < KEYS; i++) { along[i] = 0.0; }
    for (var base = 0u; base < p.top_k; base += CAPACITY) {
        workgroupBarrier();
        for (var i = 0u; i < KEYS; i++) {
            if (thread + i * THREADS >= p.top_k) { break; }
            let r = scaled[i] / divisor;
            show(thread, base, i, words(power(abs(r), p.normalize_by), d_values[i] * r));
        }
        workgroupBarrier();
        for (var i = 0u; i < KEYS; i++) {
            if (!has_slot(thread, i)) { continue; }
            let r = scaled[i] / divisor;
            let slope = sign(r) * power(abs(r), p.normalize_by - 1.0);
            for (var j = 0u; j < min(CAPACITY, p.top_k - base); j++) {
                let other = shown(j);
                if (base + j == thread + i * THREADS) { continue; }
                along[i] = fma(d_values[i], other.x, fma(-other.y, slope, along[i]));
            }
        }
    }
    for (var i = 0u; i < KEYS; i++) { d_values[i] = along[i] / divisor; }
}

fn through_softmax_of_chosen(thread: u32) {
    differences(thread, true);
    for (var i = 0u; i < KEYS; i++) { d_values[i] = values[i] * along[i]; }
}

// d_scores of an expert is the sum over the slots that name it.
fn to_experts(thread: u32) {
    for (var base = 0u; base < p.top_k; base += CAPACITY) {
        workgroupBarrier();
        for (var i = 0u; i < KEYS; i++) {
            if (thread + i * THREADS >= p.top_k) { break; }
            show(thread, base, i, vec2<u32>(experts[i], bitcast<u32>(d_values[i])));
        }
        workgroupBarrier();
        for (var i = 0u; i < KEYS; i++) {
            let e = thread + i * THREADS;
            if (e >= p.experts_total) { break; }
            for (var j = 0u; j < min(CAPACITY, p.top_k - base); j++) {
                if (board[j].x == e) { d_scores[i] += shown(j).y; }
            }
        }
    }
}

// A pass is the softmax over its expert and those beside it.
fn through_passes(token: u32, thread: u32) {
    workgroupBarrier();
    show(thread, 0u, 0u, words(0.0, d_values[0]));
    workgroupBarrier();
    for (var turn = 0u; turn < min(p.top_k, 2u); turn++) {
        if (others[turn] < 0.0) { continue; }
        let own = expert_of(token, turn);
        let most = word_of(load_logits(at(p.logits, token, own)));
        let whole = 1.0 + others[turn];
        let d = shown(turn).y / whole;
        for (var i = 0u; i < KEYS; i++) {
            let e = thread + i * THREADS;
            if (e >= p.experts_total) { break; }
            if (e == own) { d_scores[i] = fma(d, others[turn] / whole, d_scores[i]); }
            if (is_beside(token, e, logits[i], turn)) {
                d_scores[i] = fma(-d, term(logits[i], most) / whole, d_scores[i]);
            }
        }
    }
}

// What slot i of the thread adds to the gradient of its expert's scale.
fn share(token: u32, thread: u32, i: u32, value: f32) {
    let k = thread + i * THREADS;
    if (has_shares && k < p.top_k) { store_shares(p.shares.offset + token * p.top_k + k, value); }
}

fn no_shares(token: u32, thread: u32) {
    for (var i = 0u; i < KEYS; i++) { share(token, thread, i, 0.0); }
}
