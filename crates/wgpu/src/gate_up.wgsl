// Tokens or rows times gate_up, and the activation of it: many rows.

@compute @workgroup_size(THREADS)
fn gate_up(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    grouped_tiled(group, thread);
}
