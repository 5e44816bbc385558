// The router z-loss, factor * z^2 with z = ln(sum_e exp(logit)), and its gradient: a workgroup has p.block neighbouring
// tokens. What they add to the loss is kept for loss_sum.

@compute @workgroup_size(THREADS)
fn z_loss(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let n = number(group);
    let first = n * p.block;
    let end = min(first + p.block, p.tokens);
    if (first >= end) { return; }
    var loss = 0.0;
    for (var row = first; row < end; row++) {
        for (var i = 0u; i < KEYS; i++) { d_scores[i] = 0.0; }
        let most = read_logits(row, thread);
        if (most.finite) {
            let whole = whole_of(thread, most.word);
            let z = number_of(most.word) + logarithm(whole.sum, 0.0);
            loss = fma(p.factor * z, z, loss);
            for (var i = 0u; i < KEYS; i++) { d_scores[i] = 2.0 * p.factor * z * softmax(logits[i], whole); }
        }
        put_d_logits(row, thread);
    }
    if (has_shares && thread == 0u) { store_shares(p.shares.offset + n, loss); }
}
