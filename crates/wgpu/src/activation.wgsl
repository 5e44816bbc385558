// out = act(g) * u. What is not bound lies in out: no memory is bound twice. An element is read before it is written, by one
// thread.

@compute @workgroup_size(256)
fn activation(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let pieces = (p.width + 511u) / 512u;
    let n = number(group);
    let row = n / pieces;
    let i = (n % pieces) * 512u + 2u * thread;
    if (row >= p.rows || i >= p.width) { return; }
    let a = activated(row, i);
    let place = at(p.out, row, i);
    if (i + 1u == p.width) { store_out(place, a); return; }
    store_pair_out(place, a, activated(row, i + 1u));
}

fn activated(row: u32, i: u32) -> f32 {
    return activate(gate_of(at(p.gate, row, i * p.step)), up_of(at(p.up, row, i * p.step)), p.limit, p.alpha);
}

fn gate_of(i: u32) -> f32 {
    if (FORM == FORM_PLAIN) { return 0.0; }
    if (has_gate) { return load_gate(i); }
    return load_out(i);
}

fn up_of(i: u32) -> f32 {
    if (has_up) { return load_up(i); }
    return load_out(i);
}
