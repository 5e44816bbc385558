// Activated rows times down: few rows.

@compute @workgroup_size(THREADS)
fn down_dot(here: Here) {
    grouped_dot(here);
}
