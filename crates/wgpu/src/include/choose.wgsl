// The experts of a token: the K largest keys, equal ones by expert.
//
//   thread i has the keys of the experts i, i + THREADS, ...: KEYS of them
//   the threads in the order of their largest keys: only the first K can have any of the K largest
//   the keys of these are the candidates: the place of each is how many of them go before it
//
// So the number of barriers does not grow with K.
//
// The last p.always experts are chosen whatever their logits: their keys go before all others.

const NOWHERE = 0xffffffffu;

var<private> words: array<u32, KEYS>;
var<workgroup> kept: array<atomic<u32>, (THREADS * KEYS + 31u) / 32u>;

fn before(a: vec2<u32>, b: vec2<u32>) -> bool { return a.x > b.x || (a.x == b.x && a.y < b.y); }

// How many of the first n on the board go before. By fours: each turn of a loop costs, and some devices end a loop that
// has very many.
fn ahead_of(own: vec2<u32>, n: u32) -> u32 {
    var ahead = 0u;
    var i = 0u;
    for (; i + 4u <= n; i += 4u) {
        ahead += u32(before(board[i], own)) + u32(before(board[i + 1u], own));
        ahead += u32(before(board[i + 2u], own)) + u32(before(board[i + 3u], own));
    }
    for (; i < n; i++) { ahead += u32(before(board[i], own)); }
    return ahead;
}

// The experts before this one compete for places.
fn competing() -> u32 { return p.experts_total - p.always; }

fn make_keys(thread: u32, whole: Softmax) {
    for (var i = 0u; i < KEYS; i++) {
        let e = thread + i * THREADS;
        words[i] = ABSENT;
        if (e >= p.experts_total) { continue; }
        if (e >= competing()) {
            words[i] = ALWAYS;
            continue;
        }
        var key = logits[i];
        if (!BY_LOGIT) { key = score(key, whole); }
        if (has_bias) { key += load_bias(p.bias.offset + e); }
        words[i] = MINUS_INFINITY;
        if (!is_nan(logits[i]) && !is_nan(key)) { words[i] = word_of(key); }
    }
}

// Masks the keys of all groups but the best.
fn limit_to_groups(thread: u32) {
    let size = competing() / p.groups;
    var best: array<u32, KEYS>;
    var second: array<u32, KEYS>;
    var ahead: array<u32, KEYS>;
    if (thread < (THREADS * KEYS + 31u) / 32u) { atomicStore(&kept[thread], 0u); }
    for (var base = 0u; base < competing(); base += CAPACITY) {
        workgroupBarrier();
        for (var i = 0u; i < KEYS; i++) {
            let e = thread + i * THREADS;
            if (e >= base && e - base < CAPACITY) { board[e - base] = vec2(words[i], 0u); }
        }
        workgroupBarrier();
        for (var i = 0u; i < KEYS; i++) {
            let g = thread + i * THREADS;
            if (g >= p.groups) { break; }
            for (var e = max(g * size, base); e < min((g + 1u) * size, base + CAPACITY); e++) {
                let word = board[e - base].x;
                second[i] = max(second[i], min(word, best[i]));
                best[i] = max(best[i], word);
            }
        }
    }
    if (GROUPS == GROUPS_BY_BEST_TWO && size > 1u) {
        for (var i = 0u; i < KEYS; i++) {
            if (thread + i * THREADS >= p.groups) { break; }
            let worth = number_of(best[i]) + number_of(second[i]);
            best[i] = MINUS_INFINITY;
            if (!is_nan(worth)) { best[i] = word_of(worth); }
        }
    }
    for (var base = 0u; base < p.groups; base += CAPACITY) {
        workgroupBarrier();
        for (var i = 0u; i < KEYS; i++) {
            let g = thread + i * THREADS;
            if (g >= base && g - base < CAPACITY) { board[g - base] = vec2(best[i], g); }
        }
        workgroupBarrier();
        for (var i = 0u; i < KEYS; i++) {
            let g = thread + i * THREADS;
            if (g >= p.groups) { break; }
            ahead[i] += ahead_of(vec2(best[i], g), min(CAPACITY, p.groups - base));
        }
    }
    for (var i = 0u; i < KEYS; i++) {
        let g = thread + i * THREADS;
        if (g < p.groups && ahead[i] < p.groups_kept) { atomicOr(&kept[g / 32u], 1u << (g % 32u)); }
    }
    workgroupBarrier();
    for (var i = 0u; i < KEYS; i++) {
        let e = thread + i * THREADS;
        let g = e / size;
        if (e >= competing() || ((atomicLoad(&kept[g / 32u]) >> (g % 32u)) & 1u) == 1u) { continue; }
        words[i] = select(MASKED, word_of(0.0), MASKED_TO_ZERO);
    }
}

// Places up to `count - 1` are right; others are `count` or more.
fn choose_largest(thread: u32, count: u32) {
    var rank = thread;
    let threads = select(count, THREADS, KEYS == 1u || count > THREADS);
    if (threads < THREADS) {
        var largest = vec2(ABSENT, thread);
        for (var i = 0u; i < KEYS; i++) {
            let word = vec2(words[i], thread + i * THREADS);
            if (before(word, largest)) { largest = word; }
        }
        workgroupBarrier();
        board[thread] = largest;
        workgroupBarrier();
        rank = ahead_of(largest, THREADS);
    }
    let candidates = threads * KEYS;
    // candidates that fit are dealt out again, so that all threads have as many
    let fit = candidates <= CAPACITY;
    for (var base = 0u; base < candidates; base += CAPACITY) {
        workgroupBarrier();
        for (var i = 0u; i < KEYS; i++) {
            let place = rank * KEYS + i;
            if (place < candidates && place >= base && place - base < CAPACITY) {
                board[place - base] = vec2(words[i], thread + i * THREADS);
            }
        }
        workgroupBarrier();
        for (var i = 0u; i < KEYS; i++) {
            let place = thread + i * THREADS;
            if (base == 0u) {
                var own = vec2(words[i], place);
                if (fit) { own = vec2(ABSENT, 0u); }
                if (fit && place < candidates) { own = board[place]; }
                words[i] = own.x;
                chosen[i] = own.y;
                places[i] = select(0u, NOWHERE, own.x == ABSENT || (!fit && rank >= threads));
            }
            if (places[i] == NOWHERE) { continue; }
            places[i] += ahead_of(vec2(words[i], chosen[i]), min(CAPACITY, candidates - base));
        }
    }
}
