// The choice by token id: the token's row of the table. There is no witness of it.

fn choose(token: u32, thread: u32, whole: Softmax) {
    let id = load_token_ids(p.token_ids.offset + token * p.token_ids.stride);
    var status = select(STATUS_TOKEN_OUT_OF_RANGE, 0u, id < p.vocabulary);
    for (var i = 0u; i < KEYS; i++) {
        places[i] = thread + i * THREADS;
        chosen[i] = NO_EXPERT;
        if (places[i] >= p.top_k || id >= p.vocabulary) { continue; }
        let e = load_table(at(p.table, id, places[i]));
        if (e < p.experts_total) {
            chosen[i] = e;
        } else if (e != NO_EXPERT) {
            status |= STATUS_EXPERT_OUT_OF_RANGE;
        }
    }
    if (status != 0u) { raise(status); }
}

fn write_witness(token: u32, i: u32, word: u32, expert: u32) {}
