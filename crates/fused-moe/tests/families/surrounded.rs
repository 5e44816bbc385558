//! Blocks with more around their experts, or a router of more than one matrix.

use crate::disk::*;
use crate::rules::*;
use serde_json::json;

/// Three projections under a prefix.
fn mlp(prefix: &str, hidden: usize, inner: usize) -> Vec<Tensor> {
    let part = |name: &str, shape: [usize; 2]| tensor(format!("{prefix}.{name}_proj.weight"), &shape, 0.6);
    vec![part("gate", [inner, hidden]), part("up", [inner, hidden]), part("down", [hidden, inner])]
}

fn stacks(experts: usize, hidden: usize, inner: usize) -> Vec<Tensor> {
    vec![
        tensor("experts.gate_up_proj", &[experts, 2 * inner, hidden], 0.6),
        tensor("experts.down_proj", &[experts, hidden, inner], 0.6),
    ]
}

/// The whole block normed, its norm beside the block.
fn axk1() -> Block {
    let experts = (0..8).flat_map(|e| mlp(&format!("experts.{e}"), 12, 6));
    let rule = |disk: &Disk, x: &[f64]| {
        let logits = disk.times("gate.weight", x);
        let routes = ds3_groups(&logits, disk.all("gate.e_score_correction_bias"), [3, 4, 2], f64::NEG_INFINITY, 2.5);
        let routed = sum(&routes, |e| disk.mlp(&format!("experts.{e}"), x, swiglu), 12);
        let both = add(&routed, &disk.mlp("shared_experts", x, swiglu));
        Answer { y: disk.rms("../post_mlp_layernorm.weight", &both, 0.03, 0.0), routes }
    };
    Block {
        family: "axk1",
        config: json!({
            "model_type": "axk1", "num_hidden_layers": 2, "hidden_size": 12, "moe_intermediate_size": 6,
            "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2, "n_group": 4, "topk_group": 2,
            "norm_topk_prob": true, "routed_scaling_factor": 2.5, "mlp_layer_types": ["dense", "sparse"],
            "rms_norm_eps": 0.03,
        }),
        moe: &[1],
        name: "model.layers.1.mlp",
        sizes: [12, 3],
        tensors: [
            tensor("gate.weight", &[8, 12], 1.0),
            tensor("gate.e_score_correction_bias", &[8], 1.0),
            tensor("../post_mlp_layernorm.weight", &[12], 1.0),
        ]
        .into_iter()
        .chain(experts)
        .chain(mlp("shared_experts", 12, 12))
        .collect(),
        sequences: None,
        state: None,
        rule: alone(rule),
        fields: &["/hidden_size", "/moe_intermediate_size", "/n_shared_experts"],
    }
}

fn muse() -> Block {
    let rule = |disk: &Disk, x: &[f64]| {
        let logits: Vec<f64> = disk.times("gate.weight", x).iter().map(|l| l * 0.4).collect();
        let s = sigmoids(&logits);
        let ids = top(&plus(&s, disk.all("gate.e_score_correction_bias")), 3);
        let routes = times(normalized(of(&ids, &s), 1e-15), 1.5);
        let latent = disk.rms("pre_expert_norm.weight", &disk.times("pre_expert_proj.weight", x), 0.02, 1.0);
        // the factor comes before the norm
        let factors = disk.all("experts.post_expert_norm.weight");
        let expert = |e| {
            let z: Vec<f64> = disk.fused(e, &latent, swiglu).iter().zip(factors).map(|(y, w)| y * (1.0 + w)).collect();
            let mean = z.iter().map(|z| z * z).sum::<f64>() / 5.0;
            z.iter().map(|z| z / (mean + 0.05).sqrt()).collect()
        };
        Answer { y: disk.times("post_expert_proj.weight", &sum(&routes, expert, 5)), routes }
    };
    Block {
        family: "muse_spark",
        config: json!({
            "model_type": "muse_spark", "num_hidden_layers": 2, "hidden_size": 12, "moe_hidden_size": 5,
            "moe_intermediate_size": 6, "num_local_experts": 8, "num_experts_per_tok": 3, "output_multiplier": 0.4,
            "post_norm_eps": 0.05, "rms_norm_eps": 0.02, "routed_scaling_factor": 1.5,
        }),
        moe: &[0, 1],
        name: "model.layers.1.mlp",
        sizes: [12, 3],
        tensors: [
            tensor("gate.weight", &[8, 12], 1.0),
            tensor("gate.e_score_correction_bias", &[8], 0.5),
            tensor("pre_expert_proj.weight", &[5, 12], 0.6),
            tensor("post_expert_proj.weight", &[12, 5], 0.6),
            tensor("pre_expert_norm.weight", &[5], 0.5),
            tensor("experts.post_expert_norm.weight", &[5], 0.5),
        ]
        .into_iter()
        .chain(stacks(8, 5, 6))
        .collect(),
        sequences: None,
        state: None,
        rule: alone(rule),
        fields: &["/hidden_size", "/moe_hidden_size", "/moe_intermediate_size", "/num_local_experts"],
    }
}

fn diffusion_gemma() -> Block {
    let gelu = |g: f64, u: f64| {
        let inner = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g * g * g);
        0.5 * g * (1.0 + inner.tanh()) * u
    };
    let rule = move |disk: &Disk, x: &[f64]| {
        let read: Vec<f64> = disk.rms("router.scale", x, 0.01, 0.0).iter().map(|x| x / 12f64.sqrt()).collect();
        let p = softmax(&disk.times("router.proj.weight", &read));
        let routes: Routes = normalized(of(&top(&p, 3), &p), 0.0);
        let scale = disk.all("router.per_expert_scale");
        let routes: Routes = routes.into_iter().map(|(e, w)| (e, w * scale[e])).collect();
        let norm = |name: &str, x: &[f64]| disk.rms(&format!("{name}.weight"), x, 0.01, 0.0);
        let inside = norm("pre_feedforward_layernorm_2", x);
        let experts = sum(&routes, |e| disk.fused(e, &inside, gelu), 12);
        let dense = disk.mlp("mlp", &norm("pre_feedforward_layernorm", x), gelu);
        let both = add(&norm("post_feedforward_layernorm_1", &dense), &norm("post_feedforward_layernorm_2", &experts));
        Answer { y: norm("post_feedforward_layernorm", &both), routes }
    };
    let norms = ["pre_feedforward_layernorm", "pre_feedforward_layernorm_2", "post_feedforward_layernorm"]
        .into_iter()
        .chain(["post_feedforward_layernorm_1", "post_feedforward_layernorm_2"]);
    let text = json!({
        "model_type": "diffusion_gemma_text", "num_hidden_layers": 2, "hidden_size": 12, "intermediate_size": 10,
        "moe_intermediate_size": 6, "num_experts": 8, "top_k_experts": 3,
        "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 0.01,
    });
    Block {
        family: "diffusion_gemma",
        config: json!({ "model_type": "diffusion_gemma", "text_config": text }),
        moe: &[0, 1],
        name: "model.decoder.layers.1",
        sizes: [12, 3],
        tensors: [
            tensor("router.proj.weight", &[8, 12], 6.0),
            tensor("router.scale", &[12], 1.0),
            tensor("router.per_expert_scale", &[8], 1.0),
        ]
        .into_iter()
        .chain(norms.map(|name| tensor(format!("{name}.weight"), &[12], 1.0)))
        .chain(mlp("mlp", 12, 10))
        .chain(stacks(8, 12, 6))
        .collect(),
        sequences: None,
        state: None,
        rule: alone(rule),
        fields: &[
            "/text_config/hidden_size",
            "/text_config/moe_intermediate_size",
            "/text_config/intermediate_size",
            "/text_config/num_experts",
        ],
    }
}

/// Gate and up rows in turn, softcapped.
fn inkling2() -> Block {
    let rule = |disk: &Disk, x: &[f64]| {
        let s = sigmoids(&disk.times("gate.weight", x));
        let routes = times(normalized(of(&top(&plus(&s, disk.all("gate.bias")), 3), &s), 1e-20), 2.0);
        let capped = |x: f64, c: f64| c * (x / c).tanh();
        let expert = |e| {
            let rows = disk.of_stack("experts.w13_weight", e, x);
            let a: Vec<f64> = rows.chunks(2).map(|r| capped(r[0], 0.5) * sigmoid(r[0]) * capped(r[1], 0.75)).collect();
            disk.of_stack("experts.w2_weight", e, &a)
        };
        Answer { y: sum(&routes, expert, 12), routes }
    };
    let text = json!({
        "model_type": "inkling2_text", "num_hidden_layers": 2, "hidden_size": 12, "moe_intermediate_size": 6,
        "n_routed_experts": 8, "num_experts_per_tok": 3, "route_scale": 2.0, "scoring_func": "sigmoid",
        "mlp_gate_softcap": 0.5, "mlp_up_softcap": 0.75, "mlp_layer_types": ["dense", "sparse"],
    });
    Block {
        family: "inkling2",
        config: json!({ "model_type": "inkling2", "text_config": text }),
        moe: &[1],
        name: "model.llm.layers.1.mlp",
        sizes: [12, 3],
        tensors: vec![
            tensor("gate.weight", &[8, 12], 1.0),
            tensor("gate.bias", &[8], 0.5),
            tensor("experts.w13_weight", &[8, 12, 12], 0.6),
            tensor("experts.w2_weight", &[8, 12, 6], 0.6),
        ],
        sequences: None,
        state: None,
        rule: alone(rule),
        fields: &["/text_config/hidden_size", "/text_config/moe_intermediate_size", "/text_config/n_routed_experts"],
    }
}

/// `2 / sqrt(pi)` times the integral of `exp(-t^2)` from 0 to x, by Simpson's rule.
fn erf(x: f64) -> f64 {
    let n = 400;
    let step = x / f64::from(n);
    let inner: f64 = (1..n).map(|i| f64::from(2 + 2 * (i % 2)) * (-(f64::from(i) * step).powi(2)).exp()).sum();
    2.0 / std::f64::consts::PI.sqrt() * step / 3.0 * (1.0 + inner + (-x * x).exp())
}

fn zaya(state: bool) -> Block {
    let gelu = |x: Vec<f64>| -> Vec<f64> { x.iter().map(|x| 0.5 * x * (1.0 + erf(x / 2f64.sqrt()))).collect() };
    let rule = move |disk: &Disk, call: &Call| {
        let skipped = std::cell::Cell::new(0);
        let answer = |t: usize| {
            let x = &call.x[t];
            let mut state = disk.linear("gate.down_proj", x);
            if let Some(previous) = &call.state {
                let scale = disk.all("gate.router_states_scale");
                state = state.iter().zip(&previous[t]).zip(scale).map(|((s, p), scale)| s + p * scale).collect();
            }
            let h = disk.rms("gate.router_mlp.norm.weight", &state, 0.04, 0.0);
            let h = gelu(disk.linear("gate.router_mlp.fc2", &gelu(disk.linear("gate.router_mlp.fc1", &h))));
            let p = softmax(&disk.times("gate.router_mlp.out_proj.weight", &h));
            // the last bias of the file is not read
            let biases = [&disk.all("gate.balancing_biases")[..8], &[-1.0]].concat();
            let chosen = top(&plus(&p, &biases), 1)[0];
            if chosen == 8 {
                skipped.set(skipped.get() + 1);
                return Answer { y: vec![0.0; 12], routes: vec![(8, 0.0)] };
            }
            let routes = vec![(chosen, p[chosen])];
            Answer { y: sum(&routes, |e| disk.fused(e, x, swiglu), 12), routes }
        };
        let answers: Vec<Answer> = (0..call.x.len()).map(answer).collect();
        assert!((1..call.x.len()).contains(&skipped.get()), "{}", skipped.get());
        answers
    };
    Block {
        family: "zaya",
        config: json!({
            "model_type": "zaya", "num_hidden_layers": 2, "hidden_size": 12, "moe_intermediate_size": 6,
            "num_experts": 8, "num_experts_per_tok": 1, "router_hidden_size": 7, "rms_norm_eps": 0.04,
        }),
        moe: &[0, 1],
        name: "model.layers.1.mlp",
        sizes: [12, 1],
        tensors: [
            tensor("gate.down_proj.weight", &[7, 12], 1.0),
            tensor("gate.down_proj.bias", &[7], 0.5),
            tensor("gate.router_states_scale", &[7], 1.0),
            tensor("gate.router_mlp.norm.weight", &[7], 2.0),
            tensor("gate.router_mlp.fc1.weight", &[7, 7], 1.0),
            tensor("gate.router_mlp.fc1.bias", &[7], 0.5),
            tensor("gate.router_mlp.fc2.weight", &[7, 7], 1.0),
            tensor("gate.router_mlp.fc2.bias", &[7], 0.5),
            tensor("gate.router_mlp.out_proj.weight", &[9, 7], 2.0),
            ("gate.balancing_biases".into(), vec![9], [-1.3, -0.7]),
        ]
        .into_iter()
        .chain(stacks(8, 12, 6))
        .collect(),
        sequences: None,
        state: state.then_some(7),
        rule: Box::new(rule),
        fields: &["/hidden_size", "/moe_intermediate_size", "/router_hidden_size", "/num_experts"],
    }
}

pub(crate) fn blocks() -> Vec<Block> {
    vec![axk1(), muse(), diffusion_gemma(), inkling2(), zaya(false), zaya(true)]
}
