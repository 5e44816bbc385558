// The grouped product for few rows: weights stream past, a team of 32 threads for two neighbouring pairs of matrix rows,
// ROWS (1, 2 or 4) rows of x at once.
//
//   find the expert and its rows
//   for each ROWS rows:   each thread: 16 bytes of each of the four matrix rows, times the rows of x (from the
//                                      cache), each read once for all four
//                         sums over the team, in one order; a thread a row stores
//
// Workgroups are (expert, row or slot) x blocks of TEAMS times two pairs, blocks first.

var<workgroup> found: vec3<u32>;

// The n-th rows; none: there are none, or other workgroups have them.
fn find(n: u32, thread: u32) -> Rows {
    if (FIND == FIND_ONE) { return rows_of(p.first); }
    if (FIND == FIND_SLOTS) { return clipped(load_groups(p.groups + p.row_begin + n), p.row_begin + n, p.row_begin + n + 1u); }
    if (FIND == FIND_EXPERTS) { return rows_of(p.first + n); }
    if (thread == 0u) { found = vec3<u32>(NONE, 0u, 0u); }
    workgroupBarrier();
    for (var e = thread; e < p.here; e += THREADS) {
        let rows = rows_of(p.first + e);
        if (rows.begin == p.row_begin + n && rows.begin < rows.end) { found = vec3<u32>(rows.expert, rows.begin, rows.end); }
    }
    let rows = workgroupUniformLoad(&found);
    return Rows(rows.x, rows.y, rows.z);
}

// What is not an array, so that it surely stays in registers: of each row of x its sums with gate, of both pairs, then with
// up.
struct Sums { r0: vec4<f32>, r1: vec4<f32>, r2: vec4<f32>, r3: vec4<f32> }

// Eight elements of each of the matrix rows, as they are read.
struct Part { g0: Raw_gate, g1: Raw_gate, u0: Raw_up, u1: Raw_up }

// Where row r of x begins; of the last of `rows` beyond them.
fn place(row: u32, rows: u32, r: u32) -> u32 {
    let x = x_of(slot_of(row + min(r, rows - 1u)));
    return select(x, p.x.offset, x == NONE);
}

// `matrix` says where its rows begin, in the order of a part.
fn read_part(matrix: vec4<u32>, k: u32, count: u32) -> Part {
    return Part(
        read8_gate(matrix.x + k, count), read8_gate(matrix.y + k, count),
        read8_up(matrix.z + k, count), read8_up(matrix.w + k, count),
    );
}

fn plus(sum: vec4<f32>, x: u32, count: u32, w: Four) -> vec4<f32> {
    return plus_eight(sum, widen8_x(read8_x(x, count)), w);
}

// The sums and eight more products of each of `rows` rows, which begin at x, from column k on.
fn multiply(sums: Sums, x: vec4<u32>, k: u32, count: u32, rows: u32, part: Part) -> Sums {
    let w = Four(widen8_gate(part.g0), widen8_gate(part.g1), widen8_up(part.u0), widen8_up(part.u1));
    var s = sums;
    s.r0 = plus(s.r0, x.x + k, count, w);
    if (ROWS > 1u && rows > 1u) { s.r1 = plus(s.r1, x.y + k, count, w); }
    if (ROWS > 2u) {
        if (rows > 2u) { s.r2 = plus(s.r2, x.z + k, count, w); }
        if (rows > 3u) { s.r3 = plus(s.r3, x.w + k, count, w); }
    }
    return s;
}

// The same with what is left of the columns, up to eight.
fn multiply_rest(sums: Sums, x: vec4<u32>, k: u32, rows: u32, matrix: vec4<u32>) -> Sums {
    return multiply(sums, x, k, p.inner - k, rows, read_part(matrix, k, p.inner - k));
}

// The rows and the pair that a team stores.
struct To { row: u32, rows: u32, expert: u32, pair: u32 }

// The sums of row r over the team, stored by the thread of the row's number.
fn put(here: Here, r: u32, sum: vec4<f32>, to: To) {
    let sums = team_sum4(here, TEAM, sum);
    if (thread_of(here) % TEAM == r && r < to.rows && to.pair < p.pairs) { store_pairs(to.row + r, to.expert, to.pair, sums); }
}

fn grouped_dot(here: Here) {
    let thread = thread_of(here);
    let blocks = (p.pairs + 2u * TEAMS - 1u) / (2u * TEAMS);
    let n = number(here.group) / blocks;
    let block = number(here.group) % blocks;
    let by_expert = FIND == FIND_EXPERTS || FIND == FIND_ONE;
    if (n >= select(p.row_end - p.row_begin, p.here, by_expert)) { return; }
    let found = find(n, thread);
    let e = found.expert - p.first;
    if (e >= p.here) { return; }

    let lane = thread % TEAM;
    let pair = 2u * (block * TEAMS + thread / TEAM);
    let a = min(pair, p.pairs - 1u);
    let b = min(pair + 1u, p.pairs - 1u);
    let begin = e * p.expert_stride;
    let matrix = vec4<u32>(at(p.gate, a, begin), at(p.gate, b, begin), at(p.up, a, begin), at(p.up, b, begin));
    // turns that all threads take; the rest is of some
    let whole = p.inner / STEP * STEP;
    for (var row = found.begin; row < found.end; row += ROWS) {
        let rows = min(found.end - row, ROWS);
        var x = vec4<u32>(place(row, rows, 0u));
        if (ROWS > 1u) { x.y = place(row, rows, 1u); }
        if (ROWS > 2u) {
            x.z = place(row, rows, 2u);
            x.w = place(row, rows, 3u);
        }
        var sums = Sums();
        for (var base = 0u; base < whole; base += STEP) {
            let k = base + lane * 8u;
            sums = multiply(sums, x, k, 8u, rows, read_part(matrix, k, 8u));
        }
        // one turn at most: as a condition it makes the loop before it slower on an H200 if there are several rows, as a loop
        // if there is one
        if (ROWS == 1u) {
            let k = whole + lane * 8u;
            if (k < p.inner) { sums = multiply_rest(sums, x, k, rows, matrix); }
        } else {
            for (var k = whole + lane * 8u; k < p.inner; k += STEP) { sums = multiply_rest(sums, x, k, rows, matrix); }
        }
        let to = To(row, rows, e, pair);
        put(here, 0u, sums.r0, to);
        if (ROWS > 1u) { put(here, 1u, sums.r1, to); }
        if (ROWS > 2u) {
            put(here, 2u, sums.r2, to);
            put(here, 3u, sums.r3, to);
        }
    }
}
