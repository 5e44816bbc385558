// What a routing rule is made of.

const SELECT_TOP_K = 0u;
const SELECT_SPARSE_MIXER = 1u;
const SELECT_TABLE = 2u;
const GROUPS_NONE = 0u;
const GROUPS_BY_BEST = 1u;
const GROUPS_BY_BEST_TWO = 2u;
const NORMALIZE_NONE = 0u;
const NORMALIZE_SUM = 1u;
const NORMALIZE_SUM_AT_LEAST = 2u;
const NORMALIZE_LP = 3u;
const SCALE_NEVER = 0u;
const SCALE_BEFORE = 1u;
const SCALE_AFTER = 2u;

// Whether a logit takes part in a pass of the sparse mixer whose largest logit is `most`. From an infinite one all terms but
// its equals' are zero.
fn is_near(logit: f32, most: f32, jitter: f32) -> bool {
    let width = 2.0 * jitter * select(most, abs(logit), abs(logit) > most);
    return !is_finite(most) || logit == most || most - logit <= width;
}
