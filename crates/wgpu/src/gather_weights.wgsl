// w[t,k] = p[t,id] / sum_j p[t,id_j] * scale[id], a workgroup a token.

@compute @workgroup_size(THREADS)
fn gather_weights(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let token = number(group);
    if (token >= p.tokens) { return; }
    var mine = 0.0;
    var status = 0u;
    for (var k = thread; k < p.top_k; k += THREADS) {
        let e = load_experts(at(p.experts, token, k));
        if (e < p.experts_total) {
            mine += load_scores(at(p.scores, token, e));
        } else if (e != NO_EXPERT) {
            status = STATUS_EXPERT_OUT_OF_RANGE;
        }
    }
    if (status != 0u) { raise(status); }
    let sum = total(thread, mine);
    for (var k = thread; k < p.top_k; k += THREADS) {
        let e = load_experts(at(p.experts, token, k));
        var weight = 0.0;
        if (e < p.experts_total && !is_zero(sum)) {
            weight = load_scores(at(p.scores, token, e)) / sum;
            if (has_scale) { weight *= load_scale(p.scale.offset + e); }
        }
        store_weights(at(p.weights, token, k), weight);
    }
}
