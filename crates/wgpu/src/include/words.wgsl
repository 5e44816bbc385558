// Numbers as words that sort as they should.

// No number has these words.
const ABSENT = 0u;
const MASKED = 1u;
const ALWAYS = 0xffffffffu;
const MINUS_INFINITY = 0x007fffffu;
const PLUS_INFINITY = 0xff800000u;

// The word of a number, larger for larger ones; both zeros have the same. Not for NaN.
fn word_of(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    if (bits == 0x80000000u) { return bits; }
    return select(bits | 0x80000000u, ~bits, bits > 0x80000000u);
}

// -inf of what is masked or absent.
fn number_of(word: u32) -> f32 {
    let w = max(word, MINUS_INFINITY);
    return bitcast<f32>(select(~w, w & 0x7fffffffu, w >= 0x80000000u));
}

fn is_finite(x: f32) -> bool { return (bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u; }
