use crate::{central, dot, numbers};
use fused_moe_core::NO_EXPERT;
use fused_moe_core::config::*;
use fused_moe_core::reference::*;

const TOKENS: usize = 4;

/// Everything that a layer may be made of, whether its configuration asks for it or not.
#[derive(Clone)]
struct Owned {
    x: Vec<f64>,
    logits: Vec<f64>,
    weights: Vec<f64>,
    router: Vec<f64>,
    router_bias: Vec<f64>,
    router_norm: Vec<f64>,
    correction_bias: Vec<f64>,
    expert_scale: Vec<f64>,
    gate_up: Vec<f64>,
    gate_up_bias: Vec<f64>,
    down: Vec<f64>,
    down_bias: Vec<f64>,
    shared_gate_up: Vec<f64>,
    shared_gate_up_bias: Vec<f64>,
    shared_down: Vec<f64>,
    shared_down_bias: Vec<f64>,
    shared_gate: Vec<f64>,
}

/// Experts by token id: one of them twice in a row.
const TABLE: [u32; 6] = [3, 0, 2, 2, 1, 4];
const TOKEN_IDS: [u32; TOKENS] = [0, 2, 1, 0];

impl Owned {
    fn new(c: &LayerConfig) -> Self {
        let (n, shared) = (c.gate_up_rows(), c.shared.unwrap_or(SHARED));
        let (s, s_rows) = (shared.intermediate, shared.activation.gate_up_rows(shared.intermediate));
        Self {
            x: numbers(1, TOKENS * c.hidden),
            logits: numbers(2, TOKENS * c.experts),
            weights: numbers(3, TOKENS * c.top_k),
            router: numbers(4, c.experts * c.hidden),
            router_bias: numbers(5, c.experts),
            router_norm: numbers(6, c.hidden),
            correction_bias: numbers(7, c.experts),
            expert_scale: numbers(8, c.experts).iter().map(|s| s + 1.5).collect(),
            gate_up: numbers(9, c.experts * n * c.hidden),
            gate_up_bias: numbers(10, c.experts * n),
            down: numbers(11, c.experts * c.hidden * c.intermediate),
            down_bias: numbers(12, c.experts * c.hidden),
            shared_gate_up: numbers(13, s_rows * c.hidden),
            shared_gate_up_bias: numbers(14, s_rows),
            shared_down: numbers(15, c.hidden * s),
            shared_down_bias: numbers(16, c.hidden),
            shared_gate: numbers(17, c.hidden),
        }
    }

    fn layer(&self) -> Layer<'_> {
        Layer {
            router: &self.router,
            router_bias: Some(&self.router_bias),
            router_norm: Some(&self.router_norm),
            correction_bias: Some(&self.correction_bias),
            expert_scale: Some(&self.expert_scale),
            table: Some(&TABLE),
            gate_up: &self.gate_up,
            gate_up_bias: Some(&self.gate_up_bias),
            down: &self.down,
            down_bias: Some(&self.down_bias),
            shared: Some(SharedExpert {
                gate_up: &self.shared_gate_up,
                gate_up_bias: Some(&self.shared_gate_up_bias),
                down: &self.shared_down,
                down_bias: Some(&self.shared_down_bias),
                gate: Some(&self.shared_gate),
            }),
            ..Layer::default()
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Origin {
    Router,
    Logits,
    Routes,
}

/// Ids of given routes: a slot that goes nowhere, one that does not exist, an expert twice.
const IDS: [u32; 2 * TOKENS] = [1, 0, NO_EXPERT, 3, 2, 2, 9, 4];

fn source(from: Origin, owned: &Owned) -> Source<'_> {
    match from {
        Origin::Router => Source::Router,
        Origin::Logits => Source::Logits(&owned.logits),
        Origin::Routes => Source::Routes { ids: &IDS, weights: &owned.weights },
    }
}

/// Every gradient against central differences of `sum c * y + sum c_l * logits`.
fn check(config: &LayerConfig, from: Origin) {
    let owned = Owned::new(config);
    let (c, c_l) = (numbers(20, TOKENS * config.hidden), numbers(21, TOKENS * config.experts));
    let run = |owned: &Owned| {
        let input = Input { x: &owned.x, token_ids: Some(&TOKEN_IDS), tokens: TOKENS, ..Input::default() };
        forward_saving(config, &owned.layer(), &input, source(from, owned))
    };
    let (output, saved) = run(&owned);
    let loss = |owned: &Owned| {
        let (moved, _) = run(owned);
        assert_eq!(moved.routes.experts, output.routes.experts, "a step must not change the choice");
        dot(&moved.y, &c) + if from == Origin::Routes { 0.0 } else { dot(&moved.logits, &c_l) }
    };
    let d_logits = (from != Origin::Routes).then_some(&c_l[..]);
    let (x, source, saved) = (&owned.x, source(from, &owned), &saved);
    let op = LayerBackward { d_y: &c, d_logits, x, source, saved, tokens: TOKENS };
    let d = backward(config, &owned.layer(), &op);
    macro_rules! each {
        ($($field:ident: $found:expr),* $(,)?) => {{
            $(central(&format!("{} of {config:?}", stringify!($field)), $found, &owned.$field, |at| {
                loss(&Owned { $field: at.to_vec(), ..owned.clone() })
            });)*
        }};
    }
    each! { x: &d.x, gate_up: &d.gate_up, gate_up_bias: &d.gate_up_bias, down: &d.down, down_bias: &d.down_bias }
    match from {
        Origin::Router => each! { router: &d.router, router_bias: &d.router_bias, expert_scale: &d.expert_scale },
        Origin::Logits => each! { logits: &d.logits, expert_scale: &d.expert_scale },
        Origin::Routes => each! { weights: &d.weights },
    }
    assert_eq!(d.router.is_empty(), from != Origin::Router);
    if config.gate.norm.is_some_and(|norm| norm.feeds_experts || from == Origin::Router) {
        each! { router_norm: &d.router_norm }
    } else {
        assert!(d.router_norm.is_empty());
    }
    assert_eq!(d.shared.is_some(), config.shared.is_some());
    if let Some(shared) = d.shared {
        each! {
            shared_gate_up: &shared.gate_up,
            shared_gate_up_bias: &shared.gate_up_bias,
            shared_down: &shared.down,
            shared_down_bias: &shared.down_bias,
        }
        match config.shared {
            Some(SharedConfig { gated: true, .. }) => each! { shared_gate: &shared.gate },
            _ => assert!(shared.gate.is_empty()),
        }
    }
}

const SHARED: SharedConfig =
    SharedConfig { intermediate: 2, activation: Activation::Gated(Function::Silu), gated: true, scale: 0.7 };

fn plain() -> LayerConfig {
    let mut config = LayerConfig { routed_scale: 1.5, ..LayerConfig::new(5, 3, 5, 2) };
    config.routing.weights.normalize = Normalize::Sum { eps: 0.25 };
    config
}

#[test]
fn activations() {
    let functions = [Function::Silu, Function::GeluTanh, Function::GeluErf, Function::Relu, Function::ReluSquared];
    let mut all = vec![
        Activation::ClampedSilu { limit: 0.5 },
        Activation::ClampedSwish { alpha: 1.702, limit: 0.5 },
        Activation::SiluThenClamp { limit: 0.25 },
        Activation::SoftcappedSilu { gate_cap: 0.5, up_cap: 0.25 },
    ];
    all.extend(functions.map(Activation::Gated));
    all.extend(functions.map(Activation::Plain));
    for activation in all {
        check(
            &LayerConfig { activation, shared: Some(SharedConfig { activation, ..SHARED }), ..plain() },
            Origin::Router,
        );
    }
}

#[test]
fn weights_on_input_and_output_from_every_source() {
    for weight_on in [WeightOn::Input, WeightOn::Output] {
        for from in [Origin::Router, Origin::Logits, Origin::Routes] {
            for shared in [None, Some(SHARED), Some(SharedConfig { gated: false, ..SHARED })] {
                check(&LayerConfig { weight_on, shared, ..plain() }, from);
            }
        }
    }
}

#[test]
fn gates() {
    for feeds_experts in [false, true] {
        for softcap in [None, Some(0.8)] {
            for from in [Origin::Router, Origin::Logits, Origin::Routes] {
                let norm = Some(GateNorm { eps: 1e-3, feeds_experts });
                let gate = GateConfig { norm, softcap, scale: 1.25 };
                check(&LayerConfig { gate, shared: Some(SHARED), ..plain() }, from);
            }
        }
    }
}

#[test]
fn scores_selections_and_weight_rules() {
    let groups = Groups { count: 5, keep: 3, score: GroupScore::Best, masked: Masked::NegInfinity };
    // and how many experts are always chosen
    let selections = [
        (Selection::TopK { by: SelectBy::Score, bias: true, groups: Some(groups) }, 0),
        (Selection::TopK { by: SelectBy::Logit, bias: false, groups: None }, 0),
        (Selection::SparseMixer { jitter: 0.3 }, 0),
        (Selection::Table, 0),
        (Selection::TopK { by: SelectBy::Score, bias: false, groups: None }, 1),
    ];
    let normalizers = [Normalize::None, Normalize::SumAtLeast { min: 0.1 }, Normalize::Lp { p: 2.0 }];
    for score in [Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus, Score::Logit] {
        for (n, (selection, always)) in selections.into_iter().enumerate() {
            for value in [WeightValue::Score, WeightValue::SoftmaxOfChosen] {
                let normalize = normalizers[n % normalizers.len()];
                let expert_scale = [Some(ExpertScale::BeforeNormalize), Some(ExpertScale::AfterNormalize)][n % 2];
                let weights = WeightRule { value, expert_scale, normalize, scale: 1.25 };
                let routing = RoutingRule { score, selection, always, weights };
                check(&LayerConfig { routing, ..plain() }, Origin::Router);
            }
        }
    }
}
