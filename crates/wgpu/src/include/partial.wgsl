// What earlier launches made of the same sums, where it could not stay in `out`.

fn partial(row: u32, i: u32) -> f32 {
    if (!has_before) { return 0.0; }
    return load_before(at(p.before, row, i));
}

fn partial_pair(row: u32, i: u32, end: u32) -> vec2<f32> {
    if (i >= end) { return vec2<f32>(); }
    return vec2<f32>(partial(row, i), partial(row, min(i + 1u, end - 1u)));
}
