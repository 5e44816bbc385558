// Logits and scores, as words that sort as they should.

const SCORE_SOFTMAX = 0u;
const SCORE_SIGMOID = 1u;
const SCORE_SQRT_SOFTPLUS = 2u;
const SCORE_LOGIT = 3u;

// No number has these words.
const ABSENT = 0u;
const MASKED = 1u;
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

// exp(logit - max) of a softmax; `most` is the word of the maximum.
fn term(logit: f32, most: u32) -> f32 {
    if (is_nan(logit)) { return 0.0; }
    let word = word_of(logit);
    if (word == MINUS_INFINITY) { return 0.0; }
    if (word == most) { return 1.0; }
    if (most == PLUS_INFINITY) { return 0.0; }
    return exponential(logit - number_of(most));
}

// What the softmax of a token is made with.
struct Softmax { most: u32, sum: f32 }

fn softmax(logit: f32, whole: Softmax) -> f32 {
    if (is_zero(whole.sum)) { return 0.0; }
    return term(logit, whole.most) / whole.sum;
}

fn score(logit: f32, whole: Softmax) -> f32 {
    if (is_nan(logit)) { return 0.0; }
    switch (SCORE) {
        case SCORE_SOFTMAX: { return softmax(logit, whole); }
        case SCORE_SIGMOID: {
            let e = exponential(-abs(logit));
            return select(1.0, e, logit < 0.0) / (1.0 + e);
        }
        case SCORE_SQRT_SOFTPLUS: {
            if (!is_finite(logit) && logit > 0.0) { return logit; }
            // far below zero softplus is exp, and its root is there where it is not
            if (logit < -20.0) { return exponential(0.5 * logit); }
            return sqrt(logarithm_of_one_and(exponential(-abs(logit))) + select(0.0, logit, logit > 0.0));
        }
        default: { return logit; }
    }
}
