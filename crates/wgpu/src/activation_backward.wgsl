// d_gate = d_a * da/dg, d_up = d_a * da/du, and the activation once more. What of gate and up is not bound lies with the
// other, and so do their gradients: no memory is bound twice. An element that is gate lies p.step from the next.
//
// At a kink a clamp has slope 1, relu slope 0. NaN is passed on by its bits.

// The derivative of the function by itself.
fn function_slope(x: f32) -> f32 {
    switch (FUNCTION) {
        case FUNCTION_SILU: { return silu_slope(x); }
        case FUNCTION_GELU_TANH: {
            // beyond 64 it is 0 or 1, and powers of x might be infinite
            let c = within(x, 64.0);
            let square = c * c;
            let y = 1.5957691216057308 * fma(0.044715 * square, c, c);
            let s = sigmoid(y);
            let by_x = 1.5957691216057308 * fma(0.134145, square, 1.0);
            return unless_nan(x, fma(c * s * sigmoid(-y), by_x, s));
        }
        case FUNCTION_GELU_ERF: {
            let c = within(x, 64.0);
            let density = 0.3989422804014327 * exponential(-0.5 * c * c);
            return unless_nan(x, fma(c, density, 0.5 * erfc(-0.70710678118654752 * c)));
        }
        case FUNCTION_RELU: { return select(0.0, 1.0, !is_nan(x) && x > 0.0); }
        case FUNCTION_RELU_SQUARED: { return unless_nan(x, select(2.0 * x, 0.0, x <= 0.0)); }
        default: { return 1.0; }
    }
}

fn silu_slope(x: f32) -> f32 {
    let s = sigmoid(x);
    return unless_nan(x, fma(x * s, sigmoid(-x), s));
}

fn slope_below(x: f32, limit: f32) -> f32 { return select(1.0, 0.0, !is_nan(x) && x > limit); }
fn slope_within(x: f32, limit: f32) -> f32 { return select(1.0, 0.0, !is_nan(x) && abs(x) > limit); }

// Of c * tanh(x / c).
fn softcap_slope(x: f32, cap: f32) -> f32 {
    let y = 2.0 * (x / cap);
    return unless_nan(x, 4.0 * sigmoid(y) * sigmoid(-y));
}

// da/dg and da/du.
fn slopes(g: f32, u: f32) -> vec2<f32> {
    let limit = p.limit;
    switch (FORM) {
        case FORM_GATED: { return vec2<f32>(function_slope(g) * u, activation_function(g)); }
        case FORM_CLAMPED_SILU: {
            let m = at_most(g, limit);
            return vec2<f32>(slope_below(g, limit) * silu_slope(m) * within(u, limit), slope_within(u, limit) * silu(m));
        }
        case FORM_CLAMPED_SWISH: {
            let m = at_most(g, limit);
            let s = sigmoid(p.alpha * m);
            let slope = unless_nan(m, fma(p.alpha * m * s, sigmoid(-p.alpha * m), s));
            return vec2<f32>(slope_below(g, limit) * (within(u, limit) + 1.0) * slope, slope_within(u, limit) * (m * s));
        }
        case FORM_SILU_THEN_CLAMP: {
            let a = silu(g);
            let by_gate = slope_below(a, limit) * silu_slope(g) * within(u, limit);
            return vec2<f32>(by_gate, slope_within(u, limit) * at_most(a, limit));
        }
        case FORM_SOFTCAPPED_SILU: {
            let gate = softcap(g, limit);
            let s = sigmoid(g);
            let by_gate = fma(gate, sigmoid(-g), softcap_slope(g, limit)) * s * softcap(u, p.alpha);
            return vec2<f32>(by_gate, gate * s * softcap_slope(u, p.alpha));
        }
        default: { return vec2<f32>(0.0, function_slope(u)); }
    }
}

// What a row of d_a is multiplied by.
fn row_weight(row: u32) -> f32 {
    var slot = p.first_row + row;
    if (has_row_slot) { slot = load_row_slot(p.row_slot + slot); }
    if (slot >= p.slots) { return 0.0; }
    if (!has_weights) { return p.scale; }
    return p.scale * load_weights(at(p.weights, slot / p.weight_columns, slot % p.weight_columns));
}

fn gate_of(i: u32) -> f32 {
    if (FORM == FORM_PLAIN) { return 0.0; }
    if (has_gate) { return load_gate(i); }
    return load_up(i);
}

// The gradients of an element, and its activation.
struct Element { by_gate: f32, by_up: f32, a: f32 }

fn element(row: u32, i: u32, weight: f32) -> Element {
    let g = gate_of(at(p.gate, row, i * p.step));
    let u = load_up(at(p.up, row, i * p.step));
    let d = weight * load_d_a(at(p.d_a, row, i));
    let by = slopes(g, u);
    var a = 0.0;
    if (has_a) { a = activate(g, u, p.limit, p.alpha); }
    return Element(d * by.x, d * by.y, a);
}

@compute @workgroup_size(256)
fn activation_backward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let pieces = (p.width + 511u) / 512u;
    let n = number(group);
    let row = n / pieces;
    let i = (n % pieces) * 512u + 2u * thread;
    if (row >= p.rows || i >= p.width) { return; }
    let weight = row_weight(row);
    let first = element(row, i, weight);
    if (i + 1u == p.width) {
        store_one(row, i, first);
        return;
    }
    let second = element(row, i + 1u, weight);
    if (p.step == 2u) {
        store_one(row, i, first);
        store_one(row, i + 1u, second);
        return;
    }
    store_pair_d_up(at(p.d_up, row, i), first.by_up, second.by_up);
    let place = at(p.d_gate, row, i);
    if (has_d_gate) {
        store_pair_d_gate(place, first.by_gate, second.by_gate);
    } else if (FORM != FORM_PLAIN) {
        store_pair_d_up(place, first.by_gate, second.by_gate);
    }
    store_pair_a(at(p.a, row, i), first.a, second.a);
}

fn store_one(row: u32, i: u32, element: Element) {
    let gate = at(p.d_gate, row, i * p.step);
    let up = at(p.d_up, row, i * p.step);
    if (p.step == 2u) {
        store_pair_d_up(gate, element.by_gate, element.by_up);
    } else {
        store_d_up(up, element.by_up);
        if (has_d_gate) {
            store_d_gate(gate, element.by_gate);
        } else if (FORM != FORM_PLAIN) {
            store_d_up(gate, element.by_gate);
        }
    }
    store_a(at(p.a, row, i), element.a);
}
