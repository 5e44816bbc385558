// Sums over rows, column by column. A workgroup has 64 columns: 8 lines of 32 threads, two columns each, take every 8th row,
// and their sums are added up in the order of the lines. The entry's file has `pair_of`, two neighbouring terms of a row.

const LINE = COLUMNS / 2u;
const LINES = THREADS / LINE;

var<workgroup> line_sums: array<vec2<f32>, THREADS>;

// In the threads of the first line: of columns `column` and `column + 1`, which are this thread's.
fn column_sums(thread: u32, rows: vec2<u32>, column: u32) -> vec2<f32> {
    var sum = vec2<f32>();
    for (var row = rows.x + thread / LINE; row < rows.y; row += LINES) { sum += pair_of(row, column); }
    line_sums[thread] = sum;
    workgroupBarrier();
    for (var line = 1u; line < LINES; line++) { sum += line_sums[(thread + line * LINE) % THREADS]; }
    return sum;
}
