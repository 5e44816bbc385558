// d_y[row of slot] = scale * w[slot] * d_out[t]. A launch has a window of the tokens and of the rows.

@compute @workgroup_size(256)
fn combine_backward_rows(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let pieces = (p.hidden + 511u) / 512u;
    let n = number(group);
    let slot = n / pieces;
    let h = (n % pieces) * 512u + 2u * thread;
    if (slot >= p.slots || h >= p.hidden) { return; }
    var row = slot;
    if (has_slot_row) { row = load_slot_row(p.slot_row + slot) - p.row_begin; }
    if (row >= p.rows) { return; }
    let t = slot / p.top_k;
    var factor = p.scale;
    if (has_weights) { factor *= load_weights(at(p.weights, t, slot % p.top_k)); }
    let d = at(p.d_out, t, h);
    let place = at(p.out, row, h);
    if (h + 1u == p.hidden) {
        store_out(place, factor * load_d_out(d));
    } else {
        store_pair_out(place, factor * load_d_out(d), factor * load_d_out(d + 1u));
    }
}
