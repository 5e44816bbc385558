// The grouped product for few rows: weights stream past, 32 threads for every pair of matrix rows, ROWS (1, 4 or 8) rows
// of x at once.
//
//   find the expert and its rows
//   for each ROWS rows:   each thread: UNROLL times 16 bytes of both rows of its pair, all on their way together
//                                      times the rows of x (from the cache)
//                         sums over 32 threads through workgroup memory, in one order; store
//
// Workgroups are (expert, row or slot) x blocks of TEAMS pairs, blocks first. 128 threads.
const TEAM = 32u;
const TEAMS = 4u;
// elements that a team reads at once
const STEP = TEAM * 8u;

// a sum apart, so that threads that add up different sums read different banks
var<workgroup> partial: array<f32, 2u * TEAMS * ROWS * (TEAM + 1u)>;
var<workgroup> total: array<f32, 2u * TEAMS * ROWS>;
var<workgroup> found: vec3<u32>;

// The n-th rows; none: there are none, or other workgroups have them.
fn find(n: u32, thread: u32) -> Rows {
    if (FIND == FIND_ONE) { return rows_of(p.first); }
    if (FIND == FIND_SLOTS) { return clipped(load_groups(p.groups + p.row_begin + n), p.row_begin + n, p.row_begin + n + 1u); }
    if (FIND == FIND_EXPERTS) { return rows_of(p.first + n); }
    if (thread == 0u) { found = vec3<u32>(NONE, 0u, 0u); }
    workgroupBarrier();
    for (var e = thread; e < p.here; e += TEAM * TEAMS) {
        let rows = rows_of(p.first + e);
        if (rows.begin == p.row_begin + n && rows.begin < rows.end) { found = vec3<u32>(rows.expert, rows.begin, rows.end); }
    }
    let rows = workgroupUniformLoad(&found);
    return Rows(rows.x, rows.y, rows.z);
}

// By row, what is not an array, so that it surely stays in registers: sums with gate and up, and where rows of x begin.
struct Sums {
    r0: vec2<f32>, r1: vec2<f32>, r2: vec2<f32>, r3: vec2<f32>, r4: vec2<f32>, r5: vec2<f32>, r6: vec2<f32>, r7: vec2<f32>,
}
struct Places { low: vec4<u32>, high: vec4<u32> }

// Where row r of x begins; of the last of `rows` beyond them.
fn place(row: u32, rows: u32, r: u32) -> u32 {
    let x = x_of(slot_of(row + min(r, rows - 1u)));
    return select(x, p.x.offset, x == NONE);
}

fn plus(sum: vec2<f32>, x: u32, count: u32, g: mat2x4<f32>, u: mat2x4<f32>) -> vec2<f32> {
    let v = widen8_x(read8_x(x, count));
    return sum + vec2<f32>(dot(v[0], g[0]) + dot(v[1], g[1]), dot(v[0], u[0]) + dot(v[1], u[1]));
}

// The sums and eight more products of each row, from column k on.
fn multiply(sums: Sums, x: Places, k: u32, count: u32, rows: u32, gate: Raw_gate, up: Raw_up) -> Sums {
    let g = widen8_gate(gate);
    let u = widen8_up(up);
    var s = sums;
    s.r0 = plus(s.r0, x.low.x + k, count, g, u);
    if (ROWS > 1u) {
        if (rows > 1u) { s.r1 = plus(s.r1, x.low.y + k, count, g, u); }
        if (rows > 2u) { s.r2 = plus(s.r2, x.low.z + k, count, g, u); }
        if (rows > 3u) { s.r3 = plus(s.r3, x.low.w + k, count, g, u); }
    }
    if (ROWS > 4u) {
        if (rows > 4u) { s.r4 = plus(s.r4, x.high.x + k, count, g, u); }
        if (rows > 5u) { s.r5 = plus(s.r5, x.high.y + k, count, g, u); }
        if (rows > 6u) { s.r6 = plus(s.r6, x.high.z + k, count, g, u); }
        if (rows > 7u) { s.r7 = plus(s.r7, x.high.w + k, count, g, u); }
    }
    return s;
}

// A thread's part of the sums of row r.
fn put(team: u32, lane: u32, r: u32, sum: vec2<f32>) {
    partial[(team * ROWS + r) * (TEAM + 1u) + lane] = sum.x;
    partial[((TEAMS + team) * ROWS + r) * (TEAM + 1u) + lane] = sum.y;
}

fn grouped_dot(group: vec3<u32>, thread: u32) {
    let blocks = (p.pairs + TEAMS - 1u) / TEAMS;
    let n = number(group) / blocks;
    let block = number(group) % blocks;
    let by_expert = FIND == FIND_EXPERTS || FIND == FIND_ONE;
    if (n >= select(p.row_end - p.row_begin, p.here, by_expert)) { return; }
    let found = find(n, thread);
    let e = found.expert - p.first;
    if (e >= p.here) { return; }

    let team = thread / TEAM;
    let lane = thread % TEAM;
    let pair = min(block * TEAMS + team, p.pairs - 1u);
    let gate = at(p.gate, pair, e * p.expert_stride);
    let up = at(p.up, pair, e * p.expert_stride);
    let whole = p.inner / (UNROLL * STEP) * (UNROLL * STEP);
    for (var row = found.begin; row < found.end; row += ROWS) {
        let rows = min(found.end - row, ROWS);
        var x: Places;
        x.low.x = place(row, rows, 0u);
        if (ROWS > 1u) { x.low = vec4<u32>(x.low.x, place(row, rows, 1u), place(row, rows, 2u), place(row, rows, 3u)); }
        if (ROWS > 4u) {
            x.high = vec4<u32>(place(row, rows, 4u), place(row, rows, 5u), place(row, rows, 6u), place(row, rows, 7u));
        }
        var sums = Sums();
        for (var base = 0u; base < whole; base += UNROLL * STEP) {
            let k = base + lane * 8u;
            let g0 = read8_gate(gate + k, 8u);
            let u0 = read8_up(up + k, 8u);
            var g1: Raw_gate;
            var u1: Raw_up;
            var g2: Raw_gate;
            var u2: Raw_up;
            var g3: Raw_gate;
            var u3: Raw_up;
            if (UNROLL > 1u) { g1 = read8_gate(gate + k + STEP, 8u); u1 = read8_up(up + k + STEP, 8u); }
            if (UNROLL > 2u) { g2 = read8_gate(gate + k + 2u * STEP, 8u); u2 = read8_up(up + k + 2u * STEP, 8u); }
            if (UNROLL > 3u) { g3 = read8_gate(gate + k + 3u * STEP, 8u); u3 = read8_up(up + k + 3u * STEP, 8u); }
            sums = multiply(sums, x, k, 8u, rows, g0, u0);
            if (UNROLL > 1u) { sums = multiply(sums, x, k + STEP, 8u, rows, g1, u1); }
            if (UNROLL > 2u) { sums = multiply(sums, x, k + 2u * STEP, 8u, rows, g2, u2); }
            if (UNROLL > 3u) { sums = multiply(sums, x, k + 3u * STEP, 8u, rows, g3, u3); }
        }
        for (var k = whole + lane * 8u; k < p.inner; k += STEP) {
            let count = p.inner - k;
            sums = multiply(sums, x, k, count, rows, read8_gate(gate + k, count), read8_up(up + k, count));
        }
        put(team, lane, 0u, sums.r0);
        if (ROWS > 1u) {
            put(team, lane, 1u, sums.r1);
            put(team, lane, 2u, sums.r2);
            put(team, lane, 3u, sums.r3);
        }
        if (ROWS > 4u) {
            put(team, lane, 4u, sums.r4);
            put(team, lane, 5u, sums.r5);
            put(team, lane, 6u, sums.r6);
            put(team, lane, 7u, sums.r7);
        }
        workgroupBarrier();
        if (thread < 2u * TEAMS * ROWS) {
            var sum = 0.0;
            for (var i = 0u; i < TEAM; i++) { sum += partial[thread * (TEAM + 1u) + i]; }
            total[thread] = sum;
        }
        workgroupBarrier();
        if (thread < TEAMS / 2u * rows) {
            let t = thread / rows * 2u;
            let r = thread % rows;
            let g = vec2<f32>(total[t * ROWS + r], total[(t + 1u) * ROWS + r]);
            let u = vec2<f32>(total[(TEAMS + t) * ROWS + r], total[(TEAMS + t + 1u) * ROWS + r]);
            store_pairs(row + r, e, block * TEAMS + t, vec4<f32>(g, u));
        }
    }
}
