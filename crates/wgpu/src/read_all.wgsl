// Reads `count` groups of 8 elements (16 bytes of a 16-bit format), each once.

@compute @workgroup_size(256)
fn read_all(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let all = p.groups * 256u;
    var i = number(group) * 256u + thread;
    var sum = vec4(0.0);
    for (; i + 3u * all < p.count; i += 4u * all) {
        let a = widen8_from(read8_from(8u * i, 8u));
        let b = widen8_from(read8_from(8u * (i + all), 8u));
        let c = widen8_from(read8_from(8u * (i + 2u * all), 8u));
        let d = widen8_from(read8_from(8u * (i + 3u * all), 8u));
        sum += ((a[0] + a[1]) + (b[0] + b[1])) + ((c[0] + c[1]) + (d[0] + d[1]));
    }
    for (; i < p.count; i += all) {
        let a = widen8_from(read8_from(8u * i, 8u));
        sum += a[0] + a[1];
    }
    // without a use of the sum the loads would be left out
    if (bitcast<u32>(sum.x + sum.y + sum.z + sum.w) == 0x9e3779b9u) { store_sink(0u, p.count); }
}
