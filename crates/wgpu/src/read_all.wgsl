// Reads `count` groups of 8 elements (16 bytes of a 16-bit format), each once.

@compute @workgroup_size(256)
fn read_all(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let all = p.groups * 256u;
    var i = number(group) * 256u + thread;
    var sum = vec4(0.0);
    for (; i + 3u * all < p.count; i += 4u * all) {
        let a = load8_from(8u * i);
        let b = load8_from(8u * (i + all));
        let c = load8_from(8u * (i + 2u * all));
        let d = load8_from(8u * (i + 3u * all));
        sum += ((a.a + a.b) + (b.a + b.b)) + ((c.a + c.b) + (d.a + d.b));
    }
    for (; i < p.count; i += all) {
        let a = load8_from(8u * i);
        sum += a.a + a.b;
    }
    // without a use of the sum the loads would be left out
    if (bitcast<u32>(sum.x + sum.y + sum.z + sum.w) == 0x9e3779b9u) { store_sink(0u, p.count); }
}
