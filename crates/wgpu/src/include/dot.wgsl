// Dot products of TOKENS rows of x (1 or 4) with one row of the weight, by a team of TEAM threads, eight elements a thread at
// a time. A row's sum has the same order for any TOKENS. The entry's file has `weighted`, what x is before the product, and
// SQUARES says whether its squares are added up.

// Component i is of token i.
struct Dots { sum: vec4<f32>, squares: vec4<f32> }

// A thread's share of one token.
struct Share { sum: vec4<f32>, squares: vec4<f32> }

const STEP = 8u * TEAM;
const TEAMS = THREADS / TEAM;

// Workgroups are TOKENS rows x blocks of TEAMS columns, blocks first.
fn blocks() -> u32 { return (p.columns + TEAMS - 1u) / TEAMS; }
fn first_row(group: vec3<u32>) -> u32 { return number(group) / blocks() * TOKENS; }
fn block_of(group: vec3<u32>) -> u32 { return number(group) % blocks(); }
fn column_of(here: Here) -> u32 { return block_of(here.group) * TEAMS + thread_of(here) / TEAM; }

fn dots(here: Here, first: u32, column: u32) -> Dots {
    let weight = at(p.weight, column, 0u);
    let last = p.rows - 1u;
    let x0 = at(p.x, min(first, last), 0u);
    let x1 = at(p.x, min(first + 1u, last), 0u);
    let x2 = at(p.x, min(first + 2u, last), 0u);
    let x3 = at(p.x, min(first + 3u, last), 0u);
    var s0: Share;
    var s1: Share;
    var s2: Share;
    var s3: Share;
    // four reads of the weight are under way at once
    for (var h = thread_of(here) % TEAM * 8u; h < p.width; h += 4u * STEP) {
        let w0 = weight_at(weight, h);
        let w1 = weight_at(weight, h + STEP);
        let w2 = weight_at(weight, h + 2u * STEP);
        let w3 = weight_at(weight, h + 3u * STEP);
        s0 = plus(plus(plus(plus(s0, x0, h, w0), x0, h + STEP, w1), x0, h + 2u * STEP, w2), x0, h + 3u * STEP, w3);
        if (TOKENS > 1u) {
            s1 = plus(plus(plus(plus(s1, x1, h, w0), x1, h + STEP, w1), x1, h + 2u * STEP, w2), x1, h + 3u * STEP, w3);
            s2 = plus(plus(plus(plus(s2, x2, h, w0), x2, h + STEP, w1), x2, h + 2u * STEP, w2), x2, h + 3u * STEP, w3);
            s3 = plus(plus(plus(plus(s3, x3, h, w0), x3, h + STEP, w1), x3, h + 2u * STEP, w2), x3, h + 3u * STEP, w3);
        }
    }
    var dots: Dots;
    dots.sum = team_sum4(here, TEAM, vec4(total(s0.sum), total(s1.sum), total(s2.sum), total(s3.sum)));
    if (SQUARES) {
        dots.squares =
            team_sum4(here, TEAM, vec4(total(s0.squares), total(s1.squares), total(s2.squares), total(s3.squares)));
    }
    return dots;
}

fn total(x: vec4<f32>) -> f32 { return (x.x + x.y) + (x.z + x.w); }

fn weight_at(row: u32, h: u32) -> mat2x4<f32> {
    if (h + 8u <= p.width) { return widen8_weight(read8_weight(row + h, 8u)); }
    if (h >= p.width) { return mat2x4<f32>(); }
    return first_of(widen8_weight(read8_weight(row + h, p.width - h)), p.width - h);
}

fn plus(share: Share, row: u32, h: u32, w: mat2x4<f32>) -> Share {
    if (h >= p.width) { return share; }
    var x = widen8_x(read8_x(row + h, p.width - h));
    if (h + 8u > p.width) { x = first_of(x, p.width - h); }
    var squares = share.squares;
    if (SQUARES) { squares = fma(x[1], x[1], fma(x[0], x[0], squares)); }
    x = weighted(x, h);
    return Share(fma(x[1], w[1], fma(x[0], w[0], share.sum)), squares);
}
