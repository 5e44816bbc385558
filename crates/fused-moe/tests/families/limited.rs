//! Blocks whose experts take only so many slots.

use crate::disk::*;
use crate::rules::*;
use serde_json::{Value, json};

/// An expert without gate, with biases if it has some.
fn plain(disk: &Disk, e: usize, names: [&str; 2], biased: bool, x: &[f64]) -> Vec<f64> {
    let [up, down] = names.map(|name| format!("experts.expert_{e}.{name}"));
    let of =
        |name: &str, x: &[f64]| if biased { disk.linear(name, x) } else { disk.times(&format!("{name}.weight"), x) };
    let a: Vec<f64> = of(&up, x).iter().map(|a| a.max(0.0)).collect();
    of(&down, &a)
}

fn experts(names: [&str; 2], biased: bool) -> Vec<Tensor> {
    let mut all = vec![tensor("router.classifier.weight", &[8, 12], 1.0)];
    for e in 0..8 {
        for (name, [rows, cols]) in names.into_iter().zip([[6, 12], [12, 6]]) {
            all.push(tensor(format!("experts.expert_{e}.{name}.weight"), &[rows, cols], 0.6));
            if biased {
                all.push(tensor(format!("experts.expert_{e}.{name}.bias"), &[rows], 0.5));
            }
        }
    }
    all
}

/// What stays of the choices of a sequence's tokens: of each expert's slots, first choices first, so many.
fn room(choices: &[Routes], order: &[usize], limit: usize) -> Vec<Routes> {
    let mut taken = [0; 8];
    let mut kept = vec![Vec::new(); choices.len()];
    let top_k = choices[0].len();
    for (k, &t) in (0..top_k).flat_map(|k| order.iter().map(move |t| (k, t))) {
        let slot @ (e, _) = choices[t][k];
        if taken[e] < limit {
            taken[e] += 1;
            kept[t].push(slot);
        }
    }
    let slots: usize = kept.iter().map(Vec::len).sum();
    assert!((1..choices.len() * top_k).contains(&slots), "{slots} slots");
    kept
}

fn switch(bias: bool, sequences: Option<Vec<u32>>) -> Block {
    let rule = move |disk: &Disk, call: &Call| {
        let mut answers = Vec::new();
        for sequence in &call.sequences {
            let x = &call.x[sequence.clone()];
            let logits = |x: &[f64]| {
                if bias { disk.linear("router.classifier", x) } else { disk.times("router.classifier.weight", x) }
            };
            let choice = |x: &Vec<f64>| {
                let p = softmax(&logits(x));
                of(&top(&p, 1), &p)
            };
            let choices: Vec<Routes> = x.iter().map(choice).collect();
            let order: Vec<usize> = (0..x.len()).collect();
            for (x, routes) in x.iter().zip(room(&choices, &order, 3)) {
                let y = sum(&routes, |e| plain(disk, e, ["wi", "wo"], false, x), 12);
                answers.push(Answer { y, routes });
            }
        }
        answers
    };
    let mut tensors = experts(["wi", "wo"], false);
    if bias {
        tensors.push(tensor("router.classifier.bias", &[8], 0.5));
    }
    Block {
        family: "switch_transformers_encoder",
        config: json!({
            "model_type": "switch_transformers", "num_layers": 5, "num_decoder_layers": 2, "d_model": 12, "d_ff": 6,
            "num_experts": 8, "expert_capacity": 3, "encoder_sparse_step": 3, "decoder_sparse_step": 1,
            "router_bias": bias, "dense_act_fn": "relu",
        }),
        moe: &[1, 4],
        name: "encoder.block.4.layer.1.mlp",
        sizes: [12, 1],
        tensors,
        sequences,
        state: None,
        rule: Box::new(rule),
        fields: &["/d_model", "/d_ff", "/num_experts"],
    }
}

/// Two experts: `limit` slots of each in a sequence of so many tokens.
fn nllb(
    decoder: bool,
    config: Value,
    [before, by_score]: [bool; 2],
    limit: fn(usize) -> usize,
    sequences: Option<Vec<u32>>,
) -> Block {
    let rule = move |disk: &Disk, call: &Call| {
        let mut answers = Vec::new();
        for sequence in &call.sequences {
            let x = &call.x[sequence.clone()];
            let all: Vec<Vec<f64>> = x.iter().map(|x| softmax(&disk.times("router.classifier.weight", x))).collect();
            let choice = |p: &Vec<f64>| if before { normalized(of(&top(p, 2), p), 0.0) } else { of(&top(p, 2), p) };
            let choices: Vec<Routes> = all.iter().map(choice).collect();
            let mut order: Vec<usize> = (0..x.len()).collect();
            if by_score {
                let best = |t: usize| all[t].iter().copied().fold(0.0, f64::max);
                order.sort_by(|&a, &b| best(b).total_cmp(&best(a)));
            }
            for (x, mut routes) in x.iter().zip(room(&choices, &order, limit(x.len()))) {
                if !before && !routes.is_empty() {
                    routes = normalized(routes, 0.0);
                }
                let y = sum(&routes, |e| plain(disk, e, ["fc1", "fc2"], true, x), 12);
                answers.push(Answer { y: y.iter().map(|y| y * 0.75).collect(), routes });
            }
        }
        answers
    };
    let base = json!({
        "model_type": "nllb-moe", "encoder_layers": 4, "decoder_layers": 4, "num_hidden_layers": 4, "d_model": 12,
        "encoder_ffn_dim": 6, "decoder_ffn_dim": 6, "num_experts": 8, "encoder_sparse_step": 2, "decoder_sparse_step": 2,
        "moe_token_dropout": 0.25, "second_expert_policy": "all", "router_bias": false, "activation_function": "relu",
        "normalize_router_prob_before_dropping": before, "batch_prioritized_routing": by_score,
    });
    Block {
        family: if decoder { "nllb_moe_decoder" } else { "nllb_moe_encoder" },
        config: crate::block::with(base, config),
        moe: &[1, 3],
        name: if decoder { "model.decoder.layers.3.ffn" } else { "model.encoder.layers.3.ffn" },
        sizes: [12, 2],
        tensors: experts(["fc1", "fc2"], true),
        sequences,
        state: None,
        rule: Box::new(rule),
        fields: if decoder {
            &["/d_model", "/decoder_ffn_dim", "/num_experts"]
        } else {
            &["/d_model", "/encoder_ffn_dim", "/num_experts"]
        },
    }
}

pub(crate) fn blocks() -> Vec<Block> {
    let fraction = json!({ "moe_eval_capacity_token_fraction": 0.2, "expert_capacity": 1 });
    let slots = json!({ "moe_eval_capacity_token_fraction": 0.0, "expert_capacity": 5 });
    let share = json!({ "moe_eval_capacity_token_fraction": -1.0, "expert_capacity": null });
    // an even share of 64 tokens is 8, and of 27 tokens 4
    let even = |tokens: usize| 2 * tokens.div_ceil(8);
    vec![
        switch(false, None),
        switch(true, Some(vec![0, 37, 64])),
        nllb(true, fraction.clone(), [false, false], |tokens| (tokens * 2).div_ceil(10), None),
        nllb(false, fraction, [true, true], |tokens| (tokens * 2).div_ceil(10), Some(vec![0, 37, 64])),
        nllb(false, slots.clone(), [true, false], |_| 5, None),
        nllb(true, slots, [false, true], |_| 5, Some(vec![0, 37, 64])),
        nllb(true, share.clone(), [false, false], even, None),
        nllb(true, share, [true, true], even, Some(vec![0, 37, 64])),
    ]
}
