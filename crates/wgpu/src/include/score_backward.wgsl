// Through the scores of a token: thread i has the experts i, i + THREADS, ...: KEYS of them.

var<private> logits: array<f32, KEYS>;
// The gradient of each expert's score.
var<private> d_scores: array<f32, KEYS>;

// Reads the logits. The word of the largest of them; none is finite: no token of such logits has a gradient.
struct Largest { word: u32, finite: bool }

fn read_logits(token: u32, thread: u32) -> Largest {
    var mine = vec2(MINUS_INFINITY, 0u);
    for (var i = 0u; i < KEYS; i++) {
        let e = thread + i * THREADS;
        if (e >= p.experts_total) { break; }
        let logit = load_logits(at(p.logits, token, e));
        logits[i] = logit;
        if (!is_nan(logit)) { mine = max(mine, vec2(word_of(logit), u32(is_finite(logit)))); }
    }
    workgroupBarrier();
    let all = largest(thread, mine);
    return Largest(all.x, all.y != 0u);
}

// The sum of a softmax over all experts.
fn whole_of(thread: u32, most: u32) -> Softmax {
    var sum = 0.0;
    for (var i = 0u; i < KEYS; i++) {
        if (thread + i * THREADS < p.experts_total) { sum += term(logits[i], most); }
    }
    workgroupBarrier();
    return Softmax(most, total(thread, sum));
}

// d_scores becomes what is added to the gradient of the logits.
fn through_scores(thread: u32, whole: Softmax) {
    var along = 0.0;
    if (SCORE == SCORE_SOFTMAX) {
        for (var i = 0u; i < KEYS; i++) {
            if (thread + i * THREADS < p.experts_total) { along = fma(softmax(logits[i], whole), d_scores[i], along); }
        }
        workgroupBarrier();
        along = total(thread, along);
    }
    for (var i = 0u; i < KEYS; i++) {
        if (thread + i * THREADS >= p.experts_total) { break; }
        if (SCORE == SCORE_SOFTMAX) {
            d_scores[i] = softmax(logits[i], whole) * (d_scores[i] - along);
        } else {
            d_scores[i] *= score_slope(logits[i], whole);
        }
    }
}

fn score_slope(logit: f32, whole: Softmax) -> f32 {
    if (is_nan(logit)) { return 0.0; }
    switch (SCORE) {
        case SCORE_SIGMOID: { return sigmoid(logit) * sigmoid(-logit); }
        case SCORE_SQRT_SOFTPLUS: {
            let s = score(logit, whole);
            if (is_zero(s)) { return 0.0; }
            return sigmoid(logit) / (2.0 * s);
        }
        default: { return 1.0; }
    }
}

fn put_d_logits(row: u32, thread: u32) {
    if (!has_out) { return; }
    for (var i = 0u; i < KEYS; i++) {
        let e = thread + i * THREADS;
        if (e < p.experts_total) { put(row, e, d_scores[i]); }
    }
}
