// out[e] = offsets[e + 1] - offsets[e], or so much more.

@compute @workgroup_size(256)
fn counts(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let e = number(group) * 256u + thread;
    if (e >= p.experts) { return; }
    var count = load_offsets(p.offsets.offset + e + 1u) - load_offsets(p.offsets.offset + e);
    if (p.add != 0u) { count += load_out(p.out.offset + e); }
    store_out(p.out.offset + e, count);
}
