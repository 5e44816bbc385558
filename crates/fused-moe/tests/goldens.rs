//! Every family of the table against what transformers computes.

mod common;

use common::{Case, Golden, relative, specified};
use fused_moe::reference::Routes;
use half::bf16;

/// The golden's numbers were made in f64 from f32 weights; what is left are the f32 constants of the model's own code.
const TOLERANCE: f64 = 1e-5;

/// Weights and x carry 8 bits each, and the routing weights follow them: a few times 2^-8 of the largest output.
const TOLERANCE_BF16: f64 = 3e-2;

/// Ids as a set, weights by id.
fn same_routes(name: &str, case: &Case, top_k: usize, ids: &[u32], weights: &[f64]) {
    for t in 0..case.tokens {
        let row = |ids: &[u32], weights: &[f64]| {
            let mut row: Vec<(u32, f64)> = (t * top_k..(t + 1) * top_k).map(|r| (ids[r], weights[r])).collect();
            row.sort_by_key(|&(id, _)| id);
            row
        };
        for ((id, weight), (wanted_id, wanted)) in row(ids, weights).into_iter().zip(row(&case.experts, &case.weights))
        {
            assert_eq!(id, wanted_id, "{name}, token {t}");
            assert!(
                (weight - wanted).abs() <= TOLERANCE * wanted.abs().max(1.0),
                "{name}, token {t}: {weight} {wanted}"
            );
        }
    }
}

fn check(name: &str) {
    let golden = Golden::open(name);
    let layer = golden.checkpoint.layer(golden.layer).unwrap();
    for case in &golden.cases {
        let x: Vec<f64> = case.x.iter().map(|&x| x.into()).collect();
        let out = specified(&layer, &x, |x| x);
        same_routes(name, case, layer.config.top_k, &out.routes.experts, &out.routes.weights);
        let error = relative(&out.y, &case.y);
        assert!(error <= TOLERANCE, "{name}: {error:e}");

        let round = |x: f64| f64::from(bf16::from_f64(x));
        let x: Vec<f64> = x.into_iter().map(round).collect();
        let narrow = specified(&layer, &x, round);
        let (hidden, top_k) = (layer.config.hidden, layer.config.top_k);
        let largest = case.y.iter().fold(0.0f64, |m, y| m.max(y.abs()));
        let mut compared = 0;
        for t in 0..case.tokens {
            // A token whose routes rounding has changed says nothing about the experts.
            if !close_routes(t, top_k, &narrow.routes, &out.routes) {
                continue;
            }
            compared += 1;
            let row = t * hidden..(t + 1) * hidden;
            let errors = narrow.y[row.clone()].iter().zip(&case.y[row]).map(|(a, b)| (a - b).abs());
            let error = errors.fold(0.0, f64::max) / largest;
            assert!(error <= TOLERANCE_BF16, "{name} in bf16, token {t}: {error:e}");
        }
        assert!(2 * compared > case.tokens, "{name} in bf16: {compared} of {} tokens", case.tokens);
    }
}

fn close_routes(t: usize, top_k: usize, a: &Routes, b: &Routes) -> bool {
    let slots = t * top_k..(t + 1) * top_k;
    let find = |id: u32| slots.clone().find(|&r| b.experts[r] == id);
    slots.clone().all(|r| {
        find(a.experts[r]).is_some_and(|s| (a.weights[r] - b.weights[s]).abs() <= 2e-2 * b.weights[s].abs().max(1.0))
    })
}

macro_rules! goldens {
    ($($name:ident)*) => {
        $(#[test] fn $name() { check(stringify!($name)); })*

        /// An entry that no golden proves is not in the table.
        #[test]
        fn every_family_has_a_golden() {
            let proven: Vec<&str> = [$(stringify!($name)),*].map(family_of).to_vec();
            for family in fused_moe::checkpoint::known_families() {
                assert!(proven.contains(&family), "{family}");
            }
        }
    };
}

fn family_of(golden: &str) -> &'static str {
    fused_moe::checkpoint::Checkpoint::open(common::path(golden)).unwrap().inspect().family
}

goldens! {
    mixtral qwen2_moe qwen3_moe qwen3_moe_nonorm olmoe
    afmoe aria_text bailing_hybrid cohere2_moe dbrx deepseek_v2_group deepseek_v3 dots1 ernie4_5_moe exaone_moe
    glm4_moe gpt_oss granitemoe granitemoeshared hunyuan_v1_moe jamba kimi_linear lfm2_moe llama4 minimax_m2
    minimax_m3_vl mistral4 phimoe qwen3_5_moe qwen3_next qwen3_vl_moe step3p7
}
