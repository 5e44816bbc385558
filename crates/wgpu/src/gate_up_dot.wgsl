// Tokens or rows times gate_up, and the activation of it: few rows.

@compute @workgroup_size(THREADS)
fn gate_up_dot(here: Here) {
    grouped_dot(here);
}
