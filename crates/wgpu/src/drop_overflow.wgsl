// Slots that overflow their expert's capacity leave it, a workgroup a token: experts[t,k] = NO_EXPERT, weights[t,k] = 0. What
// is left is divided by its sum.
//
//   of each of the token's slots: how many of the rows of its expert, in its sequence, are of slots that come before
//   a slot with as many as the limit before it overflows
//
// Other tokens' slots are known from the permutation alone: their experts and weights may be written already. The slots of an
// expert's rows ascend, so that those of a sequence lie together.

const NO_ROW = 0xffffffffu;
const LIMIT_FRACTION = 1u;
const LIMIT_EVEN_SHARE = 2u;

// How many slots come before those that the threads look after.
var<workgroup> before: array<atomic<u32>, THREADS>;

// Tokens.
struct Sequence { begin: u32, end: u32 }

// How many of the sequences' inner bounds are a token's number or less, n being their count.
fn bounds_up_to(token: u32, n: u32) -> u32 {
    var low = 0u;
    var high = n;
    while (low < high) {
        let middle = low + (high - low) / 2u;
        if (load_sequences(p.sequences.offset + 1u + middle) <= token) { low = middle + 1u; } else { high = middle; }
    }
    return low;
}

fn sequence_of(token: u32) -> Sequence {
    if (!has_sequences || p.sequence_count < 2u) { return Sequence(0u, p.tokens); }
    let inner = p.sequence_count - 1u;
    let n = bounds_up_to(token, inner);
    var sequence = Sequence(0u, p.tokens);
    if (n > 0u) { sequence.begin = load_sequences(p.sequences.offset + n); }
    if (n < inner) { sequence.end = min(load_sequences(p.sequences.offset + n + 1u), p.tokens); }
    return sequence;
}

// a * b + c: the low word and the high one.
fn multiply_add(a: u32, b: u32, c: u32) -> vec2<u32> {
    let low = (a & 0xffffu) * (b & 0xffffu);
    let middle = (a >> 16u) * (b & 0xffffu) + (low >> 16u);
    let other = (a & 0xffffu) * (b >> 16u) + (middle & 0xffffu);
    let product = (other << 16u) | (low & 0xffffu);
    let sum = product + c;
    return vec2(sum, (a >> 16u) * (b >> 16u) + (middle >> 16u) + (other >> 16u) + select(0u, 1u, sum < product));
}

// ceil(fraction * length), the product rounded to f64.
fn part_of(length: u32) -> u32 {
    let a = multiply_add(p.fraction3, length, 0u);
    let b = multiply_add(p.fraction2, length, a.y);
    let c = multiply_add(p.fraction1, length, b.y);
    let whole = multiply_add(p.fraction0, length, c.y);
    if (whole.y != 0u) { return 0xffffffffu; }
    // a product less than half a unit in the last place above a whole number is rounded to it: 2^(bit - 53)
    var above = (a.x | b.x | c.x) != 0u;
    if (whole.x != 0u) {
        let bit = firstLeadingBit(whole.x) + 11u;
        let middle = select(0u, 1u << (bit & 31u), bit < 32u);
        let high = select(1u << (bit & 31u), 0u, bit < 32u);
        above = c.x > high || (c.x == high && (b.x > middle || (b.x == middle && a.x != 0u)));
    }
    return whole.x + select(0u, 1u, above && whole.x != 0xffffffffu);
}

fn limit_of(length: u32) -> u32 {
    switch (p.limit_by) {
        case LIMIT_FRACTION: { return part_of(length); }
        case LIMIT_EVEN_SHARE: {
            let share = (length + p.experts_total - 1u) / p.experts_total;
            return select(0xffffffffu, p.limit * share, share == 0u || p.limit <= 0xffffffffu / share);
        }
        default: { return p.limit; }
    }
}

// The first of the rows `low .. high` whose slot is this one or a later one.
fn row_from(slot: u32, rows: vec2<u32>) -> u32 {
    var low = rows.x;
    var high = rows.y;
    while (low < high) {
        let middle = low + (high - low) / 2u;
        if (load_row_slot(p.row_slot.offset + middle) < slot) { low = middle + 1u; } else { high = middle; }
    }
    return low;
}

// NaN comes last.
fn importance_of(token: u32) -> u32 {
    if (!has_importance) { return 0u; }
    let x = load_importance(p.importance.offset + token * p.importance.stride);
    if (is_nan(x)) { return MINUS_INFINITY; }
    return word_of(x);
}

// How many of every THREADS-th row's slots come before the token's k-th, but no more than would overflow.
fn count_before(thread: u32, token: u32, k: u32, sequence: Sequence, limit: u32) -> u32 {
    let slot = token * p.top_k + k;
    let expert = load_experts(at(p.experts, token, k));
    if (expert >= p.experts_total || load_slot_row(p.slot_row.offset + slot) == NO_ROW) { return 0u; }
    let offset = p.offsets.offset + expert;
    let rows = min(vec2<u32>(load_offsets(offset), load_offsets(offset + 1u)), vec2<u32>(p.slots));
    let first = row_from(sequence.begin * p.top_k, rows);
    let end = row_from(sequence.end * p.top_k, rows);
    let own = importance_of(token);
    var count = 0u;
    for (var row = first + thread; row < end && count < limit; row += THREADS) {
        let other = load_row_slot(p.row_slot.offset + row);
        let s = other / p.top_k;
        let j = other % p.top_k;
        if (j > k) { continue; }
        if (j == k && has_importance) {
            let word = importance_of(s);
            count += u32(word > own || (word == own && s < token));
        } else {
            count += u32(j < k || s < token);
        }
    }
    return count;
}

@compute @workgroup_size(THREADS)
fn drop_overflow(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let token = number(group);
    if (token >= p.tokens) { return; }
    let sequence = sequence_of(token);
    let limit = limit_of(sequence.end - sequence.begin);
    var mine = 0.0;
    for (var base = 0u; base < p.top_k; base += THREADS) {
        atomicStore(&before[thread], 0u);
        workgroupBarrier();
        for (var k = base; k < min(base + THREADS, p.top_k); k++) {
            atomicAdd(&before[k - base], count_before(thread, token, k, sequence, limit));
        }
        workgroupBarrier();
        let k = base + thread;
        if (k < p.top_k) {
            let slot_row = load_slot_row(p.slot_row.offset + token * p.top_k + k);
            if (slot_row != NO_ROW && atomicLoad(&before[thread]) >= limit) {
                store_experts(at(p.experts, token, k), NO_EXPERT);
                store_weights(at(p.weights, token, k), 0.0);
            }
            mine += load_weights(at(p.weights, token, k));
        }
    }
    if (p.renormalize == 0u) { return; }
    var divisor = total(thread, mine);
    if (divisor < p.least) { divisor = unless_nan(divisor, p.least); }
    for (var k = thread; k < p.top_k; k += THREADS) {
        let place = at(p.weights, token, k);
        var weight = 0.0;
        if (!is_zero(divisor)) { weight = load_weights(place) / divisor; }
        store_weights(place, weight);
    }
}
