// logits = softcap(scale * (n . router^T) + bias): a team an expert, TOKENS tokens at once. The router is `weight`.

@compute @workgroup_size(256)
fn gate(here: Here) {
    let teams = THREADS / TEAM;
    let blocks = (p.columns + teams - 1u) / teams;
    let n = number(here.group);
    let thread = thread_of(here);
    let first = n / blocks * TOKENS;
    // a workgroup past the end, of the last line
    if (first >= p.rows) { return; }
    let expert = n % blocks * teams + thread / TEAM;
    let d = dots(here, first, min(expert, p.columns - 1u));
    let i = thread % TEAM;
    if (i < TOKENS) { finish_logit(first + i, expert, d.sum[i], norm_factor(d.squares[i])); }
    if (has_normed && n % blocks == 0u) {
        for (var t = 0u; t < TOKENS; t++) { write_normed(thread, first + t, norm_factor(d.squares[t])); }
    }
}
