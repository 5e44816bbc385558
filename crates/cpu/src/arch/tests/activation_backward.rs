use super::activation::activations;
use super::{Numbers, all};
use fused_moe_core::config::Activation;
use fused_moe_core::reference::{activate, activate_backward};

#[test]
fn derivatives_are_close_to_the_reference() {
    let g: Vec<f32> = (-40_000..=40_000).map(|i| i as f32 * 2.5e-3).chain([1e4, -1e4, 1e9, -1e9]).collect();
    let u: Vec<f32> = Numbers(1).vec::<f32>(g.len()).iter().map(|u| u * 12.0).collect();
    let d: Vec<f32> = Numbers(2).vec(g.len());
    for kernels in all() {
        for activation in activations() {
            let (mut gate, mut up, mut a) = (g.clone(), u.clone(), d.clone());
            if !activation.is_gated() {
                (gate, up) = (vec![], g.clone());
            }
            let weight = 0.75;
            kernels.activation_backward(activation, [&mut gate, &mut up, &mut a], weight);
            for i in 0..g.len() {
                let (g, u) = if activation.is_gated() { (g[i], u[i]) } else { (0.0, g[i]) };
                let (g, u, d) = (f64::from(g), f64::from(u), f64::from(d[i]) * f64::from(weight));
                let [by_gate, by_up] = activate_backward(activation, g, u);
                let at_kink = matches!(activation, Activation::SiluThenClamp { limit }
                    if (activate(Activation::Plain(fused_moe_core::config::Function::Silu), 0.0, g) - f64::from(limit)).abs() < 1e-5);
                if activation.is_gated() && !at_kink {
                    let off = (f64::from(gate[i]) - d * by_gate).abs();
                    assert!(
                        off <= 2e-6 * (1.0 + u.abs()) * (1.0 + by_gate.abs()),
                        "{activation:?} {g} {u}: {}",
                        gate[i]
                    );
                }
                let off = (f64::from(up[i]) - d * by_up).abs();
                assert!(off <= 2e-6 * (1.0 + by_up.abs()), "{activation:?} {g} {u}: {} {}", up[i], d * by_up);
                let value = activate(activation, g, u);
                assert!((f64::from(a[i]) - value).abs() <= 2e-6 * (1.0 + value.abs()) || value.abs() > 1e30);
            }
        }
    }
}

#[test]
fn the_last_vector_has_the_same_bits() {
    for kernels in all() {
        for activation in activations() {
            let (g, u, d): (Vec<f32>, Vec<f32>, Vec<f32>) =
                (Numbers(1).vec(37), Numbers(2).vec(37), Numbers(3).vec(37));
            let (mut gate, mut up, mut a) = (g.clone(), u.clone(), d.clone());
            kernels.activation_backward(activation, [&mut gate, &mut up, &mut a], 2.0);
            for i in 0..37 {
                let (mut g, mut u, mut d) = ([g[i]], [u[i]], [d[i]]);
                kernels.activation_backward(activation, [&mut g, &mut u, &mut d], 2.0);
                let same = [(g[0], gate[i]), (u[0], up[i]), (d[0], a[i])];
                assert!(same.iter().all(|(one, all)| one.to_bits() == all.to_bits()), "{activation:?}");
            }
        }
    }
}
