// Activated rows times down: many rows.

@compute @workgroup_size(THREADS)
fn down(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    grouped_tiled(group, thread);
}
