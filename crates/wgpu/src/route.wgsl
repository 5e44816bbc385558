// Logits to experts and weights, a workgroup a token; `choose` is in route_by_key.wgsl or route_by_table.wgsl.

// The token's logits: thread i has those of the experts i, i + THREADS, ...
var<private> logits: array<f32, KEYS>;
// Some of the chosen experts, their places among them, and what their weights are so far; places from K on are not chosen.
var<private> chosen: array<u32, KEYS>;
var<private> places: array<u32, KEYS>;
var<private> values: array<f32, KEYS>;
var<workgroup> first_two: array<u32, 2>;

@compute @workgroup_size(THREADS)
fn route(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let token = number(group);
    if (token >= p.tokens) { return; }
    // the largest logit, and whether there is a finite one
    var mine = vec2(MINUS_INFINITY, 0u);
    for (var i = 0u; i < KEYS; i++) {
        let e = thread + i * THREADS;
        if (e >= p.experts_total) { break; }
        let logit = load_logits(at(p.logits, token, e));
        logits[i] = logit;
        if (!is_nan(logit)) { mine = max(mine, vec2(word_of(logit), u32(is_finite(logit)))); }
    }
    let all = largest(thread, mine);
    if (all.y == 0u) {
        no_choice(token, thread);
        return;
    }
    var whole = Softmax(all.x, 0.0);
    if (SCORE == SCORE_SOFTMAX && (!BY_LOGIT || !(OF_CHOSEN || SELECTION == SELECT_SPARSE_MIXER))) {
        for (var i = 0u; i < KEYS; i++) {
            if (thread + i * THREADS < p.experts_total) { whole.sum += term(logits[i], whole.most); }
        }
        whole.sum = total(thread, whole.sum);
    }
    choose(token, thread, whole);
    start_values(token, thread, whole);
    weigh(token, thread);
}

fn no_choice(token: u32, thread: u32) {
    for (var k = thread; k < p.top_k; k += THREADS) {
        store_experts(at(p.experts, token, k), k);
        store_weights(at(p.weights, token, k), p.not_a_number);
    }
    if (thread < 2u) { write_witness(token, thread, MASKED, NO_EXPERT); }
    if (thread == 0u) { raise(STATUS_NO_FINITE_SCORE); }
}

// What the weights start as.
fn start_values(token: u32, thread: u32, whole: Softmax) {
    if (SELECTION == SELECT_SPARSE_MIXER) {
        start_sparse_mixer(token, thread);
        return;
    }
    var among = whole;
    if (OF_CHOSEN) {
        var mine = MINUS_INFINITY;
        for (var i = 0u; i < KEYS; i++) {
            if (places[i] >= p.top_k || chosen[i] == NO_EXPERT) { continue; }
            values[i] = load_logits(at(p.logits, token, chosen[i]));
            if (!is_nan(values[i])) { mine = max(mine, word_of(values[i])); }
        }
        workgroupBarrier();
        among = Softmax(largest(thread, vec2(mine, 0u)).x, 0.0);
        for (var i = 0u; i < KEYS; i++) {
            if (places[i] < p.top_k && chosen[i] != NO_EXPERT) { among.sum += term(values[i], among.most); }
        }
        among.sum = total(thread, among.sum);
    }
    for (var i = 0u; i < KEYS; i++) {
        if (places[i] >= p.top_k || chosen[i] == NO_EXPERT) { continue; }
        if (OF_CHOSEN) {
            values[i] = softmax(values[i], among);
        } else {
            values[i] = score(load_logits(at(p.logits, token, chosen[i])), whole);
        }
    }
}

// The two masked passes; the experts are chosen already.
fn start_sparse_mixer(token: u32, thread: u32) {
    for (var i = 0u; i < KEYS; i++) {
        if (places[i] < 2u) { first_two[places[i]] = chosen[i]; }
    }
    workgroupBarrier();
    let first = first_two[0];
    for (var turn = 0u; turn < 2u; turn++) {
        let most = load_logits(at(p.logits, token, first_two[turn]));
        var sum = 0.0;
        for (var i = 0u; i < KEYS; i++) {
            let e = thread + i * THREADS;
            if (e >= p.experts_total || is_nan(most) || (turn == 1u && e == first)) { continue; }
            if (is_near(logits[i], most, p.jitter)) { sum += term(logits[i], word_of(most)); }
        }
        sum = total(thread, sum);
        for (var i = 0u; i < KEYS; i++) {
            if (places[i] == turn) { values[i] = select(1.0 / sum, 0.0, is_zero(sum)); }
        }
    }
}

// The slot of a place: those that are always chosen have the first places and the last slots.
fn slot_of(place: u32) -> u32 { return select(place - p.always, place + p.top_k - p.always, place < p.always); }

// Values become weights.
fn weigh(token: u32, thread: u32) {
    var sum = 0.0;
    for (var i = 0u; i < KEYS; i++) {
        if (places[i] >= p.top_k || chosen[i] == NO_EXPERT) { continue; }
        if (SCALE_WHEN == SCALE_BEFORE) { values[i] *= load_scale(p.scale.offset + chosen[i]); }
        if (NORMALIZE == NORMALIZE_LP) { sum += power(abs(values[i]), p.normalize_by); } else { sum += values[i]; }
    }
    var divisor = 1.0;
    if (NORMALIZE != NORMALIZE_NONE) {
        workgroupBarrier();
        divisor = total(thread, sum);
        if (NORMALIZE == NORMALIZE_SUM) { divisor += p.normalize_by; }
        if (NORMALIZE == NORMALIZE_SUM_AT_LEAST && divisor < p.normalize_by) {
            divisor = unless_nan(divisor, p.normalize_by);
        }
        if (NORMALIZE == NORMALIZE_LP) { divisor = power(divisor, 1.0 / p.normalize_by); }
    }
    for (var i = 0u; i < KEYS; i++) {
        if (places[i] >= p.top_k) { continue; }
        var weight = 0.0;
        if (chosen[i] != NO_EXPERT && !is_zero(divisor)) {
            weight = values[i] / divisor;
            if (SCALE_WHEN == SCALE_AFTER) { weight *= load_scale(p.scale.offset + chosen[i]); }
            weight *= p.weight_scale;
        }
        let slot = slot_of(places[i]);
        store_experts(at(p.experts, token, slot), chosen[i]);
        store_weights(at(p.weights, token, slot), weight);
    }
}
