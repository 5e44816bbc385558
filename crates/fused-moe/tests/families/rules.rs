//! Routing rules and activations, each in a few plain lines.

/// Experts and weights of one token.
pub(crate) type Routes = Vec<(usize, f64)>;

/// The `k` largest keys.
pub(crate) fn top(keys: &[f64], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..keys.len()).collect();
    order.sort_by(|&a, &b| keys[b].total_cmp(&keys[a]));
    order.truncate(k);
    order
}

pub(crate) fn softmax(l: &[f64]) -> Vec<f64> {
    let sum: f64 = l.iter().map(|l| l.exp()).sum();
    l.iter().map(|l| l.exp() / sum).collect()
}

pub(crate) fn sigmoid(l: f64) -> f64 {
    1.0 / (1.0 + (-l).exp())
}

pub(crate) fn sigmoids(l: &[f64]) -> Vec<f64> {
    l.iter().map(|&l| sigmoid(l)).collect()
}

pub(crate) fn plus(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

/// The values of the chosen experts.
pub(crate) fn of(ids: &[usize], values: &[f64]) -> Routes {
    ids.iter().map(|&e| (e, values[e])).collect()
}

/// Divided by their sum plus eps.
pub(crate) fn normalized(routes: Routes, eps: f64) -> Routes {
    let sum: f64 = routes.iter().map(|(_, w)| w).sum::<f64>() + eps;
    routes.into_iter().map(|(e, w)| (e, w / sum)).collect()
}

pub(crate) fn times(routes: Routes, scale: f64) -> Routes {
    routes.into_iter().map(|(e, w)| (e, w * scale)).collect()
}

/// Keys of all groups but the best `keep`, by the sum of their two largest, replaced.
pub(crate) fn limited(keys: &[f64], count: usize, keep: usize, masked: f64) -> Vec<f64> {
    let size = keys.len() / count;
    let worth: Vec<f64> = keys.chunks(size).map(|group| top(group, 2).iter().map(|&e| group[e]).sum()).collect();
    let kept = top(&worth, keep);
    (0..keys.len()).map(|e| if kept.contains(&(e / size)) { keys[e] } else { masked }).collect()
}

/// The same with a group's largest key for its worth.
pub(crate) fn limited_by_best(keys: &[f64], count: usize, keep: usize, masked: f64) -> Vec<f64> {
    let size = keys.len() / count;
    let worth: Vec<f64> = keys.chunks(size).map(|group| group[top(group, 1)[0]]).collect();
    let kept = top(&worth, keep);
    (0..keys.len()).map(|e| if kept.contains(&(e / size)) { keys[e] } else { masked }).collect()
}

/// DeepSeek-V3's router without groups: weights unbiased, divided, scaled.
pub(crate) fn ds3(l: &[f64], bias: &[f64], k: usize, scale: f64) -> Routes {
    let s = sigmoids(l);
    times(normalized(of(&top(&plus(&s, bias), k), &s), 1e-20), scale)
}

/// With groups.
pub(crate) fn ds3_groups(l: &[f64], bias: &[f64], [k, count, keep]: [usize; 3], masked: f64, scale: f64) -> Routes {
    let s = sigmoids(l);
    times(normalized(of(&top(&limited(&plus(&s, bias), count, keep, masked), k), &s), 1e-20), scale)
}

/// The softmax over the largest k logits.
pub(crate) fn softmax_of_top(l: &[f64], k: usize) -> Routes {
    let ids = top(l, k);
    let chosen: Vec<f64> = ids.iter().map(|&e| l[e]).collect();
    ids.into_iter().zip(softmax(&chosen)).collect()
}

pub(crate) fn swiglu(g: f64, u: f64) -> f64 {
    g * sigmoid(g) * u
}

pub(crate) fn clamped_at_half(g: f64, u: f64) -> f64 {
    swiglu(g.min(0.5), u.clamp(-0.5, 0.5))
}

pub(crate) fn swiglu_oai(g: f64, u: f64) -> f64 {
    let (g, u) = (g.min(7.0), u.clamp(-7.0, 7.0));
    (u + 1.0) * g * sigmoid(1.702 * g)
}

pub(crate) fn relu_squared(_: f64, u: f64) -> f64 {
    u.max(0.0) * u.max(0.0)
}
