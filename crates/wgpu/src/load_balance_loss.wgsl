// The load-balancing loss and its gradient: a workgroup has p.block neighbouring tokens, and counts the slots of their
// sequence once for all of them. What they add to the loss is kept for loss_sum.
//
// For the gradient counts are taken from the whole number next to their mean before they are weighed: where all experts have
// the same, nothing is left.

const CHUNK = 2048u;
var<workgroup> chunk: array<atomic<u32>, CHUNK>;

// Slots of each of the thread's experts.
var<private> counts: array<u32, KEYS>;

// Tokens; a token of no sequence has an empty one.
struct Sequence { begin: u32, end: u32 }

fn end_of(i: u32) -> u32 { return min(load_sequences(p.sequences.offset + i), p.all_tokens); }

// An end below one before it counts as that one.
fn sequence_of(token: u32) -> Sequence {
    if (!has_sequences) { return Sequence(0u, p.all_tokens); }
    var begin = end_of(0u);
    for (var s = 0u; s < p.sequence_count; s++) {
        if (token < begin) { break; }
        let end = max(begin, end_of(s + 1u));
        if (token < end) { return Sequence(begin, end); }
        begin = end;
    }
    return Sequence(token, token);
}

fn count_slots(thread: u32, sequence: Sequence) {
    let first = sequence.begin * p.top_k;
    let end = sequence.end * p.top_k;
    for (var base = 0u; base < p.experts_total; base += CHUNK) {
        workgroupBarrier();
        for (var i = thread; i < CHUNK; i += THREADS) { atomicStore(&chunk[i], 0u); }
        workgroupBarrier();
        for (var slot = first + thread; slot < end; slot += THREADS) {
            let e = load_experts(at(p.experts, slot / p.top_k, slot % p.top_k));
            if (e < p.experts_total && e >= base && e - base < CHUNK) { atomicAdd(&chunk[e - base], 1u); }
        }
        workgroupBarrier();
        for (var i = 0u; i < KEYS; i++) {
            let e = thread + i * THREADS;
            if (e < p.experts_total && e >= base && e - base < CHUNK) { counts[i] = atomicLoad(&chunk[e - base]); }
        }
    }
}

// The sum of a token's scores, and what counts are taken from.
struct Counted { scores: f32, base: f32 }

// The mean of the experts' counts by the token's probabilities.
fn mean_count(thread: u32, whole: Softmax, by: Counted) -> f32 {
    var sum = 0.0;
    for (var i = 0u; i < KEYS; i++) {
        if (thread + i * THREADS >= p.experts_total) { break; }
        sum = fma(score(logits[i], whole) / by.scores, f32(counts[i]) - by.base, sum);
    }
    workgroupBarrier();
    return total(thread, sum);
}

// What a token adds to the loss, its row being `row`; its gradient is written.
fn loss_of(row: u32, thread: u32, factor: f32) -> f32 {
    for (var i = 0u; i < KEYS; i++) { d_scores[i] = 0.0; }
    let most = read_logits(row, thread);
    if (!most.finite) { return 0.0; }
    var whole = Softmax(most.word, 0.0);
    if (SCORE == SCORE_SOFTMAX) { whole = whole_of(thread, most.word); }
    var mine = 0.0;
    for (var i = 0u; i < KEYS; i++) {
        if (thread + i * THREADS < p.experts_total) { mine += score(logits[i], whole); }
    }
    workgroupBarrier();
    let sum = total(thread, mine);
    if (is_zero(sum)) { return 0.0; }
    let mean = mean_count(thread, whole, Counted(sum, 0.0));
    let base = round(mean);
    let rest = mean_count(thread, whole, Counted(sum, base));
    for (var i = 0u; i < KEYS; i++) {
        if (thread + i * THREADS >= p.experts_total) { break; }
        d_scores[i] = factor * ((f32(counts[i]) - base) - rest) / sum;
    }
    through_scores(thread, whole);
    return factor * mean;
}

@compute @workgroup_size(THREADS)
fn load_balance_loss(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let n = number(group);
    let first = p.first_token + n * p.block;
    let end = min(first + p.block, p.first_token + p.tokens);
    if (first >= end) { return; }
    var loss = 0.0;
    var sequence = Sequence(0u, 0u);
    for (var token = first; token < end; token++) {
        if (token >= sequence.end) {
            sequence = sequence_of(token);
            count_slots(thread, sequence);
        }
        let row = token - p.first_token;
        let length = f32(sequence.end - sequence.begin);
        if (sequence.begin < sequence.end) {
            loss += loss_of(row, thread, p.factor / length / length);
        } else {
            for (var i = 0u; i < KEYS; i++) { d_scores[i] = 0.0; }
        }
        put_d_logits(row, thread);
    }
    if (has_shares && thread == 0u) { store_shares(p.shares.offset + n, loss); }
}
