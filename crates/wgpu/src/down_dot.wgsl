// Activated rows times down: few rows.

@compute @workgroup_size(128)
fn down_dot(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    grouped_dot(group, thread);
}
