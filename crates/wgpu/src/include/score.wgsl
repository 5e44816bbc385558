// Scores of logits.

const SCORE_SOFTMAX = 0u;
const SCORE_SIGMOID = 1u;
const SCORE_SQRT_SOFTPLUS = 2u;
const SCORE_LOGIT = 3u;

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
        case SCORE_SIGMOID: { return sigmoid(logit); }
        case SCORE_SQRT_SOFTPLUS: {
            if (!is_finite(logit) && logit > 0.0) { return logit; }
            // far below zero softplus is exp, and its root is there where it is not
            if (logit < -20.0) { return exponential(0.5 * logit); }
            return sqrt(logarithm_of_one_and(exponential(-abs(logit))) + select(0.0, logit, logit > 0.0));
        }
        default: { return logit; }
    }
}
