// out = act(g) * u; gate, up and out may be the same memory: an element is read before it is written, by one thread.

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
    var g = 0.0;
    if (has_gate) { g = load_gate(at(p.gate, row, i * p.step)); }
    return activate(g, load_up(at(p.up, row, i * p.step)), p.limit, p.alpha);
}
