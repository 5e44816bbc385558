// The choice by key, and its witness.

fn choose(token: u32, thread: u32, whole: Softmax) {
    make_keys(thread, whole);
    if (GROUPS != GROUPS_NONE) { limit_to_groups(thread); }
    choose_largest(thread, select(p.top_k, min(p.top_k + 1u, p.experts_total), has_keys));
    if (!has_keys) { return; }
    for (var i = 0u; i < KEYS; i++) {
        if (places[i] == p.top_k - 1u) { write_witness(token, 0u, words[i], chosen[i]); }
        if (places[i] == p.top_k) { write_witness(token, 1u, words[i], chosen[i]); }
    }
    if (thread == 0u && p.top_k == p.experts_total) { write_witness(token, 1u, MASKED, NO_EXPERT); }
}

fn write_witness(token: u32, i: u32, word: u32, expert: u32) {
    if (!has_keys) { return; }
    store_keys(at(p.keys, token, i), number_of(word));
    store_witness(at(p.witness, token, i), expert);
}
