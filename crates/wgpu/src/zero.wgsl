// out = 0, elements of whatever format by their size.

@compute @workgroup_size(256)
fn zero(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let pieces = (p.width + 511u) / 512u;
    let n = number(group);
    let row = n / pieces;
    let i = (n % pieces) * 512u + 2u * thread;
    if (row >= p.rows || i >= p.width) { return; }
    let place = at(p.out, row, i);
    if (i + 1u < p.width) { store_pair_out(place, 0.0, 0.0); } else { store_out(place, 0.0); }
}
