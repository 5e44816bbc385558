// A TILE x TILE tile of x . weight^T by 256 threads, 4 x 4 sums each.
//
//   for each TILE_K columns: x tile and weight tile to workgroup memory (the next ones are on their way meanwhile)
//                            sums += outer products
//
// The entry's file has `weighted`, what x is before the product, and SQUARES says whether its squares are added up.

const TILE = 64u;
const TILE_K = 16u;
// Vectors from one k to the next; one more than there are keeps stores of neighbours in different banks.
const PITCH = TILE / 4u + 1u;

// [k][row / 4], a component a row
var<workgroup> tile_x: array<vec4<f32>, TILE_K * PITCH>;
var<workgroup> tile_weight: array<vec4<f32>, TILE_K * PITCH>;
// Two parts a row of x.
var<workgroup> tile_squares: array<f32, 2u * TILE>;

// Component j of r<i> is row first_row + 4 * (thread / 16) + i, column first_column + 4 * (thread % 16) + j.
struct Sums { r0: vec4<f32>, r1: vec4<f32>, r2: vec4<f32>, r3: vec4<f32> }

fn multiply_tile(thread: u32, first_row: u32, first_column: u32) -> Sums {
    // half of the threads bring x, half the weight, eight elements each
    let of_x = thread < 2u * TILE;
    let r = thread % (2u * TILE) / 2u;
    let c = thread % 2u * 8u;
    var sums: Sums;
    var squares = vec4(0.0);
    var next = eight_at(of_x, first_row + r, first_column + r, c);
    for (var k = 0u; k < p.width; k += TILE_K) {
        var now = next;
        if (of_x) {
            if (SQUARES) { squares = fma(now.b, now.b, fma(now.a, now.a, squares)); }
            now = weighted(now, k + c);
        }
        workgroupBarrier();
        let place = c * PITCH + r / 4u;
        if (of_x) { store_x(place, r % 4u, now); } else { store_weight(place, r % 4u, now); }
        workgroupBarrier();
        next = eight_at(of_x, first_row + r, first_column + r, k + TILE_K + c);
        for (var i = 0u; i < TILE_K; i += 4u) {
            sums = plus_column(sums, thread, i);
            sums = plus_column(sums, thread, i + 1u);
            sums = plus_column(sums, thread, i + 2u);
            sums = plus_column(sums, thread, i + 3u);
        }
    }
    if (SQUARES) {
        if (of_x) { tile_squares[thread] = (squares.x + squares.y) + (squares.z + squares.w); }
        workgroupBarrier();
    }
    return sums;
}

fn plus_column(sums: Sums, thread: u32, k: u32) -> Sums {
    let x = tile_x[k * PITCH + thread / 16u];
    let w = tile_weight[k * PITCH + thread % 16u];
    return Sums(
        fma(vec4(x.x), w, sums.r0),
        fma(vec4(x.y), w, sums.r1),
        fma(vec4(x.z), w, sums.r2),
        fma(vec4(x.w), w, sums.r3),
    );
}

fn store_x(place: u32, i: u32, x: Eight) {
    tile_x[place][i] = x.a.x;
    tile_x[place + PITCH][i] = x.a.y;
    tile_x[place + 2u * PITCH][i] = x.a.z;
    tile_x[place + 3u * PITCH][i] = x.a.w;
    tile_x[place + 4u * PITCH][i] = x.b.x;
    tile_x[place + 5u * PITCH][i] = x.b.y;
    tile_x[place + 6u * PITCH][i] = x.b.z;
    tile_x[place + 7u * PITCH][i] = x.b.w;
}

fn store_weight(place: u32, i: u32, w: Eight) {
    tile_weight[place][i] = w.a.x;
    tile_weight[place + PITCH][i] = w.a.y;
    tile_weight[place + 2u * PITCH][i] = w.a.z;
    tile_weight[place + 3u * PITCH][i] = w.a.w;
    tile_weight[place + 4u * PITCH][i] = w.b.x;
    tile_weight[place + 5u * PITCH][i] = w.b.y;
    tile_weight[place + 6u * PITCH][i] = w.b.z;
    tile_weight[place + 7u * PITCH][i] = w.b.w;
}

// The sum of the squares of row `first_row + r`, once the product is done.
fn squares_of(r: u32) -> f32 { return tile_squares[2u * r] + tile_squares[2u * r + 1u]; }

// Eight neighbours of a row of x or of the weight, zeros outside.
fn eight_at(of_x: bool, row: u32, column: u32, h: u32) -> Eight {
    if (h >= p.width || (of_x && row >= p.rows) || (!of_x && column >= p.columns)) { return Eight(); }
    var eight: Eight;
    if (of_x) { eight = load8_x(at(p.x, row, h)); } else { eight = load8_weight(at(p.weight, column, h)); }
    if (h + 8u > p.width) { eight = first_of(eight, p.width - h); }
    return eight;
}
