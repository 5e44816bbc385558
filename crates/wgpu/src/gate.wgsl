// logits = softcap(scale * (n . router^T) + bias): a team an expert, TOKENS tokens at once. The router is `weight`.

@compute @workgroup_size(256)
fn gate(here: Here) {
    let thread = thread_of(here);
    let first = first_row(here.group);
    // a workgroup past the end, of the last line
    if (first >= p.rows) { return; }
    let expert = column_of(here);
    let d = dots(here, first, min(expert, p.columns - 1u));
    let i = thread % TEAM;
    if (i < TOKENS) { finish_logit(first + i, expert, d.sum[i], norm_factor(d.squares[i])); }
    if (has_normed && block_of(here.group) == 0u) {
        for (var t = 0u; t < TOKENS; t++) { write_normed(thread, first + t, norm_factor(d.squares[t])); }
    }
}
