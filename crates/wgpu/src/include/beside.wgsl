// What a token's sum over the slots is added to: the shared expert's part first, then the residual, which may be out.

// Of two neighbouring outputs.
struct Beside { expert: vec2<f32>, residual: vec2<f32> }

// The factor on the shared expert's row of token t.
fn shared_factor(t: u32) -> f32 {
    if (!has_gate) { return p.shared_scale; }
    let gate = load_gate(at(p.gate, t, 0u));
    if (p.logit != 0u) { return p.shared_scale * sigmoid(gate); }
    return p.shared_scale * gate;
}

// The last element of an odd row is its own neighbour.
fn next_of(h: u32) -> u32 { return min(h + 1u, p.hidden - 1u); }

fn beside(t: u32, h: u32, factor: f32) -> Beside {
    let next = next_of(h);
    var more = Beside();
    if (has_shared_y) {
        let y = at(p.shared_y, t, 0u);
        more.expert = factor * vec2<f32>(load_shared_y(y + h), load_shared_y(y + next));
    }
    if (has_residual) {
        let r = at(p.residual, t, 0u);
        more.residual = vec2<f32>(load_residual(r + h), load_residual(r + next));
    }
    if (IN_PLACE) {
        let r = at(p.out, t, 0u);
        more.residual = vec2<f32>(load_out(r + h), load_out(r + next));
    }
    return more;
}

fn out_of(sum: vec2<f32>, more: Beside) -> vec2<f32> {
    return fma(vec2<f32>(p.routed_scale), sum, more.expert) + more.residual;
}

fn write_out(t: u32, h: u32, value: vec2<f32>) {
    let place = at(p.out, t, h);
    if (h + 1u < p.hidden) { store_pair_out(place, value.x, value.y); } else { store_out(place, value.x); }
}
