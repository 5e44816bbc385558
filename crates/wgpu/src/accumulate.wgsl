// acc += w * y, w one number or one a row.

@compute @workgroup_size(256)
fn accumulate(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let pieces = (p.width + 511u) / 512u;
    let n = number(group);
    let row = n / pieces;
    let i = (n % pieces) * 512u + 2u * thread;
    if (row >= p.rows || i >= p.width) { return; }
    var w = p.weight;
    if (has_weights) { w = load_weights(at(p.weights, row, 0u)); }
    let acc = at(p.acc, row, i);
    let y = at(p.y, row, i);
    let a = load_acc(acc) + w * load_y(y);
    if (i + 1u == p.width) { store_acc(acc, a); return; }
    store_pair_acc(acc, a, load_acc(acc + 1u) + w * load_y(y + 1u));
}
