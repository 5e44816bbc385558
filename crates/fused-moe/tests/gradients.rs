//! Gradients of families' blocks against PyTorch's autograd through the model's own code.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Golden, elements, joint, numbers, path, relative};
use fused_moe::checkpoint::{Checkpoint, CheckpointLayer};
use fused_moe::config::Score;
use fused_moe::reference::*;
use safetensors::SafeTensors;

/// As for the forward goldens: routers whose own code computes weights in f32, and what storing f32 costs.
const TOLERANCE: f64 = 1e-5;

/// A layer's tensors, canonical; empty where there is none.
struct Canonical {
    router: Vec<f64>,
    router_bias: Vec<f64>,
    correction_bias: Vec<f64>,
    gate_up: Vec<f64>,
    gate_up_bias: Vec<f64>,
    down: Vec<f64>,
    down_bias: Vec<f64>,
    shared: Option<[Vec<f64>; 3]>,
}

impl Canonical {
    fn of(layer: &CheckpointLayer<'_>) -> Self {
        let weights = &layer.weights;
        let vector = |view: &Option<_>| view.as_ref().map_or(Vec::new(), numbers);
        let (mut gate_up, mut gate_up_bias, mut down, mut down_bias) = (vec![], vec![], vec![], vec![]);
        for expert in weights.experts.iter() {
            joint(expert, &mut gate_up, &mut down);
            [expert.gate_bias, expert.up_bias].iter().flatten().for_each(|bias| gate_up_bias.extend(elements(bias)));
            down_bias.extend(expert.down_bias.iter().flat_map(elements));
        }
        let shared = weights.shared.as_ref().map(|shared| {
            let (mut gate_up, mut down) = (vec![], vec![]);
            joint(&shared.matrices, &mut gate_up, &mut down);
            [gate_up, down, vector(&shared.gate)]
        });
        Self {
            router: vector(&weights.router),
            router_bias: vector(&weights.router_bias),
            correction_bias: vector(&weights.correction_bias),
            gate_up,
            gate_up_bias,
            down,
            down_bias,
            shared,
        }
    }

    fn layer(&self) -> Layer<'_> {
        fn some(values: &[f64]) -> Option<&[f64]> {
            Some(values).filter(|values| !values.is_empty())
        }
        let shared = self.shared.as_ref().map(|[gate_up, down, gate]| SharedExpert {
            gate_up,
            gate_up_bias: None,
            down,
            down_bias: None,
            gate: some(gate),
        });
        Layer {
            router: &self.router,
            router_bias: some(&self.router_bias),
            correction_bias: some(&self.correction_bias),
            gate_up: &self.gate_up,
            gate_up_bias: some(&self.gate_up_bias),
            down: &self.down,
            down_bias: some(&self.down_bias),
            shared,
            ..Layer::default()
        }
    }
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f64> {
    let bytes = file.tensor(name).unwrap();
    bytes.data().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes).into()).collect()
}

fn check(family: &str) {
    let golden = Golden::open(family);
    let layer = golden.checkpoint.layer(golden.layer).unwrap();
    let (config, weights, case) = (&layer.config, Canonical::of(&layer), &golden.cases[0]);

    // the gradients lie as a checkpoint does, so that the family's own entry finds each of them
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(path(family).join("config.json"), folder.path().join("config.json")).unwrap();
    std::fs::copy(path(family).join("gradients.safetensors"), folder.path().join("model.safetensors")).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let wanted = Canonical::of(&checkpoint.layer(golden.layer).unwrap());
    let bytes = std::fs::read(path(family).join("gradients.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();

    let x: Vec<f64> = case.x.iter().map(|&x| x.into()).collect();
    let input = Input { x: &x, tokens: case.tokens, ..Input::default() };
    let source = Source::Router;
    let (output, saved) = forward_saving(config, &weights.layer(), &input, source);
    let d_y = floats(&file, "d_y");
    let op = LayerBackward { d_y: &d_y, d_logits: None, x: &x, source, saved: &saved, tokens: case.tokens };
    let found = backward(config, &weights.layer(), &op);

    let mut compared = 0;
    let mut same = |name: &str, found: &[f64], wanted: &[f64]| {
        if !wanted.is_empty() {
            let error = relative(found, wanted);
            assert!(error <= TOLERANCE, "{family}, {name}: {error:e}");
            compared += 1;
        }
    };
    same("x", &found.x, &floats(&file, "d_x"));
    same("router", &found.router, &wanted.router);
    same("router_bias", &found.router_bias, &wanted.router_bias);
    same("gate_up", &found.gate_up, &wanted.gate_up);
    same("gate_up_bias", &found.gate_up_bias, &wanted.gate_up_bias);
    same("down", &found.down, &wanted.down);
    same("down_bias", &found.down_bias, &wanted.down_bias);
    if let (Some(found), Some([gate_up, down, gate])) = (&found.shared, &wanted.shared) {
        same("shared gate_up", &found.gate_up, gate_up);
        same("shared down", &found.down, down);
        same("shared gate", &found.gate, gate);
    }
    assert!(compared >= 4, "{family}: {compared} gradients");

    if let Ok(aux) = file.tensor("aux_loss") {
        let wanted: f64 = f32::from_le_bytes(aux.data().try_into().unwrap()).into();
        let (experts, top_k) = (config.experts, config.top_k);
        let loss = load_balance_loss(&LoadBalance {
            logits: &output.logits,
            ids: &output.routes.experts,
            score: Score::Softmax,
            sequences: None,
            // transformers divides the counts by T, not by T*K
            coefficient: top_k as f64,
            tokens: case.tokens,
            experts,
            top_k,
        });
        assert!((loss.value - wanted).abs() < 1e-6 * wanted, "{} {wanted}", loss.value);
        let error = relative(&loss.logits, &floats(&file, "d_logits"));
        assert!(error <= TOLERANCE, "{family}, aux loss: {error:e}");
    }
}

macro_rules! families {
    ($($name:ident)*) => {
        $(#[test] fn $name() { check(stringify!($name)); })*

        #[test]
        fn every_file_is_checked() {
            let with = common::goldens().into_iter().filter(|name| path(name).join("gradients.safetensors").exists());
            for folder in with {
                assert!([$(stringify!($name)),*].contains(&folder.as_str()), "{folder}");
            }
        }
    };
}

families! { mixtral qwen2_moe deepseek_v3 gpt_oss }
