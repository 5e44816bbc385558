// down and combine of one token in one launch: what each slot's expert makes of its activated row is added up where it is
// formed, slots in order, and written nowhere.
//
//   out = residual + routed_scale * sum_k w[k] * (down[expert of k] . a[k] + bias) + shared
//
// A team of 32 threads has a slot and four neighbouring outputs; SLOTS (1, 2, 4 or 8) teams have the same outputs, and go
// on with the slots SLOTS further.

// fours of outputs of a workgroup
const FOURS = TEAMS / SLOTS;

var<workgroup> weighted: array<vec4<f32>, TEAMS>;

// Eight elements of each of four rows of down, as they are read.
struct Part { r0: Raw_down, r1: Raw_down, r2: Raw_down, r3: Raw_down }

fn read_part(rows: vec4<u32>, k: u32, count: u32) -> Part {
    return Part(
        read8_down(rows.x + k, count), read8_down(rows.y + k, count),
        read8_down(rows.z + k, count), read8_down(rows.w + k, count),
    );
}

fn plus(sum: vec4<f32>, a: u32, count: u32, part: Part) -> vec4<f32> {
    let w = Four(widen8_down(part.r0), widen8_down(part.r1), widen8_down(part.r2), widen8_down(part.r3));
    return plus_eight(sum, widen8_a(read8_a(a, count)), w);
}

// A thread's part of the products of a slot's row with the four rows of down from row i on.
fn products(lane: u32, slot: u32, e: u32, i: u32) -> vec4<f32> {
    let last = p.hidden - 1u;
    let begin = e * p.expert_stride;
    let rows = vec4<u32>(
        at(p.down, min(i, last), begin), at(p.down, min(i + 1u, last), begin),
        at(p.down, min(i + 2u, last), begin), at(p.down, min(i + 3u, last), begin),
    );
    let a = at(p.a, slot, 0u);
    // turns that all threads take; the rest is of some
    let whole = p.inner / STEP * STEP;
    var sum = vec4<f32>(0.0);
    for (var base = 0u; base < whole; base += STEP) {
        let k = base + lane * 8u;
        sum = plus(sum, a + k, 8u, read_part(rows, k, 8u));
    }
    let k = whole + lane * 8u;
    if (k < p.inner) { sum = plus(sum, a + k, p.inner - k, read_part(rows, k, p.inner - k)); }
    return sum;
}

fn weight_of(slot: u32) -> f32 {
    if (!has_weights) { return 1.0; }
    return load_weights(at(p.weights, 0u, slot));
}

fn bias_of(e: u32, i: u32) -> vec4<f32> {
    if (!has_bias) { return vec4<f32>(0.0); }
    let last = p.hidden - 1u;
    return vec4<f32>(
        load_bias(at(p.bias, e, min(i, last))), load_bias(at(p.bias, e, min(i + 1u, last))),
        load_bias(at(p.bias, e, min(i + 2u, last))), load_bias(at(p.bias, e, min(i + 3u, last))),
    );
}

@compute @workgroup_size(THREADS)
fn down_combine(here: Here) {
    let thread = thread_of(here);
    let first = 4u * FOURS * number(here.group);
    if (first >= p.hidden) { return; }
    let team = thread / TEAM;
    let lane = thread % TEAM;
    let i = first + 4u * (team / SLOTS);
    // two outputs of a thread that adds up
    let h = first + 2u * thread;
    let adds = thread < 2u * FOURS && h < p.hidden;
    // read before the sums are there
    var more = Beside();
    if (adds) { more = beside(0u, h, shared_factor(0u)); }
    var value = vec2<f32>(0.0);
    for (var base = 0u; base < p.top_k; base += SLOTS) {
        let slot = base + team % SLOTS;
        var e = 0u;
        var weight = 0.0;
        var sum = vec4<f32>(0.0);
        if (slot < p.top_k) {
            e = load_experts(at(p.experts, 0u, slot));
            weight = weight_of(slot);
            sum = products(lane, slot, e, i);
        }
        sum = team_sum4(here, TEAM, sum);
        workgroupBarrier();
        if (lane == 0u) { weighted[team] = weight * (sum + bias_of(e, i)); }
        workgroupBarrier();
        if (adds) {
            for (var s = 0u; s < min(SLOTS, p.top_k - base); s++) {
                let four = weighted[thread / 2u * SLOTS + s];
                value += select(four.xy, four.zw, thread % 2u == 1u);
            }
        }
    }
    if (adds) { write_out(0u, h, out_of(value, more)); }
}
