// Dot products of TOKENS rows of x (1 or 4) with one row of the weight, by a team of TEAM threads, eight elements a thread at
// a time. A row's sum has the same order for any TOKENS. The entry's file has `weighted`, what x is before the product, and
// SQUARES says whether its squares are added up.

// Component i is of token i.
struct Dots { sum: vec4<f32>, squares: vec4<f32> }

// A thread's share of one token.
struct Share { sum: vec4<f32>, squares: vec4<f32> }

const STEP = 8u * TEAM;

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

fn weight_at(row: u32, h: u32) -> Eight {
    if (h + 8u <= p.width) { return load8_weight(row + h); }
    if (h >= p.width) { return Eight(); }
    return first_of(load8_weight(row + h), p.width - h);
}

fn plus(share: Share, row: u32, h: u32, w: Eight) -> Share {
    if (h >= p.width) { return share; }
    var x = load8_x(row + h);
    if (h + 8u > p.width) { x = first_of(x, p.width - h); }
    var squares = share.squares;
    if (SQUARES) { squares = fma(x.b, x.b, fma(x.a, x.a, squares)); }
    x = weighted(x, h);
    return Share(fma(x.b, w.b, fma(x.a, w.a, share.sum)), squares);
}
