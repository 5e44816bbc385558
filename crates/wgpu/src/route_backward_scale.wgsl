// d_scale[e] = the sum of the shares of the slots of e, in their order: a thread an expert.

var<workgroup> slot_experts: array<u32, THREADS>;
var<workgroup> slot_shares: array<f32, THREADS>;

@compute @workgroup_size(THREADS)
fn route_backward_scale(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let e = number(group) * THREADS + thread;
    var sum = 0.0;
    for (var base = 0u; base < p.slots; base += THREADS) {
        let slot = base + thread;
        workgroupBarrier();
        slot_experts[thread] = 0xffffffffu;
        if (slot < p.slots) {
            slot_experts[thread] = load_experts(at(p.experts, slot / p.top_k, slot % p.top_k));
            slot_shares[thread] = load_shares(p.shares.offset + slot);
        }
        workgroupBarrier();
        for (var i = 0u; i < THREADS; i++) {
            if (slot_experts[i] == e) { sum += slot_shares[i]; }
        }
    }
    if (e < p.experts_total) { put(0u, e, sum + partial(0u, e)); }
}
