// Where a gradient goes: `out`, in place of what is there or added to it (p.adds).

fn there(place: u32) -> f32 {
    if (p.adds == 0u) { return 0.0; }
    return load_out(place);
}

fn put(row: u32, i: u32, value: f32) {
    let place = at(p.out, row, i);
    store_out(place, value + there(place));
}

// Elements i and i + 1 of a row, as far as they come before `end`.
fn put_pair(row: u32, i: u32, end: u32, value: vec2<f32>) {
    if (i >= end) { return; }
    if (i + 1u == end) {
        put(row, i, value.x);
        return;
    }
    let place = at(p.out, row, i);
    store_pair_out(place, value.x + there(place), value.y + there(place + 1u));
}
