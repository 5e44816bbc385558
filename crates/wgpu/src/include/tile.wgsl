// A TILE x TILE tile of x . weight^T by 256 threads, 4 x 4 sums each.
//
//   for each TILE_K columns: x tile and weight tile to workgroup memory (the next ones are on their way meanwhile)
//                            sums += outer products
//
// The entry's file has `weighted`, what x is before the product, and SQUARES says whether its squares are added up.

const TILE_K = 16u;
// A vector is four neighbouring columns of a row, written by one thread: vectors that several threads write parts of are
// not for Metal and D3D. Between four columns and the next lie two more vectors than there are, and so that neighbours read
// neighbours, the rows 4m + j of the weight lie together for each j, and one more: stores and loads meet no bank twice.
const X_PITCH = TILE + 2u;
const WEIGHT_PART = TILE / 4u + 1u;
const WEIGHT_PITCH = 4u * WEIGHT_PART + 2u;

var<workgroup> tile_x: array<vec4<f32>, TILE_K / 4u * X_PITCH>;
var<workgroup> tile_weight: array<vec4<f32>, TILE_K / 4u * WEIGHT_PITCH>;
// Two parts a row of x.
var<workgroup> tile_squares: array<f32, 2u * TILE>;

// Workgroups are tiles, columns first.
fn across() -> u32 { return (p.columns + TILE - 1u) / TILE; }
fn tile_row(group: vec3<u32>) -> u32 { return number(group) / across() * TILE; }
fn tile_column(group: vec3<u32>) -> u32 { return number(group) % across() * TILE; }

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
            if (SQUARES) { squares = fma(now[1], now[1], fma(now[0], now[0], squares)); }
            now = weighted(now, k + c);
        }
        workgroupBarrier();
        if (of_x) {
            let place = c / 4u * X_PITCH + r;
            tile_x[place] = now[0];
            tile_x[place + X_PITCH] = now[1];
        } else {
            let place = c / 4u * WEIGHT_PITCH + r % 4u * WEIGHT_PART + r / 4u;
            tile_weight[place] = now[0];
            tile_weight[place + WEIGHT_PITCH] = now[1];
        }
        workgroupBarrier();
        next = eight_at(of_x, first_row + r, first_column + r, k + TILE_K + c);
        for (var four = 0u; four < TILE_K / 4u; four++) { sums = plus_columns(sums, thread, four); }
    }
    if (SQUARES) {
        if (of_x) { tile_squares[thread] = (squares.x + squares.y) + (squares.z + squares.w); }
        workgroupBarrier();
    }
    return sums;
}

// The sums and the products of four columns.
fn plus_columns(sums: Sums, thread: u32, four: u32) -> Sums {
    let x = four * X_PITCH + thread / 16u * 4u;
    let w = four * WEIGHT_PITCH + thread % 16u;
    let rows = mat4x4<f32>(
        tile_weight[w],
        tile_weight[w + WEIGHT_PART],
        tile_weight[w + 2u * WEIGHT_PART],
        tile_weight[w + 3u * WEIGHT_PART],
    );
    let columns = transpose(rows);
    return Sums(
        plus_row(sums.r0, tile_x[x], columns),
        plus_row(sums.r1, tile_x[x + 1u], columns),
        plus_row(sums.r2, tile_x[x + 2u], columns),
        plus_row(sums.r3, tile_x[x + 3u], columns),
    );
}

// The sum of the squares of row `first_row + r`, once the product is done.
fn squares_of(r: u32) -> f32 { return tile_squares[2u * r] + tile_squares[2u * r + 1u]; }

// Eight neighbours of a row of x or of the weight, zeros outside.
fn eight_at(of_x: bool, row: u32, column: u32, h: u32) -> mat2x4<f32> {
    if (h >= p.width || (of_x && row >= p.rows) || (!of_x && column >= p.columns)) { return mat2x4<f32>(); }
    let count = p.width - h;
    var eight: mat2x4<f32>;
    if (of_x) {
        eight = widen8_x(read8_x(at(p.x, row, h), count));
    } else {
        eight = widen8_weight(read8_weight(at(p.weight, column, h), count));
    }
    if (count < 8u) { eight = first_of(eight, count); }
    return eight;
}
