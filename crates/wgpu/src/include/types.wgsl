// What every kernel begins with: operands, formats, workgroups in a line.

// Where an operand's first element lies in its binding, and how far its rows lie apart; both in elements.
struct Tensor { offset: u32, stride: u32 }

fn at(t: Tensor, row: u32, i: u32) -> u32 { return t.offset + row * t.stride + i; }

// The number of a workgroup: as many as there are, in lines of 65535.
fn number(group: vec3<u32>) -> u32 { return group.y * 65535u + group.x; }

fn is_nan(x: f32) -> bool { return (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u; }

// y, or x where x is NaN: for what a driver may make a min or a max of, which drop it.
fn unless_nan(x: f32, y: f32) -> f32 { return bitcast<f32>(select(bitcast<u32>(y), bitcast<u32>(x), is_nan(x))); }

fn bf16_of(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    if (is_nan(x)) { return (bits >> 16u) | 0x40u; }
    return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
}

// Rounded to nearest, ties to even, which pack2x16float need not do.
fn f16_of(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    let sign = (bits >> 16u) & 0x8000u;
    let a = bits & 0x7fffffffu;
    if (a > 0x7f800000u) { return sign | 0x7e00u; }
    if (a >= 0x477ff000u) { return sign | 0x7c00u; }
    // below 2^-14 the unit is 2^-24, that of f32 between 0.5 and 1
    if (a < 0x38800000u) { return sign | (bitcast<u32>(bitcast<f32>(a) + 0.5) - 0x3f000000u); }
    return sign | ((a - 0x38000000u + 0xfffu + ((a >> 13u) & 1u)) >> 13u);
}

fn f32_of_bf16(word: u32, i: u32) -> f32 {
    return bitcast<f32>(select(word << 16u, word & 0xffff0000u, (i & 1u) == 1u));
}

fn f32_of_f16(word: u32, i: u32) -> f32 {
    let both = unpack2x16float(word);
    return select(both.x, both.y, (i & 1u) == 1u);
}
